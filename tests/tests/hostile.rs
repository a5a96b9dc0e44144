//! What strangers do to the port that clients and peers share: garbage on every layer, and thousands of connections
//! that do nothing. The cluster keeps its leader and its term, and serves every call of the client beside them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::io::ErrorKind;
use std::net::SocketAddr;

use bytes::{BufMut, Bytes, BytesMut};
use d_engine_proto::v1::{self, HelloRequest, Route};
use d_engine_tests::cluster::{Cluster, Node, Shape};
use d_engine_tests::http;
use d_engine_tests::steady::{self, Steady};
use d_engine_tests::wait;
use fastrand::Rng;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::codegen::http::Request;

/// So long that a busy machine deposes no leader by itself.
const PATIENT: &str = "[raft.read_consistency]\nlease_duration_ms = 2000\n";

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const NO_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

/// Everything that the port serves, and a few things it does not.
const METHODS: [&str; 16] = [
    "/d_engine.v1.Peer/Hello",
    "/d_engine.v1.Peer/Append",
    "/d_engine.v1.Peer/Vote",
    "/d_engine.v1.Peer/PreVote",
    "/d_engine.v1.Peer/TransferLeader",
    "/d_engine.v1.Peer/ReadIndex",
    "/d_engine.v1.Peer/Nothing",
    "/d_engine.v1.Kv/Put",
    "/d_engine.v1.Kv/Txn",
    "/d_engine.v1.Kv/Range",
    "/d_engine.v1.Cluster/Status",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/nothing",
    "/",
    "/%00/../..",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_frames_harm_nobody() {
    const ROUNDS: usize = 40;
    let seed =
        std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..1_000_000));
    println!("seed {seed}: SEED={seed} sends the same bytes again");
    let mut rng = Rng::with_seed(seed);

    let mut cluster = Cluster::prepare(Shape { extra: PATIENT.to_owned(), ..Shape::default() }).await;
    cluster.start_all().await;
    let reign = cluster.reign().await;
    let mut steady = Steady::start(cluster.node(reign.leader).direct(wait::PATIENCE)).await;
    let nodes: Vec<SocketAddr> = cluster.nodes().iter().map(|node| node.address).collect();
    let mut unfinished = Vec::new();
    for round in 0..ROUNDS {
        for address in &nodes {
            for bytes in [noise(&mut rng), http1(&mut rng), half_preface(&mut rng), frames(&mut rng)] {
                say(*address, &bytes).await;
            }
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(&half_preface(&mut rng)).await.unwrap();
            unfinished.push(stream);
            for _ in 0..4 {
                let method = METHODS[rng.usize(..METHODS.len())];
                let body = grpc_body(&mut rng);
                let cut = rng.u8(..4) == 0;
                call(*address, method, body, cut).await;
            }
        }
        if round % 10 == 0 {
            steady.go_on(5).await;
        }
    }
    for address in &nodes {
        peer_messages_that_lack_something(*address).await;
    }
    steady.go_on(20).await;
    assert_eq!(cluster.reign().await, reign, "seed {seed}");
    let written = steady.finish().await;
    for node in cluster.nodes() {
        assert_eq!(steady::last_write(&node.direct(wait::PATIENCE)).await, written, "node {}", node.id);
        assert!(!node.output().contains("panicked"), "seed {seed}, node {}:\n{}", node.id, node.output());
    }
    cluster.check_alive();
}

fn noise(rng: &mut Rng) -> Vec<u8> {
    let length = rng.usize(..8192);
    (0..length).map(|_| rng.u8(..)).collect()
}

fn http1(rng: &mut Rng) -> Vec<u8> {
    let method = METHODS[rng.usize(..METHODS.len())];
    let mut bytes = match rng.u8(..4) {
        0 => format!("GET {method} HTTP/1.1\r\nHost: d-engine\r\n\r\n"),
        1 => format!("POST {method} HTTP/1.1\r\nHost: d-engine\r\nContent-Length: 99999999999999999999\r\n\r\n"),
        2 => format!(
            "GET {method} HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: \r\n\r\n"
        ),
        _ => format!("CONNECT {method} HTTP/9.9\r\n{}: x\r\n\r\n", "h".repeat(100_000)),
    }
    .into_bytes();
    bytes.extend(noise(rng));
    bytes
}

fn half_preface(rng: &mut Rng) -> Vec<u8> {
    let whole = [PREFACE, NO_SETTINGS].concat();
    whole[..rng.usize(..whole.len())].to_vec()
}

