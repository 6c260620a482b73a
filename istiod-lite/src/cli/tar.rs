//! As much of the tar format (POSIX ustar) as an archive of small files needs.

use std::io::{self, Write};

/// What everything is padded to.
const BLOCK: usize = 512;
/// The two parts that a header has for a name.
const NAME: usize = 100;
const PREFIX: usize = 155;

/// An archive as it is written.
pub struct Archive<W> {
    out: W,
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Adds a file.
    ///
    /// # Errors
    /// A name that the format has no room for, or whatever is written to.
    pub fn file(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.out.write_all(&header(name, content.len() as u64)?)?;
        self.out.write_all(content)?;
        let over = content.len() % BLOCK;
        self.out.write_all(&[0; BLOCK][..if over == 0 { 0 } else { BLOCK - over }])
    }

    /// Ends it, and gives back what it was written to.
    ///
    /// # Errors
    /// Of whatever is written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }
}

fn header(name: &str, length: u64) -> io::Result<[u8; BLOCK]> {
    let (prefix, name) = split(name).ok_or_else(|| io::Error::other(format!("no room for the name {name}")))?;
    let mut header = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000600\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{length:011o}\0").as_bytes());
    put(136, b"00000000000\0");
    // The checksum is taken over blanks in its own place.
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(345, prefix.as_bytes());
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

/// A long name is cut at a slash.
fn split(name: &str) -> Option<(&str, &str)> {
    if name.len() <= NAME {
        return Some(("", name));
    }
    let (cut, _) = name.rmatch_indices('/').find(|(at, _)| *at <= PREFIX)?;
    let (prefix, rest) = (&name[..cut], &name[cut + 1..]);
    (rest.len() <= NAME).then_some((prefix, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_cut_at_a_slash_and_longer_ones_refused() {
        let long = format!("{}/{}", "d".repeat(150), "f".repeat(100));
        assert_eq!(split(&long).map(|(prefix, rest)| (prefix.len(), rest.len())), Some((150, 100)));
        assert_eq!(split("a/b"), Some(("", "a/b")));
        assert_eq!(split(&"x".repeat(101)), None);
        let mut archive = Archive::new(Vec::new());
        archive.file("a", &[1; 513]).expect("room");
        assert!(archive.file(&"x".repeat(300), b"").is_err());
        assert_eq!(archive.finish().expect("memory").len(), 5 * BLOCK);
    }
}
