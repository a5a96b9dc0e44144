//! A way to a node that loses answers: what a client asks always arrives, what the node answers may not.
//!
//! ```text
//!   client ── request ──> proxy ── request ──> node      always
//!   client <── answer ──  proxy <── answer ──  node      until answers are lost; then the connection breaks
//! ```
//!
//! It sees bytes only. Losing a part of them breaks a connection for good, so [`Proxy::lose_answers`] is followed by
//! [`Proxy::cut`]: the client learns that its connection broke, and nothing of what became of its requests.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fastrand::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::wait;

/// What happens to answers, and how often connections were cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mode {
    losing: bool,
    cuts: u64,
}

/// See the module's description. Ends with its last clone; the connections go with it.
#[derive(Clone, Debug)]
pub struct Proxy {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    lost_bytes: Arc<AtomicUsize>,
    acceptor: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.acceptor.abort();
        self.mode.send_modify(|mode| mode.cuts += 1);
    }
}

impl Proxy {
    /// Listens at `ip` and forwards to `node`.
    pub async fn start(ip: Ipv4Addr, node: SocketAddr) -> Self {
        let listener = TcpListener::bind((ip, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let (mode, modes) = watch::channel(Mode::default());
        let lost_bytes = Arc::new(AtomicUsize::new(0));
        let lost = Arc::clone(&lost_bytes);
        let accept = async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connection(client, node, modes.clone(), Arc::clone(&lost)));
            }
        };
        let acceptor = tokio::spawn(accept).abort_handle();
        Self { inner: Arc::new(Inner { address, mode, lost_bytes, acceptor }) }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.inner.address
    }

    /// From now on no answer arrives, on connections old and new.
    pub fn lose_answers(&self) {
        self.inner.mode.send_modify(|mode| mode.losing = true);
    }

    /// Breaks every connection; on later ones answers arrive.
    pub fn cut(&self) {
        self.inner.mode.send_modify(|mode| *mode = Mode { losing: false, cuts: mode.cuts + 1 });
    }

    /// Bytes of answers lost so far.
    #[must_use]
    pub fn lost_bytes(&self) -> usize {
        self.inner.lost_bytes.load(Ordering::Relaxed)
    }

    /// Loses answers at random moments, for a random while each, until it is dropped. Answers how often, through the
    /// proxy's own count.
    pub async fn torment(&self, mut rng: Rng, times: &AtomicUsize) {
        loop {
            wait::pass(Duration::from_millis(rng.u64(20..400))).await;
            self.lose_answers();
            wait::pass(Duration::from_millis(rng.u64(1..60))).await;
            self.cut();
            times.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn connection(client: TcpStream, node: SocketAddr, modes: watch::Receiver<Mode>, lost: Arc<AtomicUsize>) {
    let born = modes.borrow().cuts;
    let mut cut = modes.clone();
    let forward = async {
        let Ok(server) = TcpStream::connect(node).await else { return };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        tokio::select! {
            () = requests(from_client, to_server) => {}
            () = answers(from_server, to_client, modes, lost) => {}
        }
    };
    tokio::select! {
        () = forward => {}
        _ = cut.wait_for(|mode| mode.cuts != born) => {}
    }
}

async fn requests(mut client: OwnedReadHalf, mut server: OwnedWriteHalf) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = client.read(&mut buffer).await {
        if server.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

async fn answers(
    mut server: OwnedReadHalf,
    mut client: OwnedWriteHalf,
    modes: watch::Receiver<Mode>,
    lost: Arc<AtomicUsize>,
) {
    let mut buffer = vec![0; 64 << 10];
    // Once a byte is lost, what follows makes no sense.
    let mut broken = false;
    while let Ok(read @ 1..) = server.read(&mut buffer).await {
        broken |= modes.borrow().losing;
        if broken {
            lost.fetch_add(read, Ordering::Relaxed);
        } else if client.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers each byte with itself, and tells what it was asked.
    async fn echo() -> (SocketAddr, watch::Receiver<Vec<u8>>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, told) = watch::channel(Vec::new());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let asked = asked.clone();
                tokio::spawn(async move {
                    while let Ok(byte) = stream.read_u8().await {
                        asked.send_modify(|bytes| bytes.push(byte));
                        let _ = stream.write_u8(byte).await;
                    }
                });
            }
        });
        (address, told)
    }

    #[tokio::test]
    async fn requests_arrive_while_answers_are_lost_and_a_cut_ends_it() {
        let (node, mut told) = echo().await;
        let proxy = Proxy::start(Ipv4Addr::LOCALHOST, node).await;
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        client.write_u8(1).await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), 1);

        proxy.lose_answers();
        client.write_u8(2).await.unwrap();
        told.wait_for(|asked| *asked == [1, 2]).await.unwrap();
        wait::until("the answer to be lost", wait::PATIENCE, || async { (proxy.lost_bytes() == 1).then_some(()) })
            .await;
        proxy.cut();
        client.read_u8().await.expect_err("the connection broke before the answer");

        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        client.write_u8(3).await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), 3);
    }
}
