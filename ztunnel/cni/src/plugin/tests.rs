use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::*;

const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";

/// The directory of one test: a socket, a state file, a namespace to hand over (our own: nobody enters it here).
struct Node {
    dir: tempfile::TempDir,
}

/// A ztunnel that gives its answers in turn and keeps what it was asked.
struct Ztunnel {
    asked: mpsc::Receiver<(Request, bool)>,
    thread: JoinHandle<()>,
}

impl Node {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("cni.sock")
    }

    fn ztunnel(&self, answers: Vec<Answer>) -> Ztunnel {
        let listener = wire::listen(&self.socket()).unwrap();
        let (tell, asked) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            for answer in answers {
                let connection = accept(&listener);
                let (bytes, file) = wire::receive(connection.as_fd()).unwrap();
                tell.send((wire::decode(&bytes).unwrap(), file.is_some())).unwrap();
                wire::send(connection.as_fd(), &wire::encode(answer).unwrap(), None).unwrap();
            }
        });
        Ztunnel { asked, thread }
    }

    fn conf(&self) -> Value {
        json!({
            "cniVersion": "1.0.0",
            "name": "k8s",
            "type": NAME,
            "socket": self.socket(),
            "state": self.dir.path().join("namespaces.json"),
            "passNamespaces": ["kube-system", "istio-system"],
            "prevResult": {
                "cniVersion": "1.0.0",
                "interfaces": [{"name": "cali1"}, {"name": "eth0", "sandbox": "/proc/self/ns/net"}],
                "ips": [
                    {"interface": 1, "address": "10.1.2.3/24", "gateway": "10.1.2.1"},
                    {"interface": 1, "address": "fd00::3/64"},
                    {"interface": 0, "address": "169.254.1.1/32"},
                ],
                "dns": {"nameservers": ["10.1.0.1"]},
            },
        })
    }

    fn call(&self, command: &str, namespace: &str) -> Outcome {
        self.call_with(command, namespace, &self.conf())
    }

    fn call_with(&self, command: &str, namespace: &str, conf: &Value) -> Outcome {
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web-0;K8S_POD_UID={UID};K8S_POD_INFRA_CONTAINER_ID=c1"
        );
        call(&environment(command, &arguments), conf.to_string().as_bytes())
    }
}

impl Ztunnel {
    fn end(self) -> Vec<(Request, bool)> {
        self.thread.join().unwrap();
        self.asked.iter().collect()
    }
}

fn environment(command: &str, arguments: &str) -> BTreeMap<String, String> {
    let variables = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/proc/self/ns/net"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", arguments),
        ("CNI_PATH", "/opt/cni/bin"),
    ];
    variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The listener does not block.
fn accept(listener: &UnixListener) -> UnixStream {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match listener.accept() {
            Ok((connection, _)) => return connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("nobody came: {error}"),
        }
    }
}

fn code_of(outcome: &Outcome) -> u64 {
    assert!(!outcome.succeeded, "{outcome:?}");
    outcome.output.as_ref().unwrap()["code"].as_u64().unwrap()
}

#[test]
fn add_hands_over_the_namespace_and_returns_what_was_there() {
    let node = Node::new();
    let ztunnel = node.ztunnel(vec![Answer::Enrolled]);
    let outcome = node.call("ADD", "shop");
    assert_eq!(outcome, Outcome { output: Some(node.conf()["prevResult"].clone()), succeeded: true });
    let attachment = Attachment { container: "c1".into(), interface: "eth0".into() };
    let pod = PodName { uid: UID.into(), namespace: "shop".into(), name: "web-0".into() };
    let addresses = vec!["10.1.2.3".parse().unwrap(), "fd00::3".parse().unwrap()];
    assert_eq!(ztunnel.end(), [(Request::Add { attachment, pod, addresses }, true)]);
}

#[test]
fn a_pod_outside_the_mesh_passes() {
    let node = Node::new();
    let ztunnel = node.ztunnel(vec![Answer::Outside]);
    assert!(node.call("ADD", "default").succeeded);
    ztunnel.end();
}

#[test]
fn listed_namespaces_never_ask_and_never_wait() {
    let node = Node::new();
    for namespace in ["kube-system", "istio-system"] {
        assert_eq!(node.call("ADD", namespace).output, Some(node.conf()["prevResult"].clone()), "{namespace}");
        assert!(node.call("CHECK", namespace).succeeded);
    }
}

#[test]
fn what_ztunnel_cannot_do_now_is_to_be_tried_again_and_what_it_will_not_is_said() {
    let node = Node::new();
    let ztunnel = node.ztunnel(vec![
        Answer::Later { reason: "the control plane is away".into() },
        Answer::Refused { reason: "the host's namespace".into() },
    ]);
    let later = node.call("ADD", "shop");
    assert_eq!(code_of(&later), 11);
    assert!(later.output.unwrap()["details"].as_str().unwrap().contains("away"));
    assert_eq!(code_of(&node.call("ADD", "shop")), 100);
    ztunnel.end();
}

#[test]
fn without_a_ztunnel_the_last_word_on_the_namespace_decides() {
    let node = Node::new();
    assert_eq!(code_of(&node.call("ADD", "batch")), 11, "never heard of");
    namespaces::Namespaces::open(&node.dir.path().join("namespaces.json")).note_outside("batch");
    assert!(node.call("ADD", "batch").succeeded);
    assert_eq!(code_of(&node.call("ADD", "shop")), 11);
}

