//! Over a real port, with the node's state made up.

use d_engine_proto::Revision;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;

struct Server {
    address: std::net::SocketAddr,
    state: Arc<Mutex<NodeState>>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), ServeError>>,
}

impl Server {
    async fn start(state: NodeState) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(state));
        let observed = state.clone();
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let observe = move || observed.lock().clone();
        let serving = tokio::spawn(serve_state(listener, observe, Arc::new(Metrics::new()), shutdown));
        Self { address, state, stop, serving }
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        (response.split(' ').nth(1).unwrap().parse().unwrap(), response)
    }

    async fn codes(&self) -> [u16; 4] {
        let mut codes = [0; 4];
        for (code, path) in codes.iter_mut().zip(["/health", "/ready", "/primary", "/replica"]) {
            *code = self.get(path).await.0;
        }
        codes
    }
}

fn leader_is(leader_id: u32) -> Option<LeaderInfo> {
    Some(LeaderInfo { leader_id, term: 4 })
}

#[tokio::test]
async fn each_probe_tells_what_a_load_balancer_needs_in_every_state_of_a_node() {
    let server = Server::start(NodeState::default()).await;
    let leading = NodeState { node_id: 1, leader: leader_is(1), is_leader: true, ..NodeState::default() };
    let following = NodeState { node_id: 1, leader: leader_is(2), ..NodeState::default() };
    let waiting = NodeState { node_id: 1, problem: Some("no leader is known".into()), ..NodeState::default() };
    // The lease ended between two looks at the node: neither primary nor replica.
    let lapsed = NodeState { is_leader: false, ..leading.clone() };
    let broken = NodeState { fault: Some("the disk failed".into()), ..leading.clone() };
    for (state, codes) in [
        (leading, [200, 200, 200, 503]),
        (following, [200, 200, 503, 200]),
        (waiting, [200, 503, 503, 503]),
        (lapsed, [200, 200, 503, 503]),
        (broken, [503, 503, 503, 503]),
    ] {
        *server.state.lock() = state.clone();
        assert_eq!(server.codes().await, codes, "{state:?}");
    }
}

#[tokio::test]
async fn a_probe_says_who_leads_and_what_is_wrong() {
    let server = Server::start(NodeState { node_id: 1, leader: leader_is(2), ..NodeState::default() }).await;
    let (_, response) = server.get("/primary").await;
    assert!(response.contains("content-type: application/json"), "{response}");
    assert!(response.contains("\"leader_id\":2,\"term\":4"), "{response}");
    assert!(response.contains("\"problem\":\"this node does not lead"), "{response}");
    assert_eq!(server.get("/nothing").await.0, 404);
}

#[tokio::test]
async fn a_scrape_asks_the_node_for_its_figures() {
    let figures = Figures { revision: Revision(42), ..Figures::default() };
    let server = Server::start(NodeState { figures, ..NodeState::default() }).await;
    let (code, response) = server.get("/metrics").await;
    assert_eq!(code, 200);
    assert!(response.contains("content-type: application/openmetrics-text"), "{response}");
    assert!(response.contains("\nd_engine_store_revision 42\n"), "{response}");
    assert!(response.contains("# EOF"), "{response}");
}

#[tokio::test]
async fn connections_that_say_nothing_do_not_hold_up_the_end() {
    let server = Server::start(NodeState::default()).await;
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    assert_eq!(server.get("/health").await.0, 200);
    server.stop.send(()).unwrap();
    let patience = std::time::Duration::from_secs(60);
    tokio::time::timeout(patience, server.serving).await.expect("in time").unwrap().unwrap();
    let mut rest = Vec::new();
    let closed = tokio::time::timeout(patience, silent.read_to_end(&mut rest)).await.expect("in time");
    assert!(closed.is_err() || rest.is_empty());
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_at_once() {
    let server = Server::start(NodeState::default()).await;
    let mut held = Vec::new();
    for _ in 0..MONITORING_CONNECTIONS_MAX {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        stream.read_exact(&mut [0; 12]).await.unwrap();
        held.push(stream);
    }
    let mut one_too_many = TcpStream::connect(server.address).await.unwrap();
    let read = one_too_many.read(&mut [0; 1]).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}
