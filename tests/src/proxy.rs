//! A way to a node on which things go wrong, at a moment that a test chooses.
//!
//! ```text
//!   client ── frames ──> proxy ── frames ──> node
//!   client <── frames ── proxy <── frames ── node
//! ```
//!
//! It passes HTTP/2 frames on and knows their heads: length, kind, stream. So it can do something in the middle of a
//! message ([`Proxy::meet`]), or between two ([`GOAWAY`](Mishap::GoAway)), and sees the same of unary calls as of
//! streams. It knows nothing of what the frames say. What it does to a frame breaks the connection for good.
//!
//! [`Proxy::lose_answers`] is of its own kind: what a client asks arrives, what the node answers does not, until
//! [`Proxy::cut`]. The client learns that its connection broke, and nothing of what became of its requests.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;

use crate::wait;

/// What a client sends before its first frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length, kind, flags, stream.
const HEAD_BYTES: usize = 9;
const DATA: u8 = 0;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
/// The longest frame that a node or a client sends here, by far.
const FRAME_BYTES_MAX: usize = 1 << 24;

/// From whom the frame comes that something happens to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client.
    Request,
    /// From the node.
    Answer,
}

/// What happens in place of the next message, or part of one, that comes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// Both connections are reset (RST); the frame is lost.
    Reset,
    /// Half of the frame passes, then both connections end.
    Truncate,
    /// Neither it nor anything after it passes, either way, and nobody is told.
    BlackHole,
    /// The node's side ends; the client's stays open, and silent.
    HalfOpen,
    /// It is late by so much, and what comes after it waits for it.
    Delay(Duration),
    /// The client is told that nothing from this stream on was or will be processed, and to go elsewhere (GOAWAY); what
    /// it sent does not arrive.
    GoAway,
    /// The client is told to go elsewhere with what comes next (GOAWAY); what it has sent goes on as if nothing were.
    GoAwayLater,
    /// The stream of the frame is refused (RST_STREAM, REFUSED_STREAM); the connection stays.
    RefuseStream,
}

/// A mishap to come.
#[derive(Clone, Debug)]
struct Planned {
    way: Way,
    mishap: Mishap,
    /// What the request has in it.
    about: Vec<u8>,
    /// The request has passed.
    asked: bool,
}

/// What happens to connections.
#[derive(Clone, Debug, Default)]
struct Mode {
    losing: bool,
    cuts: u64,
    next: Option<Planned>,
    /// How many mishaps there were.
    met: usize,
}

/// See the module's description. Ends with its last clone; the connections go with it.
#[derive(Clone, Debug)]
pub struct Proxy {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: SocketAddr,
    node: watch::Sender<SocketAddr>,
    mode: watch::Sender<Mode>,
    lost_bytes: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
    /// `None` while nobody listens.
    acceptor: StdMutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(acceptor) = self.acceptor.get_mut().unwrap_or_else(PoisonError::into_inner) {
            acceptor.abort();
        }
        self.mode.send_modify(|mode| mode.cuts += 1);
    }
}

impl Proxy {
    /// Listens at `ip` and forwards to `node`.
    ///
    /// # Panics
    /// When there is no port.
    pub async fn start(ip: Ipv4Addr, node: SocketAddr) -> Self {
        Self::start_at(SocketAddr::from((ip, 0)), node).await
    }

    /// Listens at `address` and forwards to `node`.
    ///
    /// # Panics
    /// When the address is taken.
    pub async fn start_at(address: SocketAddr, node: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let mode = watch::Sender::new(Mode::default());
        let node = watch::Sender::new(node);
        let lost_bytes = Arc::new(AtomicUsize::new(0));
        let connections = Arc::new(AtomicUsize::new(0));
        let inner = Inner { address, node, mode, lost_bytes, connections, acceptor: StdMutex::default() };
        let proxy = Self { inner: Arc::new(inner) };
        proxy.listen(listener);
        proxy
    }

    fn listen(&self, listener: TcpListener) {
        let Inner { node, mode, lost_bytes, connections, acceptor, .. } = &*self.inner;
        let (mode, nodes) = (mode.clone(), node.subscribe());
        let (lost, connections) = (Arc::clone(lost_bytes), Arc::clone(connections));
        let accept = async move {
            while let Ok((client, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                let (node, mode, lost) = (*nodes.borrow(), mode.clone(), Arc::clone(&lost));
                tokio::spawn(connection(client, node, mode, lost));
            }
        };
        *acceptor.lock().unwrap_or_else(PoisonError::into_inner) = Some(tokio::spawn(accept));
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.inner.address
    }

    /// Connections it took so far.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.inner.connections.load(Ordering::Relaxed)
    }