#[test]
fn a_ztunnel_that_is_just_being_replaced_is_waited_for() {
    let node = Node::new();
    let listener = wire::listen(&node.socket()).unwrap();
    let plugin = std::thread::scope(|scope| {
        let call = scope.spawn(|| node.call("ADD", "shop"));
        // Takes the connection and ends without an answer.
        drop(accept(&listener));
        drop(listener);
        std::fs::remove_file(node.socket()).unwrap();
        let successor = node.ztunnel(vec![Answer::Enrolled]);
        let outcome = call.join().unwrap();
        successor.end();
        outcome
    });
    assert!(plugin.succeeded, "{plugin:?}");
}

#[test]
fn del_never_fails() {
    let node = Node::new();
    let silent = Outcome { output: None, succeeded: true };
    assert_eq!(node.call("DEL", "shop"), silent, "no ztunnel");
    assert_eq!(call(&environment("DEL", ""), b"{"), silent, "no configuration");
    let mut gone = environment("DEL", "");
    gone.insert("CNI_NETNS".into(), "/nowhere".into());
    let ztunnel = node.ztunnel(vec![Answer::Done, Answer::Refused { reason: "x".into() }]);
    assert_eq!(call(&gone, node.conf().to_string().as_bytes()), silent, "no namespace");
    assert_eq!(node.call("DEL", "shop"), silent, "whatever ztunnel says");
    let asked = ztunnel.end();
    assert_eq!(asked.iter().map(|(_, file)| *file).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn check_says_whether_the_pod_is_captured() {
    let node = Node::new();
    let ztunnel = node.ztunnel(vec![Answer::Enrolled, Answer::Refused { reason: "no".into() }]);
    assert!(node.call("CHECK", "shop").succeeded);
    assert_eq!(code_of(&node.call("CHECK", "shop")), 100);
    assert!(ztunnel.end().iter().all(|(request, file)| matches!(request, Request::Check { .. }) && *file));
}

#[test]
fn status_is_ztunnels_unless_the_configuration_says_otherwise() {
    let node = Node::new();
    assert_eq!(code_of(&node.call("STATUS", "")), 50);
    let ztunnel = node.ztunnel(vec![Answer::Done, Answer::Later { reason: "starting".into() }]);
    assert_eq!(node.call("STATUS", ""), Outcome { output: None, succeeded: true });
    assert_eq!(code_of(&node.call("STATUS", "")), 50);
    ztunnel.end();
    let mut conf = node.conf();
    conf["status"] = "plugin".into();
    assert!(node.call_with("STATUS", "", &conf).succeeded);
}

#[test]
fn gc_names_what_is_left() {
    let node = Node::new();
    let ztunnel = node.ztunnel(vec![Answer::Done]);
    let mut conf = node.conf();
    assert_eq!(code_of(&node.call_with("GC", "", &conf)), 7, "without the list everything would go");
    conf["cni.dev/valid-attachments"] = json!([{"containerID": "c2", "ifname": "eth0"}]);
    assert!(node.call_with("GC", "", &conf).succeeded);
    let valid = vec![Attachment { container: "c2".into(), interface: "eth0".into() }];
    assert_eq!(ztunnel.end(), [(Request::Gc { valid }, false)]);
}

#[test]
fn tells_its_versions() {
    let answer = |input: &str| call(&environment("VERSION", ""), input.as_bytes()).output.unwrap();
    assert_eq!(answer(r#"{"cniVersion":"1.0.0"}"#)["cniVersion"], "1.0.0");
    assert_eq!(answer("")["cniVersion"], "1.1.0");
    assert_eq!(answer("")["supportedVersions"], json!(VERSIONS));
    let node = Node::new();
    let mut conf = node.conf();
    conf["cniVersion"] = "9.0.0".into();
    assert_eq!(code_of(&node.call_with("ADD", "kube-system", &conf)), 1);
    conf["cniVersion"] = "0.4.0".into();
    assert_eq!(node.call_with("ADD", "kube-system", &conf).output.unwrap()["cniVersion"], "0.4.0");
}

#[test]
fn says_what_is_wrong_with_a_call() {
    let node = Node::new();
    let conf = node.conf().to_string();
    let with = |arguments: &str| call(&environment("ADD", arguments), conf.as_bytes());
    assert!(with("").succeeded, "no pod of Kubernetes");
    assert_eq!(code_of(&with("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0")), 4, "no UID to know the pod by");
    assert_eq!(code_of(&call(&environment("DANCE", ""), conf.as_bytes())), 4);
    assert_eq!(code_of(&call(&environment("ADD", ""), b"{")), 6);
    assert_eq!(code_of(&call(&BTreeMap::new(), conf.as_bytes())), 4);
    let mut first = node.conf();
    first.as_object_mut().unwrap().remove("prevResult");
    assert_eq!(code_of(&node.call_with("ADD", "shop", &first)), 7, "it is not chained");
    let mut bare = node.conf();
    bare["prevResult"]["ips"] = json!([]);
    assert_eq!(code_of(&node.call_with("ADD", "shop", &bare)), 7, "no address");
}