/// A good beginning, then frames of any type whose headers and contents have nothing to do with each other.
fn frames(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = [PREFACE, NO_SETTINGS].concat();
    for _ in 0..rng.usize(1..30) {
        let content: Vec<u8> = (0..rng.usize(..200)).map(|_| rng.u8(..)).collect();
        let length = if rng.bool() { content.len() } else { rng.usize(..1 << 24) };
        bytes.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes()[1..]);
        bytes.extend([rng.u8(..12), rng.u8(..)]);
        bytes.extend_from_slice(&rng.u32(..8).to_be_bytes());
        bytes.extend(content);
    }
    bytes
}

/// Messages as gRPC frames them, with a content, a length or a compression flag that is wrong.
fn grpc_body(rng: &mut Rng) -> Bytes {
    let mut body = BytesMut::new();
    for _ in 0..rng.usize(1..4) {
        let content: Vec<u8> = (0..rng.usize(..64)).map(|_| rng.u8(..)).collect();
        let length = u32::try_from(content.len()).unwrap();
        body.put_u8(if rng.u8(..8) == 0 { rng.u8(..) } else { 0 });
        body.put_u32(match rng.u8(..4) {
            0 => u32::MAX,
            1 => length.saturating_sub(rng.u32(..8)),
            2 => length + rng.u32(..8),
            _ => length,
        });
        body.put_slice(&content);
    }
    body.freeze()
}

/// Says `bytes` and then nothing more, and waits until the server has ended the connection.
async fn say(address: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The server may close before it has read everything.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let ended = tokio::time::timeout(wait::PATIENCE, stream.read_to_end(&mut Vec::new())).await;
    assert!(
        ended.is_ok(),
        "the connection stays open after {:?}...",
        bytes[..bytes.len().min(80)].escape_ascii().to_string()
    );
}