    /// Something happens to the next request that has `about` in it, or to the answer after it, once.
    pub fn meet(&self, way: Way, about: &str, mishap: Mishap) {
        let planned = Planned { way, mishap, about: about.as_bytes().to_vec(), asked: false };
        self.inner.mode.send_modify(|mode| mode.next = Some(planned));
    }

    /// Nothing is to happen any more; answers how many mishaps there were since the start.
    pub fn met(&self) -> usize {
        self.inner.mode.send_modify(|mode| mode.next = None);
        self.inner.mode.borrow().met
    }

    /// Nobody listens any more: who connects is refused. Connections that exist stay.
    pub async fn refuse(&self) {
        let acceptor = self.inner.acceptor.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(acceptor) = acceptor {
            acceptor.abort();
            // The port is free once it has ended.
            let _ = acceptor.await;
        }
    }

    /// Listens again, if nobody does.
    ///
    /// # Panics
    /// When the port is taken meanwhile.
    pub async fn accept(&self) {
        if self.inner.acceptor.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            self.listen(TcpListener::bind(self.inner.address).await.expect("its port is its own"));
        }
    }

    /// Where later connections lead to.
    pub fn lead_to(&self, node: SocketAddr) {
        self.inner.node.send_replace(node);
    }

    /// From now on no answer arrives, on connections old and new.
    pub fn lose_answers(&self) {
        self.inner.mode.send_modify(|mode| mode.losing = true);
    }

    /// Breaks every connection; on later ones answers arrive.
    pub fn cut(&self) {
        self.inner.mode.send_modify(|mode| {
            mode.losing = false;
            mode.cuts += 1;
        });
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

async fn connection(client: TcpStream, node: SocketAddr, mode: watch::Sender<Mode>, lost: Arc<AtomicUsize>) {
    let mut cut = mode.subscribe();
    let born = cut.borrow().cuts;
    let forward = async {
        let Ok(server) = TcpStream::connect(node).await else { return };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        let ends = Ends { to_client: Mutex::new(Some(to_client)), to_server: Mutex::new(Some(to_server)) };
        let (mut from_client, mut from_server) = (BufReader::new(from_client), BufReader::new(from_server));
        let requests = Lane { way: Way::Request, mode: mode.clone(), ends: &ends, lost: lost.clone() };
        let answers = Lane { way: Way::Answer, mode, ends: &ends, lost };
        let ended = tokio::select! {
            ended = requests.carry(&mut from_client) => ended,
            ended = answers.carry(&mut from_server) => ended,
        };
        drop((requests, answers));
        match ended {
            Ok(End::Over) | Err(_) => {}
            // The ends are still open here, and stay so until the connection is cut.
            Ok(End::Silent) => std::future::pending::<()>().await,
            Ok(End::HalfOpen) => {
                drop(from_server);
                ends.to_server.lock().await.take();
                std::future::pending::<()>().await;
            }
            Ok(End::Reset) => {
                for end in [ends.to_client.into_inner(), ends.to_server.into_inner()].into_iter().flatten() {
                    let _ = AsRef::<TcpStream>::as_ref(&end).set_zero_linger();
                    // Dropped, it would say goodbye first.
                    end.forget();
                }
            }
        }
    };
    tokio::select! {
        () = forward => {}
        _ = cut.wait_for(|mode| mode.cuts != born) => {}
    }
}

/// How the passing on ends.
enum End {
    Over,
    Reset,
    Silent,
    HalfOpen,
}

/// Where frames go. Whole frames are written under the lock, so that one can be put in between.
struct Ends {
    to_client: Mutex<Option<OwnedWriteHalf>>,
    to_server: Mutex<Option<OwnedWriteHalf>>,
}

/// One direction of a connection.
struct Lane<'a> {
    way: Way,
    mode: watch::Sender<Mode>,
    ends: &'a Ends,
    lost: Arc<AtomicUsize>,
}

