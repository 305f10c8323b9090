//! Figures for Prometheus, over HTTP: `GET /metrics` in the text format of `OpenMetrics`.
//!
//! One request a connection, one connection at a time, each with a deadline: who is slow is cut, and nobody is served for long. There is
//! no authentication and no encryption: the address to listen on is for the loopback or a network of the operator's own.

mod figures;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::acceptor::Acceptor;
use crate::router::Router;

/// Most bytes of a request's head.
const MAX_HEAD: usize = 8 * 1024;
/// Most headers of a request.
const MAX_HEADERS: usize = 64;
/// How long a client may take, for all of it.
const PATIENCE: Duration = Duration::from_secs(2);

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// Listens where figures will be asked for. Before privileges are given up: a sealed daemon cannot.
///
/// # Errors
/// When the address cannot be had.
pub fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("cannot listen on {address} for metrics"))
}

/// Answers on `listener` with the figures of `router`, until it is dropped.
///
/// # Errors
/// When the system gives no thread.
pub fn serve(listener: TcpListener, router: Arc<Router>) -> io::Result<Acceptor<TcpListener>> {
    Acceptor::start("metrics", listener, move |stream| answer(stream, &router))
}

fn answer(mut stream: TcpStream, router: &Router) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let (status, kind, body) = match target(&mut stream, Instant::now() + PATIENCE)? {
        Asked::Metrics => match figures::of(router) {
            Ok(text) => ("200 OK", OPEN_METRICS, text),
            Err(error) => ("500 Internal Server Error", TEXT, format!("{error}\n")),
        },
        Asked::Elsewhere => ("404 Not Found", TEXT, "the figures are at /metrics\n".to_owned()),
        Asked::Otherwise => ("405 Method Not Allowed", TEXT, "only GET\n".to_owned()),
        Asked::Nonsense => ("400 Bad Request", TEXT, "not HTTP/1.1\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

/// What a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Metrics,
    /// Another path.
    Elsewhere,
    /// Another method.
    Otherwise,
    Nonsense,
}

/// Reads a request's head and understands it.
fn target(stream: &mut TcpStream, by: Instant) -> io::Result<Asked> {
    let mut head = Vec::new();
    while head.len() < MAX_HEAD {
        let left = by.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut bytes = [0; 1024];
        let count = stream.read(&mut bytes)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&bytes[..count]);
        if let Some(asked) = understand(&head) {
            return Ok(asked);
        }
    }
    Ok(Asked::Nonsense)
}

/// `None`: there is more to come.
fn understand(head: &[u8]) -> Option<Asked> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => None,
        Err(_) => Some(Asked::Nonsense),
        Ok(httparse::Status::Complete(_)) => Some(match (request.method, request.path) {
            (Some("GET"), Some(path)) if path.split('?').next() == Some("/metrics") => Asked::Metrics,
            (Some("GET"), _) => Asked::Elsewhere,
            _ => Asked::Otherwise,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_understood() {
        for (head, expected) in [
            ("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", Some(Asked::Metrics)),
            ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", Some(Asked::Metrics)),
            ("GET / HTTP/1.1\r\n\r\n", Some(Asked::Elsewhere)),
            ("POST /metrics HTTP/1.1\r\n\r\n", Some(Asked::Otherwise)),
            ("GET /metrics HTTP/1.1\r\nHost: a\r\n", None),
            ("\u{16}\u{3}\u{1}", Some(Asked::Nonsense)),
        ] {
            assert_eq!(understand(head.as_bytes()), expected, "{head:?}");
        }
    }
}
