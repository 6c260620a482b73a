//! The calls, which are unsafe.

use std::{fs, io, ops::Range};

/// Returns what the allocator keeps of memory that is free: to be called after a burst. The loader does so itself after
/// reading the kernel's type information, which takes a hundred times what stays of it.
pub fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Takes the process' code out of its memory: what is still needed comes back from the page cache as it is used, what
/// only the start needed does not. Code with breakpoints in it (a debugger's, or those of uprobes) stays.
///
/// # Errors
/// When the kernel does not tell what is mapped where (no `/proc`, or built without `smaps`).
pub fn give_back_code() -> io::Result<()> {
    for code in unwritten_code(&fs::read_to_string("/proc/self/smaps")?) {
        // SAFETY: pages of a file that nobody has written to read the same when they come back.
        unsafe { libc::madvise(code.start as *mut libc::c_void, code.len(), libc::MADV_DONTNEED) };
    }
    Ok(())
}

/// The mappings of files that can be run and have no page of their own, as `/proc/PID/smaps` (proc_pid_smaps(5)) has them.
fn unwritten_code(smaps: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut candidate = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next()) {
            (Some("Anonymous:"), Some("0")) => found.extend(candidate.take()),
            (Some("Anonymous:"), _) => candidate = None,
            (Some(addresses), Some("r-xp")) => {
                let is_file = words.nth(3).is_some_and(|path| path.starts_with('/'));
                candidate = is_file.then(|| range(addresses)).flatten();
            }
            _ => {}
        }
    }
    found
}

fn range(addresses: &str) -> Option<Range<usize>> {
    let (start, end) = addresses.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_that_nobody_has_written_to_goes() {
        let smaps = "\
55aa0000-55ab0000 r--p 00000000 fe:00 7                          /usr/bin/ztunnel
Rss:                  64 kB
Anonymous:             0 kB
55ab0000-55b00000 r-xp 00010000 fe:00 7                          /usr/bin/ztunnel
Rss:                 320 kB
Anonymous:             0 kB
55b00000-55b01000 rw-p 00060000 fe:00 7                          /usr/bin/ztunnel
Anonymous:             4 kB
7f000000-7f001000 r-xp 00000000 00:00 0
Anonymous:             0 kB
7f010000-7f020000 r-xp 00001000 fe:00 9                          /usr/lib/libc.so.6
Anonymous:             4 kB
7f030000-7f031000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
";
        let code = 0x55ab_0000..0x55b0_0000;
        assert_eq!(unwritten_code(smaps), [code]);
    }

    /// Everything this test calls afterwards has to come back.
    #[test]
    fn what_goes_comes_back_when_it_is_used() {
        let resident = || {
            let smaps = fs::read_to_string("/proc/self/smaps").expect("a kernel with smaps");
            let mut lines = smaps.lines().skip_while(|line| !line.contains(" r-xp "));
            let rss = lines.find_map(|line| line.strip_prefix("Rss:")).expect("code is somewhere");
            rss.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
        };
        // Of a program this small almost all is used at any time: so all of it is there before.
        for code in unwritten_code(&fs::read_to_string("/proc/self/smaps").expect("a kernel with smaps")) {
            for page in code.step_by(4096) {
                // SAFETY: it is mapped, readable, and nobody writes to it.
                unsafe { std::ptr::read_volatile(page as *const u8) };
            }
        }
        let before = resident();
        give_back_code().expect("a kernel with smaps");
        let after = resident();
        assert!(after < before, "{before} kB, then {after} kB");
        assert_eq!(unwritten_code("nothing of the kind"), []);
    }
}
