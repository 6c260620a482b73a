use mesh::drain::{self, DrainTrigger};

use super::*;

/// A ztunnel without a control plane, and with the manager's end of the orders, which nobody reads.
struct Node {
    dir: tempfile::TempDir,
    desired: watch::Sender<Desired>,
    readiness: Readiness,
    end: DrainTrigger,
    task: tokio::task::JoinHandle<()>,
}

impl Node {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (desired, seen) = watch::channel(Desired::default());
        let (orders, _) = crate::node::orders::channel();
        let readiness = Readiness::default();
        let finder = Finder::new(Path::new("/proc"), Path::new("/sys/fs/cgroup"), None).unwrap();
        let deps = Deps {
            orders,
            desired: seen,
            registry: Arc::new(Registry::default()),
            finder,
            control_plane: None,
            namespaces: Namespaces::open(&dir.path().join("namespaces.json")),
            readiness: readiness.clone(),
        };
        let (end, drain) = drain::channel();
        let listener = Listener::bind(&dir.path().join("cni.sock")).unwrap();
        let task = tokio::spawn(run(listener, deps, drain));
        Self { dir, desired, readiness, end, task }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("cni.sock")
    }

    /// As a plugin, handing over our own namespace.
    async fn ask(&self, request: Request) -> Answer {
        let path = self.socket();
        tokio::task::spawn_blocking(move || {
            let socket = wire::connect(&path, Duration::from_secs(10)).unwrap();
            let file = fs::File::open("/proc/self/ns/net").unwrap();
            wire::send(socket.as_fd(), &wire::encode(request).unwrap(), Some(file.as_fd())).unwrap();
            wire::decode(&wire::receive(socket.as_fd()).unwrap().0).unwrap()
        })
        .await
        .unwrap()
    }

    async fn add(&self, namespace: &str) -> Answer {
        let attachment = Attachment { container: "c1".into(), interface: "eth0".into() };
        let pod = PodName { uid: "u1".into(), namespace: namespace.into(), name: "web".into() };
        self.ask(Request::Add { attachment, pod, addresses: vec!["10.0.0.1".parse().unwrap()] }).await
    }

    async fn stop(self) -> tempfile::TempDir {
        self.end.drain(Duration::ZERO).await;
        self.task.await.unwrap();
        self.dir
    }
}

/// Only root may ask, so these tests say nothing to others.
fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[tokio::test]
async fn others_than_root_are_not_heard() {
    let node = Node::start();
    if is_root() {
        assert_eq!(node.ask(Request::Gc { valid: Vec::new() }).await, Answer::Done);
    } else {
        let path = node.socket();
        let answer = tokio::task::spawn_blocking(move || {
            let socket = wire::connect(&path, Duration::from_secs(10)).unwrap();
            wire::send(socket.as_fd(), &wire::encode(Request::Status).unwrap(), None).unwrap();
            wire::receive(socket.as_fd())
        });
        assert!(answer.await.unwrap().is_err());
    }
    node.stop().await;
}

#[tokio::test]
async fn a_silent_control_plane_leaves_the_last_word_or_none() {
    if !is_root() {
        return;
    }
    let node = Node::start();
    assert!(matches!(node.add("default").await, Answer::Later { .. }), "never heard of");
    Namespaces::open(&node.dir.path().join("namespaces.json")).note_outside("default");
    let dir = node.stop().await;
    let text = fs::read_to_string(dir.path().join("namespaces.json")).unwrap();
    assert!(text.contains("default"), "{text}");
}

#[tokio::test]
async fn what_is_pushed_decides() {
    if !is_root() {
        return;
    }
    let node = Node::start();
    node.desired.send_modify(|desired| desired.complete = true);
    assert_eq!(node.add("default").await, Answer::Outside);
    node.desired.send_modify(|desired| {
        let pod = mesh_proto::enrolment::PodEnrolment {
            uid: "u1".into(),
            name: "web".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            workload_uid: "c//Pod/shop/web".into(),
            ..Default::default()
        };
        desired.pods.insert("u1".into(), Enrolment::try_from(pod).unwrap());
    });
    let Answer::Refused { reason } = node.add("shop").await else { panic!("our own namespace was taken") };
    assert!(reason.contains("the node's own"), "{reason}");
    node.stop().await;
}

#[tokio::test]
async fn status_is_readiness() {
    if !is_root() {
        return;
    }
    let node = Node::start();
    let pending = node.readiness.pending("pods");
    assert!(matches!(node.ask(Request::Status).await, Answer::Later { .. }));
    drop(pending);
    assert_eq!(node.ask(Request::Status).await, Answer::Done);
    node.stop().await;
}

#[tokio::test]
async fn the_newest_has_the_path_and_the_older_one_leaves_it_alone() {
    let old = Node::start();
    let path = old.socket();
    let new = Listener::bind(&path).unwrap();
    let _dir = old.stop().await;
    assert!(path.exists());
    let client = tokio::task::spawn_blocking({
        let path = path.clone();
        move || wire::connect(&path, Duration::from_secs(10)).unwrap()
    });
    new.accept().await.unwrap();
    client.await.unwrap();
    drop(new);
    assert!(!path.exists(), "plugins see at once that nobody is here");
}
