//! The server end of every test: one thread, one process, a port for each thing a server can do.
//!
//! One tokio thread stands for an ordinary event-driven server. HTTP is a keep-alive HTTP/1.1 of our own that knows just what
//! [`super::load`] sends: bodiless requests, no pipelining; a real web server would put its own cost beside the proxies'.

use std::net::{Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

/// Reads to the end, then says in eight bytes (big endian) how much there was.
pub const SINK: u16 = 7001;
/// Writes until the other side goes.
pub const SOURCE: u16 = 7002;
/// Says everything back.
pub const ECHO: u16 = 7003;
/// Says one message back and closes first: the short life of a connection.
pub const ONCE: u16 = 7004;
/// Answers HTTP/1.1 requests.
pub const HTTP: u16 = 7005;
/// All of them.
pub const ALL: [u16; 5] = [SINK, SOURCE, ECHO, ONCE, HTTP];

/// Bytes handed to the kernel at once by bulk senders, and asked for by receivers.
pub const CHUNK: usize = 128 << 10;
/// Connections that may wait to be accepted: more than any test opens at once.
const BACKLOG: u32 = 4096;
/// End of an HTTP head.
pub const HEAD_END: &[u8] = b"\r\n\r\n";

/// Serves until killed.
///
/// # Errors
/// When a port is taken.
pub fn run() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut services = JoinSet::new();
        services.spawn(accept(listen(SINK)?, sink));
        services.spawn(accept(listen(SOURCE)?, source));
        services.spawn(accept(listen(ECHO)?, echo));
        services.spawn(accept(listen(ONCE)?, once));
        services.spawn(accept(listen(HTTP)?, http));
        // A service only ends with an error.
        services.join_next().await.context("there are services")??
    })
}

pub(crate) fn listen(port: u16) -> Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).with_context(|| format!("port {port}"))?;
    Ok(socket.listen(BACKLOG)?)
}

pub(crate) async fn accept<F: Future<Output = std::io::Result<()>> + Send + 'static>(
    listener: TcpListener,
    serve: fn(TcpStream) -> F,
) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        // Ends with its client. Its errors are the client's to tell.
        tokio::spawn(serve(stream));
    }
}

async fn sink(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut total = 0u64;
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            length => total += length as u64,
        }
    }
    stream.write_all(&total.to_be_bytes()).await
}

async fn source(mut stream: TcpStream) -> std::io::Result<()> {
    let buffer = vec![0x5a; CHUNK];
    loop {
        stream.write_all(&buffer).await?;
    }
}

pub(crate) async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    // Grows with the messages: a thousand idle connections must not cost a buffer each.
    let mut buffer = vec![0; 4 << 10];
    loop {
        let length = match stream.read(&mut buffer).await? {
            0 => return stream.shutdown().await,
            length => length,
        };
        stream.write_all(&buffer[..length]).await?;
        if length == buffer.len() && length < CHUNK {
            buffer.resize(length * 2, 0);
        }
    }
}

async fn once(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 4 << 10];
    let length = stream.read(&mut buffer).await?;
    stream.write_all(&buffer[..length]).await
}

const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 128\r\n\r\n\
    0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";

async fn http(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 4 << 10];
    let mut filled = 0;
    loop {
        let length = stream.read(&mut buffer[filled..]).await?;
        if length == 0 {
            return Ok(());
        }
        filled += length;
        if buffer[..filled].ends_with(HEAD_END) {
            stream.write_all(RESPONSE).await?;
            filled = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{HEAD_END, RESPONSE};

    #[test]
    fn the_response_is_as_long_as_it_says() {
        let head = RESPONSE.windows(4).position(|four| four == HEAD_END).expect("a head ends") + 4;
        assert_eq!(RESPONSE.len() - head, 128);
    }
}
