//! The mesh cases of Gateway API's conformance suite as vectors of our own: what is applied, what is asked, what must come of
//! it, and what is owed.
//!
//! A vector either holds, or it is owed and says why; one that is owed and holds is an error, so that the tables stay true.

pub mod further;
pub mod suite;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use anyhow::{Result, ensure};
use mesh_tests::echo::{Answer, Ask, How, Report, values};

/// The namespace of the services.
pub const MESH: &str = "gateway-conformance-mesh";
/// The namespace of another client.
pub const CONSUMER: &str = "gateway-conformance-mesh-consumer";

/// So many requests in a row must meet what is expected.
const IN_A_ROW: u32 = 3;
/// How many show a split, and how far a share may be off, in hundredths of all.
const TO_SPLIT: u32 = 500;
const TOLERANCE: u32 = 5;
/// Stands for a key of which nobody has heard, the same for all of one vector's requests.
pub const KEY: &str = "{key}";
/// Stands for the address of the pod of `echo-v2`.
pub const POD: &str = "{echo-v2}";

/// What is applied, and what is asked then.
pub struct Case {
    /// As the suite calls it; for the further ones, of the feature.
    pub name: &'static str,
    /// What it shows beside `Mesh`, as the standard spells features.
    pub features: &'static [&'static str],
    /// YAML.
    pub objects: String,
    pub said: Said,
    pub vectors: Vec<Vector>,
}

/// What the mesh says of a case's objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// Nothing is applied, or all of it is carried out: accepted, resolved, with a waypoint.
    CarriedOut,
    /// Accepted, and `ResolvedRefs` is False with these words.
    Unresolved(&'static [&'static str]),
    /// `Accepted` is False, or `PartiallyInvalid` True, with these words.
    Refused(&'static [&'static str]),
    /// The API knows no such kind.
    NoSuchKind(&'static str),
}

/// Whether a vector must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    Passes,
    /// It cannot hold yet; so its requests are answered meanwhile.
    Owed {
        why: &'static str,
        instead: u16,
    },
}

/// One request and what must come of it.
pub struct Vector {
    /// Namespace of the client, which is `echo-v1` there.
    pub from: &'static str,
    pub ask: Ask,
    pub mark: Mark,
    expect: Expect,
}

#[derive(Default)]
struct Expect {
    status: u16,
    /// Which is as good.
    or_status: Option<u16>,
    /// Beginning of the server's name, and its namespace.
    server: Option<(&'static str, &'static str)>,
    path: Option<&'static str>,
    host: Option<&'static str>,
    protocol: Option<&'static str>,
    arrives: Vec<(&'static str, Option<&'static str>)>,
    returns: Vec<(&'static str, Option<&'static str>)>,
    at_least_millis: u64,
    seen: Option<u32>,
    /// Hundredths, by the beginning of the server's name, or by the status of what no server has answered.
    shares: &'static [(&'static str, u32)],
    /// What those say that are asked afterwards how often they have seen the key.
    counted: Vec<RangeInclusive<u32>>,
}

/// GET of a path of `echo`, from the namespace of the mesh.
pub fn get(path: &str) -> Vector {
    let ask = Ask {
        how: How::Http1,
        method: "GET".into(),
        url: format!("http://echo{path}"),
        headers: Vec::new(),
        count: IN_A_ROW,
        then: Vec::new(),
    };
    Vector { from: MESH, ask, mark: Mark::Passes, expect: Expect { status: 200, ..Expect::default() } }
}

/// A call of a method of the gRPC port of `echo`.
pub fn call(method: &str) -> Vector {
    let vector = get(method).to("echo:7070");
    Vector { ask: Ask { how: How::Grpc, ..vector.ask }, ..vector }
}

impl Vector {
    /// To another host, `HOST[:PORT]`.
    pub fn to(mut self, host: &str) -> Self {
        let path = self.ask.url.trim_start_matches("http://").split_once('/').map(|(_, path)| path.to_owned());
        self.ask.url = format!("http://{host}/{}", path.unwrap_or_default());
        self
    }

    pub fn from(mut self, namespace: &'static str) -> Self {
        self.from = namespace;
        self
    }

    pub fn method(mut self, method: &str) -> Self {
        self.ask.method = method.into();
        self
    }

    pub fn how(mut self, how: How) -> Self {
        self.ask.how = how;
        self
    }

    /// So often.
    pub fn times(mut self, count: u32) -> Self {
        self.ask.count = count;
        self
    }