impl Lane<'_> {
    async fn carry(&self, from: &mut BufReader<OwnedReadHalf>) -> io::Result<End> {
        if self.way == Way::Request {
            let mut preface = [0; PREFACE.len()];
            from.read_exact(&mut preface).await?;
            self.pass(&preface).await?;
        }
        let mut frame = Vec::new();
        // Once a byte is lost, what follows makes no sense.
        let mut broken = false;
        while read_frame(from, &mut frame).await? {
            broken |= self.way == Way::Answer && self.mode.borrow().losing;
            if broken {
                self.lost.fetch_add(frame.len(), Ordering::Relaxed);
                continue;
            }
            if let Some(mishap) = self.mishap(&frame) {
                let stream = &frame[5..HEAD_BYTES];
                match mishap {
                    Mishap::Reset => return Ok(End::Reset),
                    Mishap::BlackHole => return Ok(End::Silent),
                    Mishap::HalfOpen => return Ok(End::HalfOpen),
                    Mishap::Truncate => {
                        self.pass(&frame[..HEAD_BYTES + (frame.len() - HEAD_BYTES) / 2]).await?;
                        return Ok(End::Over);
                    }
                    Mishap::Delay(time) => wait::pass(time).await,
                    Mishap::GoAway => {
                        write(&self.ends.to_client, &go_away(0)).await?;
                        // The client ends the connection; nothing it sends meanwhile is passed on.
                        while read_frame(from, &mut frame).await? {}
                        return Ok(End::Over);
                    }
                    Mishap::GoAwayLater => write(&self.ends.to_client, &go_away(number(stream))).await?,
                    Mishap::RefuseStream => {
                        write(&self.ends.to_client, &reset_stream(stream, 7)).await?;
                        write(&self.ends.to_server, &reset_stream(stream, 8)).await?;
                        continue;
                    }
                }
            }
            self.pass(&frame).await?;
        }
        Ok(End::Over)
    }

    /// What is to happen to this frame; told once.
    fn mishap(&self, frame: &[u8]) -> Option<Mishap> {
        if frame[3] != DATA || frame.len() == HEAD_BYTES {
            return None;
        }
        let mut found = None;
        self.mode.send_if_modified(|mode| {
            let Some(next) = &mut mode.next else { return false };
            let asks = self.way == Way::Request && contains(frame, &next.about);
            if asks && next.way == Way::Answer {
                next.asked = true;
            } else if asks || (self.way == Way::Answer && next.asked) {
                found = Some(next.mishap);
                mode.next = None;
                mode.met += 1;
            }
            found.is_some()
        });
        found
    }

    async fn pass(&self, bytes: &[u8]) -> io::Result<()> {
        let end = if self.way == Way::Request { &self.ends.to_server } else { &self.ends.to_client };
        write(end, bytes).await
    }
}

async fn write(end: &Mutex<Option<OwnedWriteHalf>>, bytes: &[u8]) -> io::Result<()> {
    match &mut *end.lock().await {
        Some(end) => end.write_all(bytes).await,
        None => Err(io::ErrorKind::NotConnected.into()),
    }
}

/// Reads a frame with its head; false at the end.
async fn read_frame(from: &mut BufReader<OwnedReadHalf>, frame: &mut Vec<u8>) -> io::Result<bool> {
    frame.resize(HEAD_BYTES, 0);
    match from.read_exact(frame).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        read => read?,
    };
    let length = number(&[0, frame[0], frame[1], frame[2]]) as usize;
    assert!(length < FRAME_BYTES_MAX, "24 bits");
    frame.resize(HEAD_BYTES + length, 0);
    from.read_exact(&mut frame[HEAD_BYTES..]).await?;
    Ok(true)
}

/// In the order of the network.
fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// GOAWAY without an error: nothing above stream `last` is processed.
fn go_away(last: u32) -> Vec<u8> {
    let mut frame = vec![0, 0, 8, GOAWAY, 0, 0, 0, 0, 0];
    frame.extend(last.to_be_bytes());
    frame.extend(0u32.to_be_bytes());
    frame
}

