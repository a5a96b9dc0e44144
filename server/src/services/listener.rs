//! Ports and the connections they accept, within bounds.
//!
//! A connection that is one too many is closed at once rather than left waiting in a queue nobody sees: the client
//! learns of it and goes elsewhere. Storage never runs out of file descriptors because of clients.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::error::ServeError;
use crate::limits::FILES_RESERVED;
use crate::metrics::Metrics;

/// Pause after the system refused to hand out a connection, so that a lack of files does not become a busy loop.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections that are served however few files the process may open.
const CONNECTIONS_MIN: usize = 64;

/// Takes a port. The address is host:port; of a name with several addresses the first that works is taken.
///
/// # Errors
/// When the port is in use or cannot be had.
pub async fn bind(address: &str) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ServeError::AddressInUse { address: address.to_owned() },
        _ => ServeError::Bind { address: address.to_owned(), source },
    })
}

/// Allows this process as many open files as the system lets it have. For programs that are nothing but a server;
/// the limit holds for everything in the process.
pub fn raise_open_files_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// How many of the `wanted` connections the process has files for.
pub(super) fn affordable(wanted: usize) -> usize {
    let files = getrlimit(Resource::Nofile).current.and_then(|files| usize::try_from(files).ok());
    let affordable = files.map_or(usize::MAX, |files| files.saturating_sub(FILES_RESERVED).max(CONNECTIONS_MIN));
    if affordable < wanted {
        tracing::warn!(
            connections = affordable,
            wanted,
            "fewer connections than configured: raise the limit of open files"
        );
    }
    wanted.min(affordable)
}

/// When to end a connection, whatever its client does.
pub(crate) type End = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A port that serves so many connections at a time, each until its end.
pub(crate) struct Listener<F> {
    tcp: TcpListener,
    slots: Arc<Semaphore>,
    end: F,
    metrics: Option<Arc<Metrics>>,
}

impl<F: Fn() -> End> Listener<F> {
    /// `end` makes the future that ends a connection; connections are counted in `metrics`, if any.
    pub(crate) fn new(tcp: TcpListener, connections_max: usize, end: F, metrics: Option<Arc<Metrics>>) -> Self {
        // A semaphore takes no more permits than that.
        let slots = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
        Self { tcp, slots, end, metrics }
    }

    /// The next connection.
    pub(crate) async fn next_connection(&self) -> Connection {
        loop {
            match self.tcp.accept().await {
                Ok((tcp, _)) => match self.slots.clone().try_acquire_owned() {
                    Ok(slot) => {
                        // Without it an answer may wait for the acknowledgement of the one before.
                        if let Err(error) = tcp.set_nodelay(true) {
                            tracing::debug!(%error, "a connection ended before it began");
                            continue;
                        }
                        if let Some(metrics) = &self.metrics {
                            metrics.connection_opened();
                        }
                        return Connection { tcp, end: (self.end)(), metrics: self.metrics.clone(), _slot: slot };
                    }
                    Err(_) => {
                        tracing::debug!("a connection is refused: there are too many");
                        if let Some(metrics) = &self.metrics {
                            metrics.connection_refused();
                        }
                    }
                },
                Err(error) if of_one_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "no connection can be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

impl<F: Fn() -> End + Send + Sync + 'static> axum::serve::Listener for Listener<F> {
    type Io = Connection;
    type Addr = ();

    async fn accept(&mut self) -> (Connection, ()) {
        (self.next_connection().await, ())
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

fn of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// An accepted connection. Frees its slot when dropped.
pub(crate) struct Connection {
    tcp: TcpStream,
    end: End,
    metrics: Option<Arc<Metrics>>,
    _slot: OwnedSemaphorePermit,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(metrics) = &self.metrics {
            metrics.connection_closed();
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.tcp.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(result) = Pin::new(&mut self.tcp).poll_read(cx, buffer) {
            return Poll::Ready(result);
        }
        ready!(self.end.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bytes)
    }
}
