//! The checked-in types are what the schemas say. `UPDATE_GOLDEN=1 cargo test -p mesh-proto` rewrites them.

use std::path::Path;

const SCHEMAS: [&str; 8] = [
    "envoy/ads.proto",
    "istio/workload.proto",
    "istio/authorization.proto",
    "istio/ca.proto",
    "istio/zds.proto",
    "mesh/enrolment.proto",
    "mesh/replica.proto",
    "mesh/waypoint.proto",
];

#[test]
fn generated_types_match_the_schemas() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(SCHEMAS, [root.join("schemas")]).expect("schemas compile");
    let fresh = tempfile::tempdir().expect("temporary directory");
    tonic_prost_build::configure()
        .btree_map(".")
        .bytes(".")
        .emit_rerun_if_changed(false)
        .out_dir(fresh.path())
        .compile_fds(descriptors)
        .expect("code generation");
    let checked_in = root.join("src/generated");
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(fresh.path()).expect("generated files") {
        let path = entry.expect("entry").path();
        let name = path.file_name().expect("file name").to_owned();
        let new = std::fs::read_to_string(&path).expect("read");
        let target = checked_in.join(&name);
        if update {
            std::fs::write(&target, &new).expect("write");
        }
        let old = std::fs::read_to_string(&target).unwrap_or_default();
        assert!(old == new, "{name:?} is stale: run UPDATE_GOLDEN=1 cargo test -p mesh-proto");
        names.push(name);
    }
    for entry in std::fs::read_dir(&checked_in).expect("checked-in files") {
        let name = entry.expect("entry").file_name();
        assert!(names.contains(&name), "{name:?} is no longer generated: remove it");
    }
}