    /// With a header.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.ask.headers.push((name.into(), value.into()));
        self
    }

    /// It is answered by this server of the mesh's namespace.
    pub fn lands_on(self, hostname: &'static str) -> Self {
        self.lands_in(MESH, hostname)
    }

    pub fn lands_in(mut self, namespace: &'static str, hostname: &'static str) -> Self {
        self.expect.server = Some((hostname, namespace));
        self
    }

    pub fn answered(mut self, status: u16) -> Self {
        self.expect.status = status;
        self
    }

    /// Or this one.
    pub fn or(mut self, status: u16) -> Self {
        self.expect.or_status = Some(status);
        self
    }

    pub fn redirected(self, status: u16, location: &'static str) -> Self {
        self.answered(status).returns("location", location)
    }

    /// The server sees this path, with its query.
    pub fn arrives_at(mut self, path: &'static str) -> Self {
        self.expect.path = Some(path);
        self
    }

    pub fn arrives_for(mut self, host: &'static str) -> Self {
        self.expect.host = Some(host);
        self
    }

    pub fn arrives_by(mut self, protocol: &'static str) -> Self {
        self.expect.protocol = Some(protocol);
        self
    }

    pub fn arrives_with(mut self, name: &'static str, value: &'static str) -> Self {
        self.expect.arrives.push((name, Some(value)));
        self
    }

    pub fn arrives_without(mut self, name: &'static str) -> Self {
        self.expect.arrives.push((name, None));
        self
    }

    pub fn returns(mut self, name: &'static str, value: &'static str) -> Self {
        self.expect.returns.push((name, Some(value)));
        self
    }

    pub fn returns_without(mut self, name: &'static str) -> Self {
        self.expect.returns.push((name, None));
        self
    }

    /// The answer takes this long or longer.
    pub fn takes(mut self, millis: u64) -> Self {
        self.expect.at_least_millis = millis;
        self
    }

    /// Once, as the so manyth of its key.
    pub fn seen(mut self, number: u32) -> Self {
        self.ask.count = 1;
        self.expect.seen = Some(number);
        self
    }

    /// Requests are shared out like this.
    pub fn shared(mut self, shares: &'static [(&'static str, u32)]) -> Self {
        self.ask.count = TO_SPLIT;
        self.expect.shares = shares;
        self
    }

    /// Afterwards another host has seen so many of its key.
    pub fn counted(mut self, host: &str, number: RangeInclusive<u32>) -> Self {
        self.ask.then.push(format!("http://{host}/?count={KEY}&want={}", number.start()));
        self.expect.counted.push(number);
        self
    }

    pub fn owed(mut self, why: &'static str, instead: u16) -> Self {
        self.mark = Mark::Owed { why, instead };
        self
    }

    /// `Ok` if the answers are what the mark says they are.
    ///
    /// # Errors
    /// What is not so.
    pub fn judge(&self, answers: &[Answer]) -> Result<()> {
        let met = self.met(answers);
        match self.mark {
            Mark::Passes => met,
            Mark::Owed { why, instead } => {
                ensure!(met.is_err(), "it holds and is marked as owed ({why}): take the mark off");
                let other = answers.iter().take(self.asked()).find(|answer| answer.status != instead);
                ensure!(other.is_none(), "it is owed ({why}) and should be answered {instead} meanwhile: {other:?}");
                Ok(())
            }
        }
    }

    fn asked(&self) -> usize {
        self.ask.count as usize
    }

    fn met(&self, answers: &[Answer]) -> Result<()> {
        let asked = self.asked();
        ensure!(answers.len() == asked + self.ask.then.len(), "{} answers", answers.len());
        let (answers, counts) = answers.split_at(asked);
        if self.expect.shares.is_empty() {
            answers.iter().try_for_each(|answer| self.expect.met(answer))?;
        } else {
            split(self.expect.shares, answers)?;
        }
        for (expected, answer) in self.expect.counted.iter().zip(counts) {
            let seen = answer.report().map(|report| report.seen);
            ensure!(seen.is_some_and(|seen| expected.contains(&seen)), "{expected:?} should have come: {answer:?}");
        }
        Ok(())
    }
}

impl Expect {
    fn met(&self, answer: &Answer) -> Result<()> {
        let is_good = answer.status == self.status || Some(answer.status) == self.or_status;
        ensure!(is_good && answer.error.is_none(), "not {}: {answer:?}", self.status);
        ensure!(answer.millis >= self.at_least_millis, "sooner than {} ms: {answer:?}", self.at_least_millis);
        for (name, expected) in &self.returns {
            let found = values(&answer.headers, name);
            ensure!(found.as_deref() == *expected, "it returns {name} {found:?} and not {expected:?}");
        }
        let report = answer.report();
        ensure!(report.is_some() || !self.needs_report(), "no server has answered it: {answer:?}");
        report.map_or(Ok(()), |report| self.arrived(&report))
    }

