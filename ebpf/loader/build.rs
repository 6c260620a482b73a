//! Finds the compiled kernel programs and puts them where `src/lib.rs` embeds them.
//!
//! A checkout without them still builds: the embedded object is then empty, and the loader says so at start.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo:rerun-if-env-changed=EBPF_OBJECT");
    let object = match env::var_os("EBPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        None => default_object(),
    };
    // A path that does not exist would make cargo run this for every build; its directory does not.
    let watched = if object.exists() { object.as_path() } else { object.parent().unwrap_or(Path::new(".")) };
    println!("cargo:rerun-if-changed={}", watched.display());

    let bytes = fs::read(&object).unwrap_or_default();
    if bytes.is_empty() && env::var_os("EBPF_OBJECT").is_some() {
        panic!("EBPF_OBJECT={} is missing or empty", object.display());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("ebpf-programs.o");
    fs::write(&out, bytes).unwrap_or_else(|error| panic!("writing {}: {error}", out.display()));
}

/// Where `cargo xtask bpf` writes, independent of `CARGO_TARGET_DIR`.
fn default_object() -> PathBuf {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let directory = manifest.join("../../target/bpf");
    // Made so that there is something to watch; where it cannot be, the cost is a rebuild, not an error.
    let _ = fs::create_dir_all(&directory);
    directory.join("ebpf-programs.o")
}
