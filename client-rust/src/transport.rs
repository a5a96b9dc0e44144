//! What is below HTTP/2: TCP, TLS if it was asked for, and the news whether the server spoke, and speaks.
//!
//! A connection counts as made once the server has said something on it, as HTTP/2 makes it do at once. Before, much can
//! still turn out: a server refuses a client's certificate only after the client thinks the handshake done, one that
//! has too many connections closes this one, and one that speaks TLS answers a client that does not with an alert. All
//! of that is found while connecting, so that no request can have been sent.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;

#[cfg(not(feature = "tls"))]
pub(crate) use crate::plain::Security;
use crate::retry::Cause;
#[cfg(feature = "tls")]
pub(crate) use crate::tls::Security;

/// A connection, secure or not.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Tells whether the server spoke, or why it did not.
type Heard = oneshot::Sender<Result<(), Cause>>;

/// Counts what comes from the server on the connections below one channel, whatever it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pulse(Arc<AtomicU64>);

impl Pulse {
    pub(crate) fn beats(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Makes the connections below one channel, which makes a new one when the last has ended.
#[derive(Clone)]
pub(crate) struct Connector {
    tcp: HttpConnector,
    security: Security,
    /// For the first connection; the channel knows by itself what becomes of later ones.
    heard: Arc<Mutex<Option<Heard>>>,
    pulse: Pulse,
}

impl Connector {
    /// A connector, and what tells whether its first connection was made.
    pub(crate) fn new(
        security: Security,
        connect_timeout: Duration,
        pulse: Pulse,
    ) -> (Self, oneshot::Receiver<Result<(), Cause>>) {
        let (heard, hearing) = oneshot::channel();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        // Shared among the addresses that a name may have.
        tcp.set_connect_timeout(Some(connect_timeout));
        (Self { tcp, security, heard: Arc::new(Mutex::new(Some(heard))), pulse }, hearing)
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Wire>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.tcp.call(uri.clone());
        let security = self.security.clone();
        let (heard, pulse) = (self.heard.lock().take(), self.pulse.clone());
        Box::pin(async move {
            let tcp: TcpStream = connecting.await?.into_inner();
            let stream = security.secure(tcp, uri.host().unwrap_or_default()).await?;
            Ok(TokioIo::new(Wire { stream, security, heard, pulse }))
        })
    }
}

/// One connection.
pub(crate) struct Wire {
    stream: Box<dyn Io>,
    security: Security,
    /// Until the server has spoken.
    heard: Option<Heard>,
    pulse: Pulse,
}

/// The first byte of an alert, with which a server that speaks TLS refuses whoever does not.
const TLS_ALERT: u8 = 0x15;

impl Wire {
    /// Judges what the first read gave.
    fn judge(&self, read: &io::Result<()>, bytes: &[u8]) -> Result<(), Cause> {
        match (read, bytes) {
            (Err(error), _) => Err(Cause::text(self.security.explain(error))),
            (Ok(()), []) => Err(Cause::text(
                "the server closed the connection without a word: it stops, or has as many connections as it may",
            )),
            (Ok(()), [TLS_ALERT, ..]) => Err(Cause::text("the server speaks TLS only: set the client's TLS options")),
            _ => Ok(()),
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        self.pulse.beat();
        if self.heard.is_some() {
            let judged = self.judge(&read, &buffer.filled()[before..]);
            if let Some(heard) = self.heard.take() {
                // Whoever waited may have given up.
                let _ = heard.send(judged);
            }
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }
}