    fn needs_report(&self) -> bool {
        self.server.is_some()
            || self.path.or(self.host).or(self.protocol).is_some()
            || self.seen.is_some()
            || !self.arrives.is_empty()
    }

    fn arrived(&self, report: &Report) -> Result<()> {
        let is = |expected: Option<&str>, found: &str| expected.is_none_or(|expected| expected == found);
        let is_it = |(hostname, namespace): (&str, &str)| {
            report.hostname.starts_with(hostname) && report.namespace == namespace
        };
        ensure!(self.server.is_none_or(is_it), "not {:?}: {report:?}", self.server);
        ensure!(is(self.path, &report.path), "not at {:?}: {report:?}", self.path);
        ensure!(is(self.host, &report.host), "not for {:?}: {report:?}", self.host);
        ensure!(is(self.protocol, &report.protocol), "not by {:?}: {report:?}", self.protocol);
        ensure!(self.seen.is_none_or(|seen| seen == report.seen), "not as number {:?}: {report:?}", self.seen);
        for (name, expected) in &self.arrives {
            let found = values(&report.headers, name);
            ensure!(found.as_deref() == *expected, "it arrives with {name} {found:?} and not {expected:?}");
        }
        Ok(())
    }
}

/// Every answer belongs to a share, and each share is as large as it should be.
fn split(shares: &[(&str, u32)], answers: &[Answer]) -> Result<()> {
    let mut found: BTreeMap<&str, u32> = shares.iter().map(|(whose, _)| (*whose, 0)).collect();
    for answer in answers {
        let name = answer.report().map_or_else(|| answer.status.to_string(), |report| report.hostname);
        let whose = shares.iter().map(|(whose, _)| *whose).find(|whose| name.starts_with(whose));
        let count = whose.and_then(|whose| found.get_mut(whose));
        match count {
            Some(count) => *count += 1,
            None => anyhow::bail!("nobody's share: {answer:?}"),
        }
    }
    let all = u32::try_from(answers.len())?;
    let off = |(whose, hundredths): &(&str, u32)| (found[whose] * 100).abs_diff(hundredths * all) > TOLERANCE * all;
    ensure!(!shares.iter().any(off), "{all} requests are shared out {found:?}, not {shares:?}");
    Ok(())
}

impl Case {
    /// `Ok` if all vectors are what their marks say they are.
    ///
    /// # Errors
    /// What is not so.
    pub fn judge(&self, answers: &[Vec<Answer>]) -> Result<()> {
        ensure!(answers.len() == self.vectors.len(), "{} vectors of {}", answers.len(), self.vectors.len());
        let wrong = |(vector, answers): (&Vector, &Vec<Answer>)| {
            let Ask { method, url, headers, .. } = &vector.ask;
            vector.judge(answers).err().map(|e| format!("{method} {url} {headers:?} from {}: {e:#}", vector.from))
        };
        let wrong: Vec<String> = self.vectors.iter().zip(answers).filter_map(wrong).collect();
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    }

    fn is_owed(&self) -> bool {
        self.vectors.iter().any(|vector| vector.mark != Mark::Passes)
    }
}

/// An HTTPRoute of the mesh's namespace with a Service of it as parent, `SERVICE[:PORT]`, and these rules.
fn route(parent: &str, rules: &str) -> String {
    route_in(MESH, "case", parent, rules)
}

/// Another one beside it, or in another namespace.
fn route_in(namespace: &str, name: &str, parent: &str, rules: &str) -> String {
    let (service, port) = parent.split_once(':').map_or((parent, String::new()), |(s, p)| (s, format!(", port: {p}")));
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec:\n\
         \x20 parentRefs: [{{group: \"\", kind: Service, name: {service}, namespace: {MESH}{port}}}]\n\
         \x20 rules:{rules}\n"
    )
}

/// All cases: those of the suite first.
pub fn all() -> Vec<Case> {
    suite::cases().into_iter().chain(further::cases()).collect()
}

/// Features that cases show and none of their cases owes anything, sorted.
pub fn shown(cases: &[Case]) -> BTreeSet<&'static str> {
    let of =
        |owed: bool| cases.iter().filter(move |case| case.is_owed() == owed).flat_map(|case| case.features).copied();
    let owed: BTreeSet<&str> = of(true).collect();
    of(false).filter(|feature| !owed.contains(feature)).collect()
}
