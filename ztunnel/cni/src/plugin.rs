//! The plugin: one call of a container runtime, from environment and standard input to standard output (CNI spec 1.1.0;
//! 1.0.0 and the 0.3 and 0.4 lines differ in nothing that is looked at here).
//!
//! It runs on the host as a process of its own, has a second to spare and not ten, and decides nothing that ztunnel can
//! decide. Alone it knows three things, all from its configuration: namespaces that never wait, where ztunnel listens,
//! and the file in which ztunnel keeps what the control plane last said.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::namespaces;
use crate::wire::{self, Answer, Attachment, PodName, Request};

/// Name of the plugin's file in the runtime's directory, and its `type` in configurations.
pub const NAME: &str = "ztunnel-cni";

/// What is understood, oldest first.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// An answer takes ztunnel five seconds at most; runtimes lose patience much later.
const ANSWER: Duration = Duration::from_secs(7);
/// How long nobody may listen before there is no ztunnel: a restart takes less.
const ABSENCE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(50);

/// What a runtime gets: text for standard output, and whether the call succeeded.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub output: Option<Value>,
    pub succeeded: bool,
}

/// An error of the spec, section "Error".
#[derive(Debug, PartialEq)]
struct Failure {
    code: u32,
    message: String,
    details: String,
}

mod code {
    pub(super) const VERSION: u32 = 1;
    pub(super) const ENVIRONMENT: u32 = 4;
    pub(super) const INPUT: u32 = 5;
    pub(super) const CONTENT: u32 = 6;
    pub(super) const CONFIGURATION: u32 = 7;
    pub(super) const LATER: u32 = 11;
    pub(super) const UNAVAILABLE: u32 = 50;
    /// The first of those that plugins define.
    pub(super) const REFUSED: u32 = 100;
}

fn failure(code: u32, message: &str, details: impl ToString) -> Failure {
    Failure { code, message: message.to_owned(), details: details.to_string() }
}

/// The plugin's part of a configuration list, with what runtimes add to it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Conf {
    #[serde(default)]
    cni_version: String,
    #[serde(default = "default_socket")]
    socket: PathBuf,
    #[serde(default = "default_state")]
    state: PathBuf,
    #[serde(default)]
    pass_namespaces: Vec<String>,
    #[serde(default)]
    status: Status,
    prev_result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<ValidAttachment>>,
}

/// Whose state STATUS tells.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// ztunnel's: without it no pod outside the listed namespaces can be sure to start.
    #[default]
    Ztunnel,
    /// The plugin's own. For Kubernetes: a kubelet starts nothing but pods of the host's network while STATUS fails, and so
    /// not the ztunnel that would end the failure.
    Plugin,
}

#[derive(Debug, Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container: String,
    #[serde(rename = "ifname")]
    interface: String,
}

fn default_socket() -> PathBuf {
    crate::DEFAULT_SOCKET.into()
}

fn default_state() -> PathBuf {
    crate::DEFAULT_STATE.into()
}

/// Serves one call. `environment` are the `CNI_*` variables, `input` is standard input.
#[must_use]
pub fn call(environment: &BTreeMap<String, String>, input: &[u8]) -> Outcome {
    let version =
        serde_json::from_slice::<Value>(input).ok().and_then(|conf| Some(conf.get("cniVersion")?.as_str()?.to_owned()));
    let version = version.filter(|v| !v.is_empty());
    match (Call { environment, input }).serve() {
        Ok(output) => Outcome { output, succeeded: true },
        Err(Failure { code, message, details }) => {
            let version = version.as_deref().filter(|v| VERSIONS.contains(v)).unwrap_or("1.0.0");
            let error = json!({ "cniVersion": version, "code": code, "msg": message, "details": details });
            Outcome { output: Some(error), succeeded: false }
        }
    }
}

struct Call<'a> {
    environment: &'a BTreeMap<String, String>,
    input: &'a [u8],
}