fn reset_stream(stream: &[u8], error: u32) -> Vec<u8> {
    let mut frame = vec![0, 0, 4, RST_STREAM, 0];
    frame.extend(stream);
    frame.extend(error.to_be_bytes());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame of data with this byte.
    fn data(byte: u8) -> Vec<u8> {
        // On a stream whose number is no such byte.
        vec![0, 0, 1, DATA, 0, 0, 0, 0, 9, byte]
    }

    /// Answers each byte after the preface with itself, and tells what it was asked.
    async fn echo() -> (SocketAddr, watch::Receiver<Vec<u8>>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, told) = watch::channel(Vec::new());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let asked = asked.clone();
                tokio::spawn(async move {
                    let mut preface = [0; PREFACE.len()];
                    let _ = stream.read_exact(&mut preface).await;
                    while let Ok(byte) = stream.read_u8().await {
                        asked.send_modify(|bytes| bytes.push(byte));
                        let _ = stream.write_u8(byte).await;
                    }
                });
            }
        });
        (address, told)
    }

    async fn connect(proxy: &Proxy) -> TcpStream {
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        client.write_all(PREFACE).await.unwrap();
        client
    }

    async fn is_echoed(client: &mut TcpStream, byte: u8) {
        client.write_all(&data(byte)).await.unwrap();
        let mut answer = [0; HEAD_BYTES + 1];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer[..], data(byte));
    }

    async fn rest(client: &mut TcpStream) -> io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(wait::PATIENCE, client.read_to_end(&mut rest)).await;
        read.expect("the connection ends").map(|_| rest)
    }

    #[tokio::test]
    async fn requests_arrive_while_answers_are_lost_and_a_cut_ends_it() {
        let (node, mut told) = echo().await;
        let proxy = Proxy::start(Ipv4Addr::LOCALHOST, node).await;
        let mut client = connect(&proxy).await;
        is_echoed(&mut client, 1).await;

        proxy.lose_answers();
        client.write_all(&data(2)).await.unwrap();
        told.wait_for(|asked| asked.len() == 20).await.unwrap();
        wait::until("the answer to be lost", wait::PATIENCE, || async { (proxy.lost_bytes() == 10).then_some(()) })
            .await;
        proxy.cut();
        client.read_u8().await.expect_err("the connection broke before the answer");

        is_echoed(&mut connect(&proxy).await, 3).await;
        assert_eq!(proxy.connections(), 2);
    }

    #[tokio::test]
    async fn each_mishap_happens_once_and_is_seen_as_what_it_is() {
        let (node, told) = echo().await;
        let proxy = Proxy::start(Ipv4Addr::LOCALHOST, node).await;
        let asked = || told.borrow().len();
        for way in [Way::Request, Way::Answer] {
            for mishap in [Mishap::Reset, Mishap::Truncate, Mishap::GoAway, Mishap::BlackHole, Mishap::HalfOpen] {
                let mut client = connect(&proxy).await;
                is_echoed(&mut client, 1).await;
                let (before, met) = (asked(), proxy.met());
                proxy.meet(way, "\u{2}", mishap);
                client.write_all(&data(2)).await.unwrap();
                wait::until("the mishap", wait::PATIENCE, || async {
                    (proxy.inner.mode.borrow().met == met + 1).then_some(())
                })
                .await;
                match mishap {
                    Mishap::Reset => {
                        let error = rest(&mut client).await.expect_err("a reset");
                        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                    }
                    // The half of a single byte is none.
                    Mishap::Truncate if way == Way::Answer => assert_eq!(rest(&mut client).await.unwrap().len(), 9),
                    Mishap::Truncate => drop(rest(&mut client).await),
                    Mishap::GoAway => {
                        let mut frame = [0; 17];
                        client.read_exact(&mut frame).await.unwrap();
                        assert_eq!((frame[3], &frame[9..]), (GOAWAY, &[0; 8][..]));
                    }
                    _ => {
                        proxy.cut();
                        assert_eq!(rest(&mut client).await.unwrap_or_default(), Vec::<u8>::new(), "it was silent");
                    }
                }
                if way == Way::Request && mishap != Mishap::Truncate {
                    assert_eq!(asked(), before, "{mishap:?}: the request arrived");
                }
                proxy.cut();
            }
        }
        let mut client = connect(&proxy).await;
        proxy.meet(Way::Request, "\u{2}", Mishap::RefuseStream);
        client.write_all(&data(2)).await.unwrap();
        let mut frame = [0; 13];
        client.read_exact(&mut frame).await.unwrap();
        assert_eq!(frame, [0, 0, 4, RST_STREAM, 0, 0, 0, 0, 9, 0, 0, 0, 7]);
        proxy.meet(Way::Request, "\u{3}", Mishap::Delay(Duration::from_millis(1)));
        // What the node was told of the stream that was refused is echoed first.
        client.read_exact(&mut frame).await.unwrap();
        is_echoed(&mut client, 3).await;
        proxy.refuse().await;
        TcpStream::connect(proxy.address()).await.expect_err("nobody listens");
        proxy.accept().await;
        is_echoed(&mut connect(&proxy).await, 4).await;
    }
}
