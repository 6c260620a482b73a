//! What a peer writes into a CONNECT: its authority and headers, and what of them gets into log lines.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::{Corpus, fuzz_target};
use mesh::fuzzing::{LogFormat, capture, frames_in_pieces};
use mesh::hbone::{Authority, ConnectHeaders};
use mesh_fuzz::{begin, seed, texts};

fuzz_target!(init: begin(seeds), |input: &[u8]| -> Corpus {
    let Some((letter, content)) = input.split_first() else { return Corpus::Reject };
    match (letter, std::str::from_utf8(content)) {
        (b'a', Ok(text)) => authority(text),
        (b'h', _) => headers(content),
        (b'f', _) => frames(content),
        (b'l', Ok(text)) => log_line(text),
        _ => return Corpus::Reject,
    }
    Corpus::Keep
});

/// One authority has one spelling, and can be asked of the next proxy as it was asked of us.
fn authority(text: &str) {
    let Ok(asked) = text.parse::<Authority>() else { return };
    let written = asked.to_string();
    assert!(asked.port() != 0 && written.len() <= 253 + 6, "{written}");
    assert_eq!(written.parse().as_ref(), Ok(&asked));
    assert_eq!(text.to_ascii_uppercase().parse().as_ref(), Ok(&asked), "case does not matter");
    let uri: http::uri::Authority = written.parse().expect("an authority of HTTP");
    assert_eq!(uri.as_str().parse(), Ok(asked));
}

/// Lines of `name: value`, as HTTP takes them.
fn map(content: &[u8]) -> HeaderMap {
    let pair = |line: &[u8]| {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        Some((HeaderName::from_bytes(name).ok()?, HeaderValue::from_bytes(value).ok()?))
    };
    let mut map = HeaderMap::new();
    for (name, value) in content.split(|byte| *byte == b'\n').take(100).filter_map(pair) {
        map.append(name, value);
    }
    map
}

/// What was understood survives being written, over a forgery too, and is of bounded length.
fn headers(content: &[u8]) {
    let mut map = map(content);
    let read = ConnectHeaders::parse(&map);
    let mut fresh = HeaderMap::new();
    read.write(&mut fresh);
    assert_eq!(ConnectHeaders::parse(&fresh), read);
    assert!(fresh.values().map(HeaderValue::len).sum::<usize>() < 16 * 256, "{fresh:?}");
    read.write(&mut map);
    assert_eq!(ConnectHeaders::parse(&map), read);
    for name in fresh.keys() {
        assert_eq!(map.get_all(name).iter().count(), 1, "{name}");
    }
}

/// However a connection comes in pieces, it costs and earns the same.
fn frames(content: &[u8]) {
    let (sizes, bytes) = content.split_at(content.len().min(4));
    let whole = frames_in_pieces(bytes, &[u8::MAX]);
    assert_eq!(frames_in_pieces(bytes, &[1]), whole);
    if !sizes.is_empty() {
        assert_eq!(frames_in_pieces(bytes, sizes), whole);
    }
    assert!(whole.0 <= (bytes.len() / 9) as u64, "a frame is nine bytes at least");
}

/// No text starts a line of its own.
fn log_line(text: &str) {
    let log = || tracing::info!(quoted = text, plain = %text, "{text}");
    let plain = capture(LogFormat::Plain, "info", log);
    assert!(plain.ends_with('\n') && plain.matches(['\n', '\r']).count() == 1, "{plain:?}");
    let json = capture(LogFormat::Json, "info", log);
    assert_eq!(json.matches(['\n', '\r']).count(), 1, "{json:?}");
    let fields: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((fields["quoted"].as_str(), fields["plain"].as_str()), (Some(text), Some(text)));
}

fn seeds() -> Vec<Vec<u8>> {
    let authorities = texts(
        b'a',
        &["10.0.0.1:80", "[fd00::1]:8080", "[::ffff:10.0.0.1]:80", "[fe80::1%3]:80", "api.shop.svc.cluster.local:80"],
    );
    let headers = texts(
        b'h',
        &[
            "baggage: k8s.cluster.name=c,k8s.namespace.name=n,k8s.deployment.name=w,service.name=s,service.version=v1,\
             cloud.region=r,cloud.availability_zone=z",
            "forwarded: for=\"[fd00::1]:80\";host=api.shop.svc.cluster.local, for=1.2.3.4:5\nx-istio-source: waypoint",
            "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\nx-forwarded-network: west",
            "baggage: k8s.cronjob.name=a;p=1,k8s.pod.name=b,k8s.job.name=\nbaggage: service.name=again",
        ],
    );
    let lines = texts(b'l', &["a\nb\r\u{1b}[31m\"", "2026-01-01\tinfo\tx\t"]);
    // Sizes, a preface, and frames: SETTINGS, DATA, and a GOAWAY that says why.
    let frames = [
        &[1, 9, 3, 200][..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0, 0, 0, 4, 0, 0, 0, 0, 0],
        &[0, 0, 3, 0, 0, 0, 0, 0, 1, b'a', b'b', b'c'],
        &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 11],
    ];
    authorities.chain(headers).chain(lines).chain([seed(b'f', frames.concat())]).collect()
}