/// Calls `method` with `body`, ends the request or cuts it off, and waits for whatever the server makes of it.
async fn call(address: SocketAddr, method: &str, body: Bytes, cut: bool) {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut requests, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::post(format!("http://{address}{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (response, mut sending) = requests.send_request(request, false).unwrap();
    // An error means that the answer came first.
    let _ = sending.send_data(body, !cut);
    if cut {
        sending.send_reset(h2::Reason::CANCEL);
    }
    let answered = tokio::time::timeout(wait::PATIENCE, async {
        // A watch goes on until the connection ends.
        if let Ok(response) = response.await
            && !method.ends_with("Watch")
        {
            let mut content = response.into_body();
            while let Some(Ok(data)) = content.data().await {
                let _ = content.flow_control().release_capacity(data.len());
            }
        }
    })
    .await;
    assert!(answered.is_ok(), "{method} was never answered");
    connection.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_idle_connections_are_served_or_refused_and_leave_the_rest_alone() {
    const WANTED: usize = 5_000;
    let count = WANTED.min(raise_open_files_limit() - FILES_OF_THIS_TEST);
    let room = count * 4 / 5;
    let extra = format!("{PATIENT}[network]\nconnections_max = {room}\n");
    let mut cluster = Cluster::prepare(Shape { extra, ..Shape::default() }).await;
    cluster.start_all().await;
    let reign = cluster.reign().await;
    let leader = cluster.node(reign.leader);
    let mut steady = Steady::start(leader.direct(wait::PATIENCE)).await;
    let before = Figures::of(leader).await.expect("metrics");

    let mut idle = Vec::with_capacity(count);
    for number in 0..count {
        let mut stream = TcpStream::connect(leader.address).await.unwrap();
        if number % 2 == 0 {
            // One that is refused may be closed by now.
            let _ = stream.write_all(&[PREFACE, NO_SETTINGS].concat()).await;
        }
        idle.push(stream);
    }
    let during = wait::until("every connection to be served or refused", wait::PATIENCE, || async {
        let now = Figures::of(leader).await?;
        (now.connections + now.refused == before.connections + before.refused + count).then_some(now)
    })
    .await;
    assert_eq!(during.connections, room);
    wait::until("what was refused to be closed, and nothing else", wait::PATIENCE, || async {
        (idle.iter().filter(|stream| is_closed(stream)).count() == during.refused).then_some(())
    })
    .await;
    steady.go_on(100).await;
    assert_eq!(cluster.leader(&[]).await, reign.leader);
    leader.direct(wait::PATIENCE).put("key", "value").await.expect_err("there is no room for one more");
    println!(
        "{} idle connections, half of them with a handshake: {} bytes of memory each",
        room - before.connections,
        during.memory.saturating_sub(before.memory) / (room - before.connections)
    );

    drop(idle);
    wait::until("connections and files to be given back", wait::PATIENCE, || async {
        let now = Figures::of(leader).await?;
        (now.connections == before.connections && now.files <= before.files + 8).then_some(())
    })
    .await;
    leader.direct(wait::PATIENCE).put("key", "value").await.unwrap();
    steady.go_on(20).await;
    steady.finish().await;
    assert_eq!(cluster.reign().await, reign);
    cluster.check_alive();
}

/// Well-formed messages between peers, meant for this very node, that lack what they need.
async fn peer_messages_that_lack_something(address: SocketAddr) {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut peer = v1::peer_client::PeerClient::new(endpoint.connect().await.unwrap());
    let stranger = Route { from: 9, ..Route::default() };
    let hello = HelloRequest { route: Some(stranger), ..HelloRequest::default() };
    let known = peer.hello(hello).await.unwrap().into_inner();
    let route =
        Route { cluster_id: known.cluster_id, to: known.node_id, to_incarnation: known.incarnation, ..stranger };
    let elsewhere = [
        None,
        Some(stranger),
        Some(Route { cluster_id: route.cluster_id ^ 1, ..route }),
        Some(Route { to: route.to + 1, ..route }),
        Some(Route { to_incarnation: route.to_incarnation ^ 1, ..route }),
    ];
    let vote = Some(v1::Vote { term: u64::MAX, node_id: 9, committed: true });
    let last_log = Some(v1::LogId { term: u64::MAX, index: u64::MAX });
    for route in elsewhere {
        let request = v1::VoteRequest { route, vote, last_log, leadership_transfer: true };
        peer.vote(request).await.unwrap_err();
        peer.pre_vote(request).await.unwrap_err();
        let transfer = v1::TransferLeaderRequest { route, from_leader: vote, to: known.node_id, last_log };
        peer.transfer_leader(transfer).await.unwrap_err();
        peer.read_index(v1::ReadIndexRequest { route }).await.unwrap_err();
        let append = v1::AppendRequest { route, vote, committed: last_log, ..v1::AppendRequest::default() };
        append_fails(&mut peer, append).await;
    }
    let route = Some(route);
    peer.vote(v1::VoteRequest { route, last_log, ..v1::VoteRequest::default() }).await.unwrap_err();
    peer.transfer_leader(v1::TransferLeaderRequest { route, ..v1::TransferLeaderRequest::default() })
        .await
        .unwrap_err();
    let no_vote = v1::AppendRequest { route, ..v1::AppendRequest::default() };
    append_fails(&mut peer, no_vote.clone()).await;
    for payload in [&b""[..], &[1], &[200; 9]] {
        let id = v1::LogId { term: 1, index: 1 };
        let entries = vec![v1::LogEntry { id: Some(id), payload: Bytes::from_static(payload) }];
        append_fails(&mut peer, v1::AppendRequest { entries, ..no_vote.clone() }).await;
    }
}

async fn append_fails(peer: &mut v1::peer_client::PeerClient<tonic::transport::Channel>, request: v1::AppendRequest) {
    let shown = format!("{request:?}");
    let mut answers = peer.append(tonic::codegen::tokio_stream::iter([request])).await.unwrap().into_inner();
    let answer = answers.message().await;
    assert!(answer.is_err(), "{shown} was answered with {answer:?}");
}

/// What this program needs besides the connections of a flood.
const FILES_OF_THIS_TEST: usize = 600;

/// Lets this program open as many files as the system allows; how many that is.
fn raise_open_files_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    limit.maximum.map_or(usize::MAX, |files| usize::try_from(files).unwrap())
}

/// Whether the other side has closed. What it has said is skipped.
fn is_closed(stream: &TcpStream) -> bool {
    let mut said = [0; 256];
    loop {
        match stream.try_read(&mut said) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != ErrorKind::WouldBlock,
        }
    }
}

/// How a node is doing, by its metrics.
#[derive(Debug)]
struct Figures {
    connections: usize,
    refused: usize,
    files: usize,
    memory: usize,
}

impl Figures {
    async fn of(node: &Node) -> Option<Self> {
        let (_, text) = http::get(node.http_address, "/metrics").await.ok()?;
        let figure = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(&format!("d_engine_{name} ")));
            value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
        };
        Some(Self {
            connections: figure("connections"),
            refused: figure("connections_refused_total"),
            files: figure("process_open_fds"),
            memory: figure("process_resident_memory_bytes"),
        })
    }
}