impl Call<'_> {
    fn serve(&self) -> Result<Option<Value>, Failure> {
        let command = self.variable("CNI_COMMAND")?;
        match command {
            "VERSION" => return Ok(Some(self.versions())),
            // A container that is gone must go, whatever state we are in.
            "DEL" => {
                self.del();
                return Ok(None);
            }
            _ => {}
        }
        let conf = self.conf()?;
        match command {
            "ADD" => self.add(&conf).map(Some),
            "CHECK" => self.check(&conf).map(|()| None),
            "STATUS" => status(&conf).map(|()| None),
            "GC" => gc(&conf).map(|()| None),
            other => Err(failure(code::ENVIRONMENT, "CNI_COMMAND is not known", other)),
        }
    }

    fn variable(&self, name: &str) -> Result<&str, Failure> {
        let value = self.environment.get(name).map(String::as_str).filter(|v| !v.is_empty());
        value.ok_or_else(|| failure(code::ENVIRONMENT, "a variable that the runtime has to set is missing", name))
    }

    /// The answer to VERSION.
    fn versions(&self) -> Value {
        let asked = serde_json::from_slice::<Value>(self.input).ok();
        let asked = asked.as_ref().and_then(|conf| conf.get("cniVersion")?.as_str()).filter(|v| VERSIONS.contains(v));
        json!({ "cniVersion": asked.unwrap_or("1.1.0"), "supportedVersions": VERSIONS })
    }

    fn conf(&self) -> Result<Conf, Failure> {
        let conf: Conf = serde_json::from_slice(self.input)
            .map_err(|error| failure(code::CONTENT, "the configuration on standard input cannot be read", error))?;
        if !VERSIONS.contains(&conf.cni_version.as_str()) {
            return Err(failure(
                code::VERSION,
                "this version of the CNI specification is not supported",
                format!("{:?}; supported: {}", conf.cni_version, VERSIONS.join(", ")),
            ));
        }
        Ok(conf)
    }

    fn add(&self, conf: &Conf) -> Result<Value, Failure> {
        let result = self.previous(conf)?;
        let attachment = self.attachment()?;
        let netns = self.variable("CNI_NETNS")?;
        let Some(pod) = self.pod()? else { return Ok(result) };
        if conf.pass_namespaces.contains(&pod.namespace) {
            return Ok(result);
        }
        let file = open_netns(netns)?;
        let addresses = addresses(&result);
        if addresses.is_empty() {
            return Err(failure(code::CONFIGURATION, "prevResult has no address: the mesh comes last in a chain", ""));
        }
        let namespace = pod.namespace.clone();
        let request = Request::Add { attachment, pod, addresses };
        match ask(&conf.socket, &request, Some(&file), ABSENCE) {
            Ok(Answer::Enrolled | Answer::Outside | Answer::Done) => Ok(result),
            Ok(Answer::Refused { reason }) => Err(failure(code::REFUSED, "the pod cannot join the mesh", reason)),
            Ok(Answer::Later { reason }) => Err(failure(code::LATER, "the pod cannot join the mesh now", reason)),
            // What the control plane last said is all there is.
            Err(_) if namespaces::read(&conf.state).contains(&namespace) => Ok(result),
            Err(error) => Err(failure(code::LATER, "ztunnel does not answer on this node", error)),
        }
    }

    fn del(&self) {
        let Ok(attachment) = self.attachment() else { return };
        let socket = self.conf().map_or_else(|_| default_socket(), |conf| conf.socket);
        // It may be gone already, and with it all there was to remove.
        let file = self.variable("CNI_NETNS").ok().and_then(|path| File::open(path).ok());
        let request = Request::Del { attachment };
        if let Err(error) = ask(&socket, &request, file.as_ref(), Duration::ZERO) {
            // ztunnel notices by itself, and the namespace takes with it what was in it.
            eprintln!("{NAME}: DEL: {error}");
        }
    }

    fn check(&self, conf: &Conf) -> Result<(), Failure> {
        self.previous(conf)?;
        let file = open_netns(self.variable("CNI_NETNS")?)?;
        let Some(pod) = self.pod()?.filter(|pod| !conf.pass_namespaces.contains(&pod.namespace)) else { return Ok(()) };
        match ask(&conf.socket, &Request::Check { pod }, Some(&file), ABSENCE) {
            Ok(Answer::Enrolled | Answer::Outside | Answer::Done) => Ok(()),
            Ok(Answer::Later { reason } | Answer::Refused { reason }) => {
                Err(failure(code::REFUSED, "the pod is to be in the mesh and is not captured", reason))
            }
            Err(error) => Err(failure(code::LATER, "ztunnel does not answer on this node", error)),
        }
    }

    /// What the plugins before us made, which is what we return.
    fn previous(&self, conf: &Conf) -> Result<Value, Failure> {
        let mut result = conf.prev_result.clone().filter(Value::is_object).ok_or_else(|| {
            failure(
                code::CONFIGURATION,
                "prevResult is missing: the mesh has to come after the plugin that makes the interface",
                "",
            )
        })?;
        result["cniVersion"] = conf.cni_version.clone().into();
        Ok(result)
    }

    fn attachment(&self) -> Result<Attachment, Failure> {
        let container = self.variable("CNI_CONTAINERID")?.to_owned();
        Ok(Attachment { container, interface: self.variable("CNI_IFNAME")?.to_owned() })
    }

    /// The pod, where the container is one's.
    fn pod(&self) -> Result<Option<PodName>, Failure> {
        let arguments = self.environment.get("CNI_ARGS").map_or("", String::as_str);
        let get = |name: &str| {
            let found = arguments.split(';').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
            found.map(|(_, value)| value.to_owned()).filter(|value| !value.is_empty())
        };
        match (get("K8S_POD_NAMESPACE"), get("K8S_POD_NAME"), get("K8S_POD_UID")) {
            (Some(namespace), Some(name), Some(uid)) => Ok(Some(PodName { uid, namespace, name })),
            // Not of Kubernetes.
            (None, None, None) => Ok(None),
            _ => Err(failure(
                code::ENVIRONMENT,
                "CNI_ARGS names a pod without all of K8S_POD_NAMESPACE, K8S_POD_NAME and K8S_POD_UID: containerd does since 1.6, CRI-O since 1.21",
                arguments,
            )),
        }
    }
}

