use std::collections::BTreeMap;

use mesh::drain;

use super::*;

const LIST: &str = "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"main\",\n  \"plugins\": [\n    {\n      \"type\": \"bridge\"\n    }\n  ]\n}\n";
const SINGLE: &str = r#"{"cniVersion":"1.0.0","name":"main","type":"bridge"}"#;

struct Node {
    root: tempfile::TempDir,
    directories: Directories,
}

impl Node {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories { bin: root.path().join("bin"), conf: root.path().join("net.d") };
        fs::create_dir(&directories.bin).unwrap();
        fs::create_dir(&directories.conf).unwrap();
        Self { root, directories }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.directories.conf.join(name), text).unwrap();
    }

    fn install(&self) {
        install(&self.directories, &ours()).unwrap();
    }

    /// Name → content of every file, and whether the program is there.
    fn state(&self) -> (BTreeMap<String, String>, bool) {
        let conf = &self.directories.conf;
        let files = names(conf).unwrap().into_iter().map(|name| (name.clone(), read(&conf.join(name)).unwrap()));
        (files.collect(), self.directories.bin.join(NAME).exists())
    }

    fn has_plugin(&self, name: &str) -> bool {
        self.state().0.get(name).is_some_and(|text| text.contains(NAME))
    }

    async fn eventually(&self, name: &str) {
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        while !self.has_plugin(name) || !self.directories.bin.join(NAME).exists() {
            assert!(tokio::time::Instant::now() < end, "not in {name}: {:?}", self.state());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn ours() -> Value {
    entry(Path::new("/run/z/cni.sock"), Path::new("/lib/z/namespaces.json"), &["kube-system".to_owned()])
}

#[test]
fn what_was_installed_is_taken_out_without_a_trace() {
    for (name, text, changed) in
        [("10-main.conflist", LIST, "10-main.conflist"), ("10-main.conf", SINGLE, "10-main.conflist")]
    {
        let node = Node::new();
        node.write(name, text);
        node.write("99-loopback.conf", r#"{"cniVersion":"1.0.0","type":"loopback"}"#);
        node.write("notes.txt", "mine");
        let before = node.state();
        node.install();
        node.install();
        assert!(node.has_plugin(changed) && node.state().1);
        assert!(!node.has_plugin("99-loopback.conf"), "only the one that runtimes take");
        let first = conflist::in_order(node.state().0.into_keys().collect()).remove(0);
        assert_eq!(first, changed, "it is the one that runtimes take");
        uninstall(&node.directories).unwrap();
        assert_eq!(node.state(), before);
        uninstall(&node.directories).unwrap();
    }
}

#[test]
fn a_configuration_that_was_written_anew_meanwhile_is_kept() {
    let node = Node::new();
    node.write("10-main.conf", SINGLE);
    node.install();
    node.write("10-main.conf", &SINGLE.replace("bridge", "ptp"));
    uninstall(&node.directories).unwrap();
    assert_eq!(node.state().0, BTreeMap::from([("10-main.conf".to_owned(), SINGLE.replace("bridge", "ptp"))]));
}

#[test]
fn the_mode_of_a_configuration_stays() {
    use std::os::unix::fs::PermissionsExt as _;
    let node = Node::new();
    node.write("10-main.conflist", LIST);
    let path = node.directories.conf.join("10-main.conflist");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    node.install();
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(&node.directories.bin.join(NAME)), 0o755);
}

#[test]
fn uninstalling_where_nothing_is_installed_is_fine() {
    let node = Node::new();
    node.write("10-main.conflist", LIST);
    node.write("11-broken.conflist", "{");
    let before = node.state();
    uninstall(&node.directories).unwrap();
    assert_eq!(node.state(), before);
    let nowhere = Directories { bin: node.root.path().join("x"), conf: node.root.path().join("y") };
    uninstall(&nowhere).unwrap();
}

#[tokio::test]
async fn comes_back_whatever_the_main_cni_does() {
    let node = Node::new();
    let (end, drain) = drain::channel();
    let task = tokio::spawn(run(node.directories.clone(), ours(), drain));
    // There is none yet, and then there is.
    node.write("10-main.conflist", LIST);
    node.eventually("10-main.conflist").await;
    // Rewritten in place.
    node.write("10-main.conflist", LIST);
    node.eventually("10-main.conflist").await;
    // Moved in from elsewhere.
    let fresh = node.root.path().join("fresh");
    fs::write(&fresh, LIST).unwrap();
    fs::rename(&fresh, node.directories.conf.join("10-main.conflist")).unwrap();
    node.eventually("10-main.conflist").await;
    // Another one that runtimes prefer.
    node.write("05-other.conf", SINGLE);
    node.eventually("05-other.conflist").await;
    // Broken, then mended.
    node.write("05-other.conflist", "{");
    node.write("05-other.conflist", LIST);
    node.eventually("05-other.conflist").await;
    // Programs are put there anew, without ours.
    fs::remove_file(node.directories.bin.join(NAME)).unwrap();
    node.eventually("05-other.conflist").await;
    end.drain(Duration::ZERO).await;
    task.await.unwrap();
    assert!(node.has_plugin("05-other.conflist"), "the end of a ztunnel takes nothing away");
}
