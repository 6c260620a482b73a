//! `ztunnel explain`: asks the ztunnel that runs here, over its admin server.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use mesh::settings::{Environment, Mistakes};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::{VERDICT, Verdict};
use crate::config::DEFAULT_ADMIN_SOCKET;

pub const USAGE: &str = "\
usage: ztunnel explain --from POD --to HOST:PORT [-o json]

What would happen to a connection, and which rule decides, by what the ztunnel that runs here knows.
  --from   <namespace>/<pod>, a workload's UID or an address
  --to     a host name, <namespace>/<service>, <namespace>/<pod> or an address ([..] around IPv6), with the port
Exit status: 0 it would connect; 1 it would be refused, all of it or a part; 2 the question has no answer.
The admin server is found by ADMIN_PORT, or with PROXY_MODE=dedicated by ADMIN_SOCKET.";

/// Longer than DNS may take for an endpoint known by name.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    pub from: String,
    pub to: String,
    pub json: bool,
}

/// Reads what stands after `explain`. `None`: the usage is asked for.
///
/// # Errors
/// Every argument that is not understood, or missing.
pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Option<Question>, Mistakes> {
    let mut mistakes = Mistakes::default();
    let (mut from, mut to, mut form) = (None, None, None);
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let (name, value) = match arg.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (arg, None),
        };
        let into = match &*name {
            "--help" | "-h" => return Ok(None),
            "--from" => &mut from,
            "--to" => &mut to,
            "-o" | "--output" => &mut form,
            other => {
                mistakes.push(format!("unknown argument {other}; see `ztunnel explain --help`"));
                continue;
            }
        };
        match value.or_else(|| args.next()) {
            Some(value) => *into = Some(value),
            None => mistakes.push(format!("{name} needs a value")),
        }
    }
    let json = match form.as_deref() {
        None | Some("text") => false,
        Some("json") => true,
        Some(other) => {
            mistakes.push(format!("-o {other}: it is json or text"));
            false
        }
    };
    for (name, value) in [("--from", &from), ("--to", &to)] {
        if value.is_none() {
            mistakes.push(format!("{name} is missing; see `ztunnel explain --help`"));
        }
    }
    let question = Question { from: from.unwrap_or_default(), to: to.unwrap_or_default(), json };
    mistakes.into_result(Some(question))
}

/// Where the admin server of the ztunnel that runs here listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admin {
    Loopback(u16),
    Unix(PathBuf),
}

impl Admin {
    /// # Errors
    /// Settings that make no sense.
    pub fn from_env<I: IntoIterator<Item = (String, String)>>(vars: I) -> Result<Self, Mistakes> {
        let mut env = Environment::new(vars);
        let dedicated = env.text("PROXY_MODE").is_some_and(|mode| mode.eq_ignore_ascii_case("dedicated"));
        let admin = if dedicated {
            Self::Unix(env.string("ADMIN_SOCKET", DEFAULT_ADMIN_SOCKET).into())
        } else {
            Self::Loopback(env.value("ADMIN_PORT", 15000, "a port"))
        };
        env.mistakes.into_result(admin)
    }
}

/// What came back.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// With the text to print.
    Verdict(bool, String),
    None(String),
}

/// Asks.
///
/// # Errors
/// No ztunnel answers there.
pub fn ask(admin: &Admin, question: &Question) -> anyhow::Result<Answer> {
    let encode = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
    let form = if question.json { "json" } else { "text" };
    let path = format!("/explain?from={}&to={}&o={form}", encode(&question.from), encode(&question.to));
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    let answer = match admin {
        Admin::Loopback(port) => {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
            let none = || format!("no ztunnel answers at {address} (ADMIN_PORT)");
            let stream = TcpStream::connect(address).with_context(none)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            exchange(stream, &request).with_context(none)?
        }
        Admin::Unix(path) => {
            let none = || format!("no ztunnel answers at {} (ADMIN_SOCKET)", path.display());
            let stream = UnixStream::connect(path).with_context(none)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            exchange(stream, &request).with_context(none)?
        }
    };
    read(&answer).context("the answer is not that of a ztunnel's admin server")
}

fn exchange(mut stream: impl Read + Write, request: &str) -> std::io::Result<String> {
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn read(answer: &str) -> Option<Answer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status: u16 = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    if status != 200 {
        return Some(Answer::None(body.trim_end().to_owned()));
    }
    let verdict = lines.filter_map(|line| line.split_once(':')).find(|(name, _)| name.eq_ignore_ascii_case(VERDICT))?;
    Some(Answer::Verdict(verdict.1.trim() == Verdict::Connects.as_str(), body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Result<Option<Question>, Mistakes> {
        parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn questions_are_read_in_all_their_forms() {
        let asked = Question { from: "shop/a".into(), to: "[::1]:80".into(), json: true };
        assert_eq!(words("--from shop/a --to [::1]:80 -o json"), Ok(Some(asked.clone())));
        assert_eq!(words("-o=json --to=[::1]:80 --from=shop/a"), Ok(Some(asked)));
        assert_eq!(words("--from a --help"), Ok(None));
        assert_eq!(words("--form a --to b").unwrap_err().lines().len(), 3);
        assert_eq!(words("").unwrap_err().lines().len(), 2);
        assert!(words("--from a --to b -o xml").is_err() && words("--from a --to").is_err());
    }

    #[test]
    fn the_admin_server_is_where_the_settings_say() {
        let of = |vars: &[(&str, &str)]| Admin::from_env(vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        assert_eq!(of(&[]), Ok(Admin::Loopback(15000)));
        assert_eq!(of(&[("ADMIN_PORT", "1")]), Ok(Admin::Loopback(1)));
        assert_eq!(of(&[("PROXY_MODE", "dedicated")]), Ok(Admin::Unix(DEFAULT_ADMIN_SOCKET.into())));
        assert!(of(&[("ADMIN_PORT", "x")]).is_err());
    }

    #[test]
    fn answers_are_told_from_refusals_to_answer() {
        let said = |status: &str, verdict: &str| {
            read(&format!("HTTP/1.1 {status}\r\nX-Explain-Verdict: {verdict}\r\n\r\nhm\n"))
        };
        assert_eq!(said("200 OK", "connects"), Some(Answer::Verdict(true, "hm\n".into())));
        assert_eq!(said("200 OK", "partly"), Some(Answer::Verdict(false, "hm\n".into())));
        assert_eq!(said("404 Not Found", ""), Some(Answer::None("hm".into())));
        assert_eq!(read("garbage"), None);
    }
}
