//! The sysctls that capture needs in a pod's namespace: held open, so that looking costs no change of namespace.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::netns::Netns;
use super::routing::RoutingError;

/// They let the application's answers on the last leg carry the mark of the request, so that they come back over lo: the
/// first those of accepted sockets (it serves IPv6 as well), the others the resets of ports nobody listens on.
///
/// The place in this list is the bit in [`Sysctls::found`], which outlives this process: append only.
const NAMES: [&str; 3] = ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"];

/// The open files of one namespace, in the order of [`NAMES`]; `None` where the kernel has no IPv6.
#[derive(Debug)]
pub struct Sysctls([Option<File>; 3]);

impl Sysctls {
    /// # Errors
    /// When one that must be there cannot be opened.
    pub fn open(netns: &Netns, proc_root: &Path) -> Result<Self, RoutingError> {
        let mut files = [const { None }; 3];
        for (file, name) in files.iter_mut().zip(NAMES) {
            let path = proc_root.join("sys/net").join(name);
            // Where it cannot be written it may still be as it should.
            let open = || File::options().read(true).write(true).open(&path).or_else(|_| File::open(&path));
            match netns.enter(open) {
                Ok(found) => *file = Some(found),
                Err(error) if error.kind() == io::ErrorKind::NotFound && name.starts_with("ipv6") => {}
                Err(source) => return Err(RoutingError::Sysctl { name, source }),
            }
        }
        Ok(Self(files))
    }

    /// Those that are set, one bit each.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn found(&self) -> Result<u32, RoutingError> {
        self.each().try_fold(0, |bits, (bit, name, file)| {
            let set = is_set(file).map_err(|source| RoutingError::Sysctl { name, source })?;
            Ok(if set { bits | bit } else { bits })
        })
    }

    /// Is everything as capture needs it? What cannot be read is not.
    #[must_use]
    pub fn are_set(&self) -> bool {
        self.each().all(|(_, _, file)| is_set(file).unwrap_or(false))
    }

    /// Sets those that are not; true when there were any.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn set(&self) -> Result<bool, RoutingError> {
        self.write(|_| true)
    }

    /// Sets each to what [`Self::found`] said.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn restore(&self, found: u32) -> Result<(), RoutingError> {
        self.write(|bit| found & bit != 0).map(drop)
    }

    fn write(&self, wanted: impl Fn(u32) -> bool) -> Result<bool, RoutingError> {
        self.each().try_fold(false, |changed, (bit, name, file)| {
            let failed = |source| RoutingError::Sysctl { name, source };
            if is_set(file).map_err(failed)? == wanted(bit) {
                return Ok(changed);
            }
            let value: &[u8] = if wanted(bit) { b"1" } else { b"0" };
            file.write_all_at(value, 0).map_err(failed)?;
            Ok(true)
        })
    }

    fn each(&self) -> impl Iterator<Item = (u32, &'static str, &File)> {
        let named = self.0.iter().zip(NAMES).enumerate();
        named.filter_map(|(place, (file, name))| Some((1 << place, name, file.as_ref()?)))
    }
}

fn is_set(file: &File) -> io::Result<bool> {
    let mut value = [0; 2];
    file.read_at(&mut value, 0)?;
    Ok(value[0] != b'0')
}
