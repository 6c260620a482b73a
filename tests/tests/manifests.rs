//! What an API server of Kubernetes refuses in our manifests, and the lab's does not know of.

use std::fs;
use std::path::Path;

use anyhow::Result;

/// Containers that share mounts with the node both ways must be privileged, and ours are not.
#[test]
fn no_container_shares_its_mounts_with_the_node() -> Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    let mut read = 0;
    for folder in [directory.clone(), directory.join("samples")] {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                let text = fs::read_to_string(&path)?;
                let shares = text.lines().any(|line| line.trim() == "mountPropagation: Bidirectional");
                assert!(!shares || text.contains("privileged: true"), "{}", path.display());
                read += 1;
            }
        }
    }
    assert!(read > 3, "{read} manifests");
    Ok(())
}
