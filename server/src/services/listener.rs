//! Ports and the connections they accept, within bounds.
//!
//! A connection that is one too many is closed at once rather than left waiting in a queue nobody sees: the client
//! learns of it and goes elsewhere. Storage never runs out of file descriptors because of clients.
//!
//! With TLS a connection is handed out after its handshake. Handshakes go on beside each other, each in the slot of its
//! connection and for a bounded time, so that none holds up another.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::error::ServeError;
use crate::limits::FILES_RESERVED;
use crate::metrics::Metrics;
use crate::tls::{Caller, Tls};

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
    tls: Option<Arc<Tls>>,
    /// No more of them than slots.
    handshakes: JoinSet<Option<Connection>>,
}

impl<F: Fn() -> End> Listener<F> {
    /// `end` makes the future that ends a connection; connections are counted in `metrics`, if any.
    pub(crate) fn new(tcp: TcpListener, connections_max: usize, end: F, metrics: Option<Arc<Metrics>>) -> Self {
        // A semaphore takes no more permits than that.
        let slots = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
        Self { tcp, slots, end, metrics, tls: None, handshakes: JoinSet::new() }
    }

    /// Speaks TLS on every connection, if any is given.
    pub(super) fn with_tls(mut self, tls: Option<Arc<Tls>>) -> Self {
        self.tls = tls;
        self
    }

    /// The next connection.
    pub(crate) async fn next_connection(&mut self) -> Connection {
        loop {
            let (tcp, address) = tokio::select! {
                accepted = self.tcp.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) if of_one_connection(&error) => continue,
                    Err(error) => {
                        tracing::warn!(%error, "no connection can be accepted");
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                },
                Some(shaken) = self.handshakes.join_next() => match shaken {
                    Ok(Some(connection)) => return connection,
                    Ok(None) | Err(_) => continue,
                },
            };
            let Ok(slot) = self.slots.clone().try_acquire_owned() else {
                tracing::debug!("a connection is refused: there are too many");
                if let Some(metrics) = &self.metrics {
                    metrics.connection_refused();
                }
                continue;
            };
            // Without it an answer may wait for the acknowledgement of the one before.
            if let Err(error) = tcp.set_nodelay(true) {
                tracing::debug!(%error, "a connection ended before it began");
                continue;
            }
            let place = Place::take(slot, self.metrics.clone());
            let end = (self.end)();
            match self.tls.clone() {
                None => {
                    let caller = Caller { address: Some(address), identity: None };
                    return Connection { stream: Stream::Plain(tcp), caller, end, _place: place };
                }
                Some(tls) => drop(self.handshakes.spawn(handshake(tls, tcp, address, end, place))),
            }
        }
    }
}

async fn handshake(tls: Arc<Tls>, tcp: TcpStream, address: SocketAddr, end: End, place: Place) -> Option<Connection> {
    let (stream, identity) = tls.accept(tcp, Some(address)).await?;
    let caller = Caller { address: Some(address), identity };
    Some(Connection { stream: Stream::Tls(Box::new(stream)), caller, end, _place: place })
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

/// The slot of a connection, counted as long as it is taken.
struct Place {
    metrics: Option<Arc<Metrics>>,
    _slot: OwnedSemaphorePermit,
}

impl Place {
    fn take(slot: OwnedSemaphorePermit, metrics: Option<Arc<Metrics>>) -> Self {
        if let Some(metrics) = &metrics {
            metrics.connection_opened();
        }
        Self { metrics, _slot: slot }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(metrics) = &self.metrics {
            metrics.connection_closed();
        }
    }
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// An accepted connection. Frees its slot when dropped.
pub(crate) struct Connection {
    stream: Stream,
    caller: Caller,
    end: End,
    _place: Place,
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = match &mut self.stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_read(cx, buffer),
            Stream::Tls(tls) => Pin::new(tls).poll_read(cx, buffer),
        };
        if let Poll::Ready(result) = read {
            return Poll::Ready(result);
        }
        ready!(self.end.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Stream::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Stream::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Stream::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(tcp) => tcp.is_write_vectored(),
            Stream::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, bytes),
            Stream::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, bytes),
        }
    }
}
