//! What went wrong in a test run, said once more at its end: a test of the lab logs more than a CI system keeps.

use std::io::{BufRead, BufReader, Read, Write};

/// Lines of one panic that are worth saying twice.
const LINES: usize = 12;

/// Passes on what tests say, and returns the panics in it.
///
/// # Errors
/// When it cannot be read, or not be passed on.
pub fn pass_on(said: impl Read, mut to: impl Write) -> std::io::Result<Vec<String>> {
    let mut said = BufReader::new(said);
    let mut panics: Vec<String> = Vec::new();
    let mut more = 0;
    let mut line = Vec::new();
    while said.read_until(b'\n', &mut line)? > 0 {
        to.write_all(&line)?;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if text.starts_with("thread '") && text.contains(" panicked at ") {
            panics.push(text.to_owned());
            more = LINES;
        } else if text.is_empty() || text.starts_with("note: ") || text == "stack backtrace:" {
            more = 0;
        } else if let (1.., Some(panic)) = (more, panics.last_mut()) {
            panic.push('\n');
            panic.push_str(text);
            more -= 1;
        }
        line.clear();
    }
    Ok(panics)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_picked_with_what_they_say_and_nothing_else() {
        let said = "running 2 tests\n\
            ---- a stdout ----\n\
            \n\
            thread 'a' (7) panicked at src/a.rs:1:2:\n\
            assertion `left == right` failed\n  left: 1\n right: 2\n\
            note: run with `RUST_BACKTRACE=1`\n\
            --- log\nof much\n\n\
            thread '<unnamed>' panicked at src/b.rs:3:4:\nno \n\n\
            failures:\n";
        let mut passed = Vec::new();
        let panics = pass_on(said.as_bytes(), &mut passed).expect("readable");
        assert_eq!(passed, said.as_bytes());
        assert_eq!(
            panics,
            [
                "thread 'a' (7) panicked at src/a.rs:1:2:\nassertion `left == right` failed\n  left: 1\n right: 2",
                "thread '<unnamed>' panicked at src/b.rs:3:4:\nno",
            ]
        );
    }

    #[test]
    fn a_long_panic_is_cut() {
        let said = format!("thread 'a' panicked at x:\n{}", "line\n".repeat(1000));
        let panics = pass_on(said.as_bytes(), std::io::sink()).expect("readable");
        assert_eq!(panics[0].lines().count(), 1 + LINES);
    }
}
