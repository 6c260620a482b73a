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

/// What the main CNI writes as a list of its own where ours was.
fn other_list() -> String {
    LIST.replace("bridge", "ptp")
}

#[test]
fn a_list_that_the_main_cni_has_put_in_place_of_ours_outlives_the_plugin() {
    for is_installed in [false, true] {
        let node = Node::new();
        node.write("10-main.conf", SINGLE);
        node.install();
        node.write("10-main.conflist", &other_list());
        if is_installed {
            node.install();
            assert!(node.has_plugin("10-main.conflist"));
        }
        uninstall(&node.directories).unwrap();
        let left = BTreeMap::from([("10-main.conflist".to_owned(), other_list())]);
        assert_eq!(node.state(), (left, false), "with the plugin in it: {is_installed}");
    }
}

#[test]
fn a_list_that_is_not_ours_is_not_written_over() {
    let node = Node::new();
    node.write("10-main.conf", SINGLE);
    node.write("10-main.conflist", &other_list());
    let before = node.state().0;
    let refused = install(&node.directories, &ours()).unwrap_err().to_string();
    assert!(refused.contains("10-main.conf:") && refused.contains("not ours"), "{refused}");
    assert_eq!(node.state().0, before);
    // Nor when a plugin is in it that was added to a list of the main CNI's own.
    fs::remove_file(node.directories.conf.join("10-main.conf")).unwrap();
    node.install();
    node.write("10-main.conf", SINGLE);
    let before = node.state().0;
    install(&node.directories, &ours()).unwrap_err();
    assert_eq!(node.state().0, before);
    uninstall(&node.directories).unwrap();
    assert_eq!(node.state().0["10-main.conflist"], other_list());
}

#[test]
fn a_list_of_ours_is_made_anew_from_what_its_owner_has_written_anew() {
    let node = Node::new();
    node.write("10-main.conf", SINGLE);
    node.install();
    let (anew, list) = (SINGLE.replace("bridge", "ptp"), node.directories.conf.join("10-main.conflist"));
    node.write("10-main.conf", &anew);
    node.install();
    assert!(conflist::is_made_of(&read(&list).unwrap(), &anew) && node.has_plugin("10-main.conflist"));
    // As if ztunnel had ended before the list's origin was out of the way.
    fs::remove_file(node.directories.conf.join(format!("10-main.conf{SAVED}"))).unwrap();
    node.write("10-main.conf", &anew);
    node.install();
    uninstall(&node.directories).unwrap();
    assert_eq!(node.state().0, BTreeMap::from([("10-main.conf".to_owned(), anew)]));
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

#[test]
fn a_fight_gets_slower_is_told_once_and_ends_with_a_calm() {
    let (start, mut fight) = (Instant::now(), Fight::default());
    let (mut now, mut told, mut pauses) = (start, 0, Vec::new());
    for _ in 0..40 {
        let pause = fight.wrote(now);
        told += u32::from(fight.has_just_begun());
        pauses.push(pause);
        // The other one answers at once.
        now += pause;
    }
    assert_eq!(pauses[..4], [SETTLE; 4], "a main CNI that is being installed");
    assert_eq!(pauses[4..7], [SETTLE * 2, SETTLE * 4, SETTLE * 8]);
    assert_eq!((pauses[39], told), (LONGEST_PAUSE, 1));
    assert_eq!(fight.wrote(now + LONGEST_PAUSE + CALM * 2), SETTLE, "a calm");
}

#[tokio::test]
async fn who_takes_the_plugin_out_whenever_it_is_there_is_answered_ever_later() {
    let node = Node::new();
    let (end, drain) = drain::channel();
    let task = tokio::spawn(run(node.directories.clone(), ours(), drain));
    let start = Instant::now();
    for _ in 0..FIGHT + 3 {
        node.write("10-main.conflist", LIST);
        node.eventually("10-main.conflist").await;
    }
    // The pauses after the last rewrites that had one before them; the others are short.
    assert!(start.elapsed() >= SETTLE * (2 + 4 + 8), "{:?}", start.elapsed());
    end.drain(Duration::ZERO).await;
    task.await.unwrap();
}
