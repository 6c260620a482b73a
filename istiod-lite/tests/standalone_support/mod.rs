//! An API server in a process of its own, and kubectl to talk to it.
#![allow(dead_code, reason = "each test crate uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(20);

/// Repeats `probe` until it gives something; panics at the deadline.
pub fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// As [`eventually`], for probes that wait on the network.
pub async fn eventually_async<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The definitions that users apply, as `kubectl apply -f manifests/crds/` takes them.
pub fn crds() -> Vec<Value> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/crds");
    let paths = std::fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
    let manifests = paths.filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    let texts = manifests.map(|path| std::fs::read_to_string(path).expect("a manifest"));
    texts.flat_map(|text| serde_saphyr::from_multiple::<Value>(&text).expect("YAML")).collect()
}

/// What runs beside the API server in its process.
pub enum Beside {
    Nothing,
    /// The control plane, with these settings.
    ControlPlane(Vec<(&'static str, String)>),
}

/// A server on a port of its own; killed and its data removed on drop.
pub struct Server {
    dir: tempfile::TempDir,
    child: Child,
}

impl Server {
    pub fn start() -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_istiod-lite")))
    }

    pub fn start_beside(what: &Beside) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let child = spawn(dir.path(), Command::new(env!("CARGO_BIN_EXE_istiod-lite")), what);
        let mut server = Self { dir, child };
        server.wait_ready();
        server
    }

    /// Starts with `command`, which ends in running the server's binary (given as its last arguments).
    pub fn start_by(command: Command) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let child = spawn(dir.path(), command, &Beside::Nothing);
        let mut server = Self { dir, child };
        server.wait_ready();
        server
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// SIGKILL, then a new process on the same data.
    pub fn kill_and_restart(&mut self) {
        self.kill_and_restart_beside(&Beside::Nothing);
    }

    /// As [`Self::kill_and_restart`], beside something else.
    pub fn kill_and_restart_beside(&mut self, what: &Beside) {
        self.kill();
        self.restart_beside(what);
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("the killed server ends");
        std::fs::remove_file(self.kubeconfig()).expect("the old kubeconfig");
    }

    /// A new process on the data of one that was killed.
    pub fn restart_beside(&mut self, what: &Beside) {
        self.child = spawn(self.dir.path(), Command::new(env!("CARGO_BIN_EXE_istiod-lite")), what);
        self.wait_ready();
    }

    /// Bounds the size of files the server may write, in bytes or `unlimited`; beyond it writes fail as on a full disk.
    pub fn limit_file_size(&self, limit: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={limit}:unlimited")]).status();
        assert!(status.expect("prlimit").success());
    }

    fn wait_ready(&mut self) {
        let kubeconfig = self.kubeconfig();
        eventually("a kubeconfig", || {
            let ended = self.child.try_wait().expect("the state of the server");
            assert!(ended.is_none(), "the server ended: {ended:?}");
            kubeconfig.exists().then_some(())
        });
    }

    /// Settings of the administrator's client.
    pub async fn config(&self) -> kube::Config {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig()).expect("a kubeconfig");
        kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .expect("a usable kubeconfig")
    }

    pub async fn client(&self) -> kube::Client {
        kube::Client::try_from(self.config().await).expect("a client")
    }

    /// A client with another bearer token.
    pub async fn client_as(&self, token: &str) -> kube::Client {
        let mut config = self.config().await;
        config.auth_info = kube::config::AuthInfo { token: Some(token.to_owned().into()), ..Default::default() };
        kube::Client::try_from(config).expect("a client")
    }
}

fn spawn(dir: &Path, mut command: Command, beside: &Beside) -> Child {
    command
        .args(["standalone", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(dir.join("data"))
        .arg("--kubeconfig-out")
        .arg(dir.join("kubeconfig"));
    match beside {
        Beside::Nothing => command.arg("--api-only"),
        Beside::ControlPlane(settings) => command.envs(settings.iter().map(|(name, value)| (name, value))),
    };
    command.stdin(Stdio::null()).spawn().expect("the server's binary")
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has seen in another way.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A kubectl binary with a home of its own, so that discovery caches of other servers do not leak in.
pub struct Kubectl {
    binary: PathBuf,
    kubeconfig: PathBuf,
    home: PathBuf,
    /// Whether it is the old one.
    pub is_old: bool,
}

/// What a kubectl run said.
pub struct Said {
    pub ok: bool,
    pub out: String,
    pub err: String,
}

impl Kubectl {
    /// The kubectl versions to test with: (name, binary). Those that are missing are named on stderr.
    pub fn versions() -> Vec<(&'static str, PathBuf)> {
        // Where `cargo xtask setup` puts them: beside the binary under test, wherever the target directory is.
        let tools = Path::new(env!("CARGO_BIN_EXE_istiod-lite")).ancestors().nth(2).expect("a target directory");
        let tools = tools.join("tools");
        let mut found = Vec::new();
        for (name, variable, tool) in [
            ("current", "KUBECTL", tools.join("venv/bin/kubectl")),
            ("1.20", "KUBECTL_OLD", tools.join("kubectl-1.20/usr/bin/kubectl")),
        ] {
            let on_path = (name == "current").then(|| which("kubectl")).flatten();
            let candidates = [std::env::var_os(variable).map(PathBuf::from), Some(tool), on_path];
            match candidates.into_iter().flatten().find(|p| p.is_file()) {
                Some(binary) => found.push((name, binary)),
                None => {
                    let skipped = format!("no {name} kubectl (${variable}, {}, PATH)", tools.display());
                    assert!(std::env::var_os("LAB").is_none_or(|lab| lab != "required"), "{skipped}");
                    eprintln!("SKIPPED: {skipped}; cargo xtask setup installs it");
                }
            }
        }
        found
    }

    pub fn new(server: &Server, name: &str, binary: &Path) -> Self {
        let home = server.dir().join(format!("home-{name}"));
        std::fs::create_dir_all(&home).expect("a home");
        Self { binary: binary.into(), kubeconfig: server.kubeconfig(), home, is_old: name != "current" }
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments.split_whitespace()).env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.home);
        command
    }

    /// Runs with arguments split at blanks.
    pub fn run(&self, arguments: &str) -> Said {
        said(self.command(arguments).stdin(Stdio::null()).output())
    }

    /// Runs and returns what it printed; panics if it failed.
    pub fn ok(&self, arguments: &str) -> String {
        let said = self.run(arguments);
        assert!(said.ok, "kubectl {arguments}: {}", said.err);
        said.out
    }

    /// Runs with `input` on stdin.
    pub fn with_input(&self, arguments: &str, input: &str) -> Said {
        use std::io::Write as _;
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("kubectl reads its input");
        said(child.wait_with_output())
    }

    /// Applies a manifest; panics if that failed.
    pub fn apply(&self, manifest: &str) -> String {
        let said = self.with_input("apply -f -", manifest);
        assert!(said.ok, "kubectl apply: {}", said.err);
        said.out
    }

    /// Starts it in the background with its output piped.
    pub fn start(&self, arguments: &str) -> Child {
        self.command(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("kubectl starts")
    }
}

fn said(output: std::io::Result<Output>) -> Said {
    let output = output.expect("kubectl runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Said { ok: output.status.success(), out: text(output.stdout), err: text(output.stderr) }
}

fn which(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|p| p.is_file())
}