/// What a call understands before it asks anybody: the pod, and its addresses.
#[cfg(fuzzing)]
#[doc(hidden)]
pub fn understood(environment: &BTreeMap<String, String>, input: &[u8]) -> Option<(Option<PodName>, Vec<IpAddr>)> {
    let call = Call { environment, input };
    let result = call.previous(&call.conf().ok()?).ok()?;
    Some((call.pod().ok()?, addresses(&result)))
}

fn open_netns(path: &str) -> Result<File, Failure> {
    File::open(path).map_err(|error| failure(code::INPUT, "CNI_NETNS cannot be opened", format!("{path}: {error}")))
}

/// The addresses inside the container.
fn addresses(result: &Value) -> Vec<IpAddr> {
    let interfaces = result.get("interfaces").and_then(Value::as_array);
    let inside = |ip: &&Value| {
        // Without an index they are said to be the container's.
        let Some(index) = ip.get("interface").and_then(Value::as_u64) else { return true };
        let interface = interfaces.and_then(|all| all.get(usize::try_from(index).ok()?));
        interface.is_none_or(|i| i.get("sandbox").and_then(Value::as_str).is_some_and(|s| !s.is_empty()))
    };
    let ips = result.get("ips").and_then(Value::as_array).into_iter().flatten().filter(inside);
    ips.filter_map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok()).collect()
}

fn status(conf: &Conf) -> Result<(), Failure> {
    let unavailable = |details: String| failure(code::UNAVAILABLE, "ztunnel is not ready on this node", details);
    match conf.status {
        Status::Plugin => Ok(()),
        Status::Ztunnel => match ask(&conf.socket, &Request::Status, None, Duration::ZERO) {
            Ok(Answer::Later { reason } | Answer::Refused { reason }) => Err(unavailable(reason)),
            Ok(_) => Ok(()),
            Err(error) => Err(unavailable(error.to_string())),
        },
    }
}

fn gc(conf: &Conf) -> Result<(), Failure> {
    let valid = conf.valid_attachments.as_ref().ok_or_else(|| {
        failure(code::CONFIGURATION, "cni.dev/valid-attachments is missing: nothing is collected without it", "")
    })?;
    let valid =
        valid.iter().map(|a| Attachment { container: a.container.clone(), interface: a.interface.clone() }).collect();
    match ask(&conf.socket, &Request::Gc { valid }, None, Duration::ZERO) {
        Ok(Answer::Later { reason } | Answer::Refused { reason }) => {
            Err(failure(code::LATER, "ztunnel cannot collect now", reason))
        }
        // What was added ended with ztunnel: another one finds its pods anew.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// One request and its answer. Where nobody listens, or somebody who is ending, looks again for `absence`.
fn ask(path: &Path, request: &Request, file: Option<&File>, absence: Duration) -> io::Result<Answer> {
    let packet = wire::encode(request)?;
    let end = Instant::now() + absence;
    loop {
        let asked = wire::connect(path, ANSWER).and_then(|socket| {
            wire::send(socket.as_fd(), &packet, file.map(AsFd::as_fd))?;
            let (answer, _) = wire::receive(socket.as_fd())?;
            wire::decode(&answer)
        });
        let gone = |error: &io::Error| {
            use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
            matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof)
        };
        match asked {
            Err(error) if gone(&error) && Instant::now() < end => std::thread::sleep(POLL),
            asked => {
                return asked.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())));
            }
        }
    }
}

#[cfg(test)]
mod tests;
