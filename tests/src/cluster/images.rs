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
    /// Binaries with a tag, by image name: those of one lab, gone with it.
    pub pushed: PathBuf,
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
    /// Looks an image up by the last part of its name without tag or digest. Only a binary of ours that was given a tag
    /// ([`Images::push`]) is told apart by it.
    ///
    /// # Errors
    /// The message a kubelet would give for an image it cannot pull.
    pub fn find(&self, image: &str) -> Result<Image, String> {
        let full = image.rsplit('/').next().unwrap_or(image);
        let name = full.split(['@', ':']).next().unwrap_or(full);
        match name {
            "ztunnel" | "istiod-lite" | "waypoint" => match self.pushed.join(full) {
                pushed if full != name && pushed.exists() => Ok(program(name, pushed)),
                _ => self.built(name),
            },
            "bench" => {
                let bench = self.built(name)?;
                Ok(Image { arguments: vec!["serve".into()], ..bench })
            }
            "nginx" => self.nginx(),
            "curl" => Ok(Image {
                entrypoint: Vec::new(),
                arguments: vec!["sleep".into(), "infinity".into()],
                programs: Vec::new(),
                binds: Vec::new(),
                directories: Vec::new(),
            }),
            _ => Err(format!(
                "the lab has no image {image}: it knows ztunnel, istiod-lite, waypoint, bench, nginx, curl"
            )),
        }
    }

    fn built(&self, name: &str) -> Result<Image, String> {
        Ok(program(name, present(self.binaries.join(name))?))
    }

    /// Makes a binary available as `NAME:TAG`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn push(&self, image: &str, binary: &[u8]) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.pushed)?;
        let path = self.pushed.join(image);
        std::fs::write(&path, binary)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
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

fn program(name: &str, path: PathBuf) -> Image {
    Image {
        entrypoint: vec![name.to_owned()],
        arguments: Vec::new(),
        programs: vec![(name.to_owned(), path)],
        binds: Vec::new(),
        directories: Vec::new(),
    }
}

fn present(path: PathBuf) -> Result<PathBuf, String> {
    if Path::exists(&path) {
        return Ok(path);
    }
    Err(format!("{} is missing: run `cargo xtask setup` and `cargo xtask build`", path.display()))
}
