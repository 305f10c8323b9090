//! The connection of a session: bytes in both directions, nothing of what they mean.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::node::Event;
use super::session::SessionId;

/// Messages that wait to be sent; who lets more wait is not reading.
const WAITING: usize = 1024;
/// Bytes that are read at once.
const AT_ONCE: usize = 16 * 1024;
/// How long the last messages may take.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A connection that is served by a task of its own.
#[derive(Debug)]
pub struct Connection {
    outgoing: mpsc::Sender<Vec<u8>>,
    task: AbortHandle,
}

impl Connection {
    /// Tells `events` what it hears, and in the end that it is over.
    pub fn start(
        id: SessionId,
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let (outgoing, waiting) = mpsc::channel(WAITING);
        let task = tokio::spawn(async move {
            let (from, to) = split(stream);
            let why = tokio::select! {
                ended = read(id, from, &events) => ended,
                ended = write(to, waiting) => ended,
            };
            let why = why.err().map_or_else(|| "the connection was closed".to_owned(), |error| error.to_string());
            // Nobody is there any more to whom it matters, if this fails.
            let _ = events.send(Event::Lost(id, why)).await;
        });
        Self { outgoing, task: task.abort_handle() }
    }

    /// Sends this after what was sent before. False if too much waits already.
    pub fn send(&self, bytes: Vec<u8>) -> bool {
        self.outgoing.try_send(bytes).is_ok()
    }

    /// Ends it, once all was sent, or at the latest in a moment.
    pub fn close(self) {
        let Self { outgoing, task } = self;
        drop(outgoing);
        tokio::spawn(async move {
            sleep(LAST_WORDS).await;
            task.abort();
        });
    }

    /// Ends it now.
    pub fn abort(self) {
        self.task.abort();
    }
}

async fn read(id: SessionId, mut from: impl AsyncRead + Unpin, events: &mpsc::Sender<Event>) -> io::Result<()> {
    let mut bytes = vec![0; AT_ONCE];
    loop {
        let count = from.read(&mut bytes).await?;
        // Waits while there is more to do than is done: whoever floods waits in his own connection.
        if count == 0 || events.send(Event::Received(id, bytes[..count].to_vec())).await.is_err() {
            return Ok(());
        }
    }
}

async fn write(mut to: impl AsyncWrite + Unpin, mut waiting: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
    while let Some(bytes) = waiting.recv().await {
        to.write_all(&bytes).await?;
        if waiting.is_empty() {
            to.flush().await?;
        }
    }
    to.shutdown().await
}
