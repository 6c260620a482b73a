//! The program of pods that a real container runtime starts: `first_act` waits to be ended, as a pause container does;
//! `first_act ADDRESS:PORT` connects there before it does anything else, and says what came of it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        loop {
            std::thread::park();
        }
    };
    let talked = TcpStream::connect(&address).and_then(|mut stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /first-act HTTP/1.0\r\nHost: peer\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    match talked {
        Ok(answer) if answer.starts_with("HTTP/1.1 200") => ExitCode::SUCCESS,
        Ok(answer) => {
            eprintln!("answered {answer:?}");
            ExitCode::from(3)
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}
