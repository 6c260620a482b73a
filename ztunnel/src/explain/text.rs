//! An explanation in plain words.

use std::fmt;

use super::balance::Balancing;
use super::policies::Asked;
use super::{Captured, Dialled, Explanation, Hop, Refusal, Source, Verdict, Way};

/// Of endpoints and ways; JSON has all.
const MOST: usize = 20;

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        writeln!(f, "to {}", self.destination)?;
        for dialled in &self.dialled {
            write!(f, "{dialled}")?;
        }
        writeln!(f, "not known from here")?;
        for unknown in &self.not_known {
            writeln!(f, "  - {unknown}")?;
        }
        let verdict = match self.verdict {
            Verdict::Connects => "WOULD CONNECT",
            Verdict::Refused => "WOULD BE REFUSED",
            Verdict::Partly => "WOULD BE REFUSED IN PART",
        };
        writeln!(f, "{verdict}: {}", self.because)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        writeln!(f, "from {} ({}), {}", self.name, self.workload, addresses.join(", "))?;
        match &self.identity {
            Some(identity) => writeln!(f, "  identity {identity}")?,
            None => writeln!(f, "  no identity")?,
        }
        match self.captured {
            Captured::Here => writeln!(f, "  captured by this ztunnel")?,
            Captured::Elsewhere => {
                writeln!(f, "  captured by another ztunnel, of which it is assumed that it knows what this one knows")?;
            }
            Captured::Itself => writeln!(f, "  speaks HBONE by itself; it is assumed to go by the same rules")?,
            Captured::No => writeln!(f, "  not captured: the control plane says that it does not speak HBONE")?,
        }
        match &self.certificate {
            Some(state) => writeln!(f, "  certificate: {state}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Dialled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "dialling {}", self.address)?;
        for said in &self.is {
            writeln!(f, "  {said}")?;
        }
        for balancing in &self.balancing {
            write!(f, "{balancing}")?;
        }
        for way in self.ways.iter().take(MOST) {
            write!(f, "{way}")?;
        }
        more(f, self.ways.len())
    }
}

fn more(f: &mut fmt::Formatter<'_>, count: usize) -> fmt::Result {
    if count > MOST { writeln!(f, "    and {} more (-o json has all)", count - MOST) } else { Ok(()) }
}

impl fmt::Display for Balancing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  endpoints of {}, load balancing {}", self.service, self.mode)?;
        if self.candidates.is_empty() {
            writeln!(f, "    none")?;
        }
        for candidate in self.candidates.iter().take(MOST) {
            let port = candidate.port.map_or_else(String::new, |port| format!(" on port {port}"));
            match &candidate.out {
                Some(why) => writeln!(f, "    out  {}{port}: {why}", candidate.workload)?,
                None => writeln!(f, "    in   {}{port}: {}", candidate.workload, Percent(candidate.probability))?,
            }
        }
        more(f, self.candidates.len())
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.hop {
            Some(hop) => writeln!(f, "  {} {hop}", Percent(self.probability))?,
            None => writeln!(f, "  {} no way", Percent(self.probability))?,
        }
        for note in &self.notes {
            writeln!(f, "    {note}")?;
        }
        policies(f, "    ", &self.policies)?;
        for behind in self.behind.iter().take(MOST) {
            writeln!(f, "    behind it {} at {}", behind.endpoint, behind.address)?;
            policies(f, "      ", &behind.policies)?;
            refused(f, "      ", behind.refused.as_ref())?;
        }
        more(f, self.behind.len())?;
        refused(f, "    ", self.refused.as_ref())
    }
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = self.workload.as_ref().map_or_else(String::new, |workload| format!(" of {workload}"));
        let how = match self.via {
            "waypoint" => "through the waypoint at ",
            _ => "to ",
        };
        write!(f, "{how}{}{whose}", self.next)?;
        match &self.hbone {
            Some(hbone) => {
                write!(f, " by HBONE, authority {}, expecting {}", hbone.authority, hbone.expected.join(" or "))
            }
            None => write!(f, " in plain TCP"),
        }
    }
}

fn policies(f: &mut fmt::Formatter<'_>, indent: &str, policies: &[Asked]) -> fmt::Result {
    for Asked { policy, action, scope, dry_run, rule, decides } in policies {
        let matched = rule.map_or_else(|| "no rule matches".to_owned(), |rule| format!("rule {rule} matches"));
        let decides = if *decides { ": this decides" } else { "" };
        let dry_run = if *dry_run { ", dry run: not enforced" } else { "" };
        writeln!(f, "{indent}policy {policy} ({action}, {scope}{dry_run}): {matched}{decides}")?;
    }
    Ok(())
}

fn refused(f: &mut fmt::Formatter<'_>, indent: &str, refused: Option<&Refusal>) -> fmt::Result {
    match refused {
        Some(Refusal { by, flag, reason }) => writeln!(f, "{indent}refused at the {by} ({flag}): {reason}"),
        None => Ok(()),
    }
}

struct Percent(f64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = self.0 * 100.0;
        if percent.fract() < 0.05 || percent.fract() > 0.95 {
            write!(f, "{percent:.0} %")
        } else {
            write!(f, "{percent:.1} %")
        }
    }
}
