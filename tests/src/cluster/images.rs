//! What an image name means on a machine without containers: a host program and the files around it.

use std::path::{Path, PathBuf};

use crate::container::Bind;

/// Where the programs of images are found.
#[derive(Clone, Debug)]
pub struct Images {
    /// Directory of the built binaries.
    pub binaries: PathBuf,
    /// Directory with unpacked tools (`nginx/usr/sbin/nginx`).
    pub tools: PathBuf,
}

/// An image, in a container runtime's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub entrypoint: Vec<String>,
    /// Arguments where the container gives none.
    pub arguments: Vec<String>,
    pub programs: Vec<(String, PathBuf)>,
    pub binds: Vec<Bind>,
    pub directories: Vec<PathBuf>,
}

impl Images {
    /// Looks an image up by the last part of its name without tag or digest.
    ///
    /// # Errors
    /// The message a kubelet would give for an image it cannot pull.
    pub fn find(&self, image: &str) -> Result<Image, String> {
        let name = image.rsplit('/').next().unwrap_or(image);
        let name = name.split(['@', ':']).next().unwrap_or(name);
        match name {
            "ztunnel" | "istiod-lite" | "waypoint" => self.built(name),
            "nginx" => self.nginx(),
            "curl" => Ok(Image {
                entrypoint: Vec::new(),
                arguments: vec!["sleep".into(), "infinity".into()],
                programs: Vec::new(),
                binds: Vec::new(),
                directories: Vec::new(),
            }),
            _ => Err(format!("the lab has no image {image}: it knows ztunnel, istiod-lite, waypoint, nginx, curl")),
        }
    }

    fn built(&self, name: &str) -> Result<Image, String> {
        let mut programs = vec![(name.to_owned(), present(self.binaries.join(name))?)];
        // It lies beside ztunnel in the real image too, which can do without it.
        let plugin = self.binaries.join("ztunnel-cni");
        if name == "ztunnel" && plugin.exists() {
            programs.push(("ztunnel-cni".to_owned(), plugin));
        }
        Ok(Image {
            entrypoint: vec![name.to_owned()],
            arguments: Vec::new(),
            programs,
            binds: Vec::new(),
            directories: Vec::new(),
        })
    }

    fn nginx(&self) -> Result<Image, String> {
        let root = self.tools.join("nginx");
        let program = present(root.join("usr/sbin/nginx"))?;
        Ok(Image {
            entrypoint: vec!["nginx".into()],
            arguments: vec!["-g".into(), "daemon off;".into()],
            programs: vec![("nginx".into(), program)],
            // Copied by file, so that a ConfigMap can be mounted over one of them.
            binds: vec![Bind::new(root.join("etc/nginx/mime.types"), "/etc/nginx/mime.types")],
            directories: ["/etc/nginx", "/var/lib/nginx", "/var/log/nginx"].map(PathBuf::from).to_vec(),
        })
    }
}

fn present(path: PathBuf) -> Result<PathBuf, String> {
    if Path::exists(&path) {
        return Ok(path);
    }
    Err(format!("{} is missing: run `cargo xtask setup` and `cargo xtask build`", path.display()))
}
