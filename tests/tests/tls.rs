//! TLS on real processes, with certificates that the example's script makes: who is let in, who is not and is told why,
//! and certificates that are replaced while everything runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use d_engine_client::{Client, Error, ErrorKind, Outcome, TlsOptions};
use d_engine_proto::v1;
use d_engine_proto::v1::peer_client::PeerClient;
use d_engine_proto::{DetailedStatus, ErrorCode};
use d_engine_tests::cluster::{Cluster, Node, Shape};
use d_engine_tests::wall_clock::libfaketime;
use d_engine_tests::{http, wait};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

const PEER_NAME: &str = "peer.d-engine";

/// Two CAs and what they issued, in a directory of its own.
struct Pki {
    directory: TempDir,
    hosts: String,
}

impl Pki {
    /// CAs, and certificates for three nodes at `host` and for a client.
    fn new(host: IpAddr) -> Self {
        let pki = Self { directory: tempfile::tempdir().unwrap(), hosts: format!("localhost {host}") };
        pki.make(&["all"]);
        pki
    }

    fn make(&self, arguments: &[&str]) {
        self.make_with(&[], arguments);
    }

    /// Makes one that has expired.
    fn make_old(&self, arguments: &[&str]) {
        let library = libfaketime();
        let three_days_ago = [("LD_PRELOAD", library.to_str().unwrap()), ("FAKETIME", "-3d"), ("DAYS", "1")];
        self.make_with(&three_days_ago, arguments);
    }

    fn make_with(&self, environment: &[(&str, &str)], arguments: &[&str]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tls/make-certificates");
        let mut command = Command::new(script);
        command.args(arguments).current_dir(self.directory.path()).env("HOSTS", &self.hosts);
        let output = command.envs(environment.iter().copied()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join("certificates").join(file)
    }

    fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).unwrap()
    }

    fn leaf(&self, name: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.path(&format!("{name}.pem"))).unwrap()
    }

    /// The part of a node's configuration that makes it `name` of this.
    fn toml(&self, name: &str) -> String {
        format!(
            "[tls]\ncert_file = {:?}\nkey_file = {:?}\nclient_ca_file = {:?}\npeer_ca_file = {:?}\n\
             peer_name = \"{PEER_NAME}\"\nreload_interval_ms = 100\n",
            self.path(&format!("{name}.pem")),
            self.path(&format!("{name}.key")),
            self.path("client-ca.pem"),
            self.path("peer-ca.pem"),
        )
    }

    /// A client that trusts this and shows nothing.
    fn trusting(&self) -> TlsOptions {
        TlsOptions::new().ca_file(self.path("peer-ca.pem"))
    }

    fn showing(&self, name: &str) -> TlsOptions {
        let (certificate, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        self.trusting().identity_files(certificate, key)
    }

    /// The same for those who speak to a port directly.
    fn connector(&self, shown: Option<(&Pki, &str)>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.leaf("peer-ca")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(roots);
        let config = match shown {
            None => config.with_no_client_auth(),
            Some((pki, name)) => {
                let key = PrivateKeyDer::from_pem_file(pki.path(&format!("{name}.key"))).unwrap();
                config.with_client_auth_cert(vec![pki.leaf(name)], key).unwrap()
            }
        };
        TlsConnector::from(Arc::new(config))
    }
}

fn members(cluster: &Cluster) -> Vec<(u32, SocketAddr)> {
    cluster.nodes().iter().map(|node| (node.id, node.address)).collect()
}

/// A cluster that is not started yet, each of whose nodes has its certificate, and `extra` below it.
async fn prepare(nodes: u32, extra: &str) -> (Cluster, Pki) {
    let cluster = Cluster::prepare(Shape { nodes, ..Shape::default() }).await;
    let pki = Pki::new(cluster.node(1).address.ip());
    for node in cluster.nodes() {
        node.write_config(&members(&cluster), &format!("{}{extra}", pki.toml(&format!("n{}", node.id))));
    }
    (cluster, pki)
}

async fn start(nodes: u32, extra: &str) -> (Cluster, Pki) {
    let (mut cluster, pki) = prepare(nodes, extra).await;
    cluster.start_all().await;
    (cluster, pki)
}

fn client(addresses: &[String], tls: TlsOptions) -> Client {
    let builder = Client::builder().endpoints(addresses.iter().map(|address| format!("https://{address}")));
    builder.tls(tls).call_timeout(wait::PATIENCE).build().unwrap()
}

async fn metric(node: &Node, name: &str) -> u64 {
    let (_, text) = http::get(node.http_address, "/metrics").await.unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(&format!("d_engine_{name} ")));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
}

async fn metric_reaches(node: &Node, name: &str, least: u64) {
    let what = format!("{name} of node {} to reach {least}", node.id);
    wait::until(&what, wait::PATIENCE, || async { (metric(node, name).await >= least).then_some(()) }).await;
}

/// One of a node's counters; 0 before it has one to show.
async fn counter(node: &Node, name: &str) -> u64 {
    let (_, text) = http::get(node.http_address, "/metrics").await.unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0, |value| value.trim_end_matches(".0").parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_away_for_long_gets_its_snapshot_through_tls() {
    let extra = "[raft.snapshot]\nmax_log_entries_before_snapshot = 50\nretained_log_entries = 0\n\
                 [raft.read_consistency]\nlease_duration_ms = 1500\n";
    let (mut cluster, pki) = start(3, extra).await;
    let client = client(&cluster.addresses(), pki.showing("client"));
    client.put("key", "before").await.unwrap();
    let away = cluster.leader(&[]).await % 3 + 1;
    cluster.node_mut(away).stop().await;
    let left: Vec<u32> = cluster.nodes().iter().map(|node| node.id).filter(|id| *id != away).collect();
    let missed = counter(cluster.node(left[0]), "d_engine_raft_applied_index").await + 1;
    // More than one piece of a snapshot.
    let mut written = 0;
    wait::until("the log to be purged", wait::PATIENCE, || {
        written += 1;
        let put = client.put(format!("large/{}", written % 20), "x".repeat(100_000));
        let (cluster, left) = (&cluster, &left);
        async move {
            put.await.unwrap();
            for id in left {
                if counter(cluster.node(*id), "d_engine_raft_purged_index").await < missed {
                    return None;
                }
            }
            (written > 20).then_some(())
        }
    })
    .await;
    client.put("key", "after").await.unwrap();
    cluster.node_mut(away).start();
    cluster.node_mut(away).ready().await;
    let node = cluster.node(away);
    assert!(counter(node, "d_engine_snapshots_installed_total").await > 0, "it got there without a snapshot");
    assert!(counter(node, "d_engine_snapshot_received_bytes_total").await > 1_000_000, "in many pieces");
    let found = client.get("key").await.unwrap().into_value();
    assert_eq!(found.as_deref(), Some(&b"after"[..]));
    // Alone with one other it has what it got.
    cluster.node_mut(left[0]).kill();
    assert_eq!(client.get("large/1").await.unwrap().into_value().map(|value| value.len()), Some(100_000));
    assert_eq!(client.get("key").await.unwrap().into_value().as_deref(), Some(&b"after"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_works_over_mutual_tls_also_when_the_leader_is_lost() {
    let (mut cluster, pki) = start(3, "").await;
    let client = client(&cluster.addresses()[..1], pki.showing("client"));
    let mut watch = client.watch("key").await.unwrap();
    client.put("key", "1").await.unwrap();
    assert_eq!(client.get("key").await.unwrap().into_value().as_deref(), Some(&b"1"[..]));
    let members = client.members().await.unwrap();
    assert_eq!(members.members.len(), 3);

    let leader = cluster.leader(&[]).await;
    cluster.node_mut(leader).kill();
    client.put("key", "2").await.unwrap();
    assert_eq!(client.get("key").await.unwrap().into_value().as_deref(), Some(&b"2"[..]));
    cluster.node_mut(leader).start();
    cluster.node_mut(leader).ready().await;
    let mut seen = 0;
    while seen < 2 {
        let update = tokio::time::timeout(wait::PATIENCE, watch.next()).await.expect("an update in time");
        seen += update.expect("the watch goes on").expect("no error").events.len();
    }
    cluster.check_alive();
}

/// Waits for the error of a call, which comes within the call's time and says `words`; nothing was applied.
async fn is_refused(endpoint: String, tls: Option<TlsOptions>, words: &[&str]) {
    let builder = Client::builder().endpoints([endpoint]).call_timeout(Duration::from_secs(3)).sessions(false);
    let builder = builder.connect_timeout(Duration::from_secs(2));
    let builder = tls.into_iter().fold(builder, |builder, tls| builder.tls(tls));
    let client = builder.build().unwrap();
    let ended = tokio::time::timeout(wait::PATIENCE, client.put("key", "value")).await.expect("a call ends in time");
    let error: Error = ended.expect_err("it must not be let in");
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotApplied), "{error}");
    for word in words {
        assert!(error.to_string().contains(word), "{word:?} is missing in: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_refused_is_told_why() {
    let (cluster, pki) = start(1, "").await;
    let node = cluster.node(1);
    let address = node.address.to_string();
    let stranger = Pki::new(node.address.ip());
    pki.make_old(&["client", "old"]);
    is_refused(address.clone(), Some(pki.trusting()), &["asks for a client certificate", "TLS options"]).await;
    let foreign = pki.trusting().identity_files(stranger.path("client.pem"), stranger.path("client.key"));
    is_refused(address.clone(), Some(foreign), &["client certificate", "unknown issuer"]).await;
    is_refused(address.clone(), Some(pki.showing("old")), &["client certificate", "expired"]).await;
    is_refused(address.clone(), Some(stranger.showing("client")), &["server's certificate", "unknown issuer"]).await;
    let misnamed = pki.showing("client").server_name("elsewhere.example");
    is_refused(address.clone(), Some(misnamed), &["for another name", "elsewhere.example"]).await;
    is_refused(address.clone(), None, &["speaks TLS", "TLS options"]).await;
    for line in ["does not speak TLS", "its certificate is refused", "shows no certificate"] {
        // One line a second, and there were several: what was not told yet is told when it comes again.
        let again = async || match line {
            "does not speak TLS" => is_refused(address.clone(), None, &[]).await,
            "shows no certificate" => is_refused(address.clone(), Some(pki.trusting()), &[]).await,
            _ => is_refused(address.clone(), Some(pki.showing("old")), &[]).await,
        };
        while !node.output().contains(line) {
            again().await;
        }
    }
    client(std::slice::from_ref(&address), pki.showing("client")).put("key", "value").await.unwrap();
    drop(cluster);

    let plain = Cluster::start(1).await;
    let address = plain.node(1).address.to_string();
    is_refused(address, Some(pki.trusting()), &["does not speak TLS"]).await;
}

/// Connects by TLS and nothing more, so that gRPC is up to the test.
#[derive(Clone)]
struct Through {
    connector: TlsConnector,
    address: SocketAddr,
}

impl Through {
    async fn connect(self) -> std::io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(self.address).await?;
        self.connector.connect(ServerName::from(self.address.ip()), tcp).await
    }
}

impl Service<Uri> for Through {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connecting = self.clone().connect();
        Box::pin(async move { connecting.await.map(TokioIo::new) })
    }
}

async fn peer(through: Through) -> PeerClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("https://{}", through.address)).unwrap();
    PeerClient::new(endpoint.connect_with_connector(through).await.unwrap())
}

/// What each method of the Peer service answers.
async fn answers(peer: &mut PeerClient<Channel>) -> Vec<(&'static str, Status)> {
    let mut answers = Vec::new();
    let mut note = |method, result: Result<(), Status>| {
        answers.push((method, result.err().unwrap_or_else(|| Status::ok("answered"))));
    };
    note("Hello", peer.hello(v1::HelloRequest::default()).await.map(drop));
    note("Vote", peer.vote(v1::VoteRequest::default()).await.map(drop));
    note("PreVote", peer.pre_vote(v1::VoteRequest::default()).await.map(drop));
    note("TransferLeader", peer.transfer_leader(v1::TransferLeaderRequest::default()).await.map(drop));
    note("ReadIndex", peer.read_index(v1::ReadIndexRequest::default()).await.map(drop));
    let request = tonic::codegen::tokio_stream::iter([v1::AppendRequest::default()]);
    note("Append", peer.append(request).await.map(drop));
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_members_speak_to_members() {
    let (cluster, pki) = start(1, "client_auth = \"optional\"\n").await;
    let node = cluster.node(1);
    pki.make_with(&[("PEER_NAME", "")], &["node", "nameless"]);
    pki.make_with(&[("PEER_NAME", "*.d-engine")], &["node", "wildcard"]);
    // Somebody may get the name of a member from the CA of clients; that makes him none.
    std::fs::rename(pki.path("peer-ca.pem"), pki.path("kept.pem")).unwrap();
    std::fs::rename(pki.path("peer-ca.key"), pki.path("kept.key")).unwrap();
    std::fs::copy(pki.path("client-ca.pem"), pki.path("peer-ca.pem")).unwrap();
    std::fs::copy(pki.path("client-ca.key"), pki.path("peer-ca.key")).unwrap();
    pki.make(&["node", "pretender"]);
    std::fs::rename(pki.path("kept.pem"), pki.path("peer-ca.pem")).unwrap();
    std::fs::rename(pki.path("kept.key"), pki.path("peer-ca.key")).unwrap();

    for shown in [None, Some("client"), Some("nameless"), Some("wildcard"), Some("pretender")] {
        let connector = pki.connector(shown.map(|name| (&pki, name)));
        let mut peer = peer(Through { connector, address: node.address }).await;
        for (method, status) in answers(&mut peer).await {
            assert_eq!(status.code(), Code::FailedPrecondition, "{shown:?} calls {method}: {status:?}");
            let detail = DetailedStatus::from_status(&status).expect("details");
            assert_eq!(detail.code(), Some(ErrorCode::FailedPrecondition));
            assert!(status.message().contains(PEER_NAME), "{status:?}");
        }
    }
    let mut member = peer(Through { connector: pki.connector(Some((&pki, "n1"))), address: node.address }).await;
    for (method, status) in answers(&mut member).await {
        assert!(!status.message().contains(PEER_NAME), "a member calls {method}: {status:?}");
    }
    assert!(metric(node, "tls_refused_total").await >= 30);
    assert!(node.output().contains("a call between members needs"), "{}", node.output());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_ca_stays_out_until_its_certificates_are_right() {
    let (mut cluster, pki) = start(3, "").await;
    let stranger = Pki::new(cluster.node(1).address.ip());
    cluster.node_mut(3).stop().await;
    cluster.node(3).write_config(&members(&cluster), &stranger.toml("n3"));
    let before = metric(cluster.node(1), "raft_applied_index").await;
    cluster.node_mut(3).start();
    let client = client(&cluster.addresses()[..2], pki.showing("client"));
    for number in 0..50 {
        client.put("key", number.to_string()).await.unwrap();
    }
    assert!(metric(cluster.node(1), "raft_applied_index").await > before);
    // Each side says that it refuses the other.
    wait::until("the strangers to tell of each other", wait::PATIENCE, || async {
        let refused = cluster.node(3).output().contains("no TLS connection to a peer");
        let refuses = [1, 2].iter().any(|id| cluster.node(*id).output().contains("no TLS connection to a peer"));
        (refused && refuses).then_some(())
    })
    .await;
    assert!(matches!(http::get(cluster.node(3).http_address, "/ready").await, Ok((503, _))));
    let leader = cluster.leader(&[3]).await;
    assert_ne!(leader, 3);

    for file in ["n3.pem", "n3.key", "peer-ca.pem", "client-ca.pem"] {
        std::fs::write(stranger.path(file), pki.read(file)).unwrap();
    }
    cluster.node_mut(3).ready().await;
    let third = self::client(&cluster.addresses()[2..], pki.showing("client"));
    assert_eq!(third.get("key").await.unwrap().into_value().as_deref(), Some(&b"49"[..]));
    cluster.check_alive();
}

/// What a node shows to those who connect now.
async fn shown_by(node: &Node, pki: &Pki) -> CertificateDer<'static> {
    let through = Through { connector: pki.connector(Some((pki, "client"))), address: node.address };
    let stream = through.connect().await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_replaced_under_load_without_a_failed_call() {
    let (mut cluster, pki) = start(3, "").await;
    let addresses = cluster.addresses();
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let steady = client(&addresses, pki.showing("client"));
    let tls = pki.showing("client");
    let load = tokio::spawn({
        let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
        async move {
            while !stop.load(Ordering::Relaxed) {
                steady.put("steady", "value").await.unwrap();
                // A newcomer makes a connection of its own, by the files as they are then.
                client(&addresses, tls.clone()).put("newcomer", "value").await.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let goes_on = async || {
        let enough = done.load(Ordering::Relaxed) + 3;
        wait::until("the load to go on", wait::PATIENCE, || async {
            (done.load(Ordering::Relaxed) >= enough).then_some(())
        })
        .await;
    };
    goes_on().await;

    // Another leaf, of the same CA.
    let first = pki.leaf("n1");
    assert_eq!(shown_by(cluster.node(1), &pki).await, first);
    for node in ["n1", "n2", "n3"] {
        pki.make(&["node", node]);
    }
    for node in cluster.nodes() {
        metric_reaches(node, "tls_reloads_total", 1).await;
    }
    assert_ne!(pki.leaf("n1"), first);
    assert_eq!(shown_by(cluster.node(1), &pki).await, pki.leaf("n1"));
    goes_on().await;

    // Files that do not serve: the log says why, and what was in force stays so.
    let good = pki.read("n1.pem");
    for (broken, reason) in [
        (&b"-----BEGIN CERTIFICATE-----\nnothing\n"[..], "cannot be read as PEM"),
        (&pki.read("n2.pem")[..], "it is not the key of tls.cert_file"),
    ] {
        let failures = metric(cluster.node(1), "tls_reload_failures_total").await;
        replace(&pki.path("n1.pem"), broken);
        metric_reaches(cluster.node(1), "tls_reload_failures_total", failures + 1).await;
        assert!(cluster.node(1).output().contains(reason), "{}", cluster.node(1).output());
        replace(&pki.path("n1.pem"), &good);
        assert_eq!(shown_by(cluster.node(1), &pki).await, pki.leaf("n1"));
    }
    goes_on().await;

    // Another CA: trusted first, then used, then alone.
    let next = Pki::new(cluster.node(1).address.ip());
    let both = [pki.read("peer-ca.pem"), next.read("peer-ca.pem")].concat();
    replace(&pki.path("peer-ca.pem"), &both);
    for node in cluster.nodes() {
        metric_reaches(node, "tls_reloads_total", 2).await;
    }
    goes_on().await;
    for node in ["n1", "n2", "n3"] {
        let reloads = metric(cluster.node(1), "tls_reloads_total").await;
        replace(&pki.path(&format!("{node}.key")), &next.read(&format!("{node}.key")));
        replace(&pki.path(&format!("{node}.pem")), &next.read(&format!("{node}.pem")));
        if node == "n1" {
            metric_reaches(cluster.node(1), "tls_reloads_total", reloads + 1).await;
        }
    }
    for node in cluster.nodes() {
        metric_reaches(node, "tls_reloads_total", 3).await;
    }
    replace(&pki.path("peer-ca.pem"), &next.read("peer-ca.pem"));
    for node in cluster.nodes() {
        metric_reaches(node, "tls_reloads_total", 4).await;
    }
    assert_eq!(shown_by(cluster.node(1), &pki).await, next.leaf("n1"));
    goes_on().await;
    // Whoever starts now has nothing of the old CA.
    let follower = (1..=3).find(|id| *id != 1).unwrap();
    cluster.node_mut(follower).stop().await;
    cluster.node_mut(follower).start();
    cluster.node_mut(follower).ready().await;
    goes_on().await;
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    cluster.check_alive();
}

/// Puts a file in the place of another in one step.
fn replace(path: &Path, bytes: &[u8]) {
    let new = path.with_extension("new");
    std::fs::write(&new, bytes).unwrap();
    std::fs::rename(new, path).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_never_speak_tls_give_their_places_back() {
    const ROOM: usize = 12;
    let (cluster, pki) = start(1, &format!("[network]\nconnections_max = {ROOM}\n")).await;
    let node = cluster.node(1);
    let mut silent = Vec::new();
    for _ in 0..ROOM {
        silent.push(TcpStream::connect(node.address).await.unwrap());
    }
    metric_reaches(node, "connections", ROOM as u64).await;
    // They are still open at this end; the places come back all the same.
    wait::until("the silent ones to be given up", wait::PATIENCE, || async {
        (metric(node, "connections").await == 0).then_some(())
    })
    .await;
    for _ in 0..ROOM {
        let mut noisy = TcpStream::connect(node.address).await.unwrap();
        noisy.write_all(&[0x42; 4096]).await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(wait::PATIENCE, noisy.read_to_end(&mut answer)).await.expect("it is closed");
    }
    let client = client(&[node.address.to_string()], pki.showing("client"));
    client.put("key", "value").await.unwrap();
    drop(silent);
}

#[tokio::test]
async fn files_that_do_not_serve_are_refused_at_start() {
    let (mut cluster, pki) = prepare(1, "").await;
    pki.make_with(&[("PEER_NAME", "")], &["node", "nameless"]);
    pki.make_old(&["node", "old"]);
    std::fs::write(pki.path("empty.pem"), "nothing\n").unwrap();
    let good = pki.toml("n1");
    for (extra, words) in [
        (good.replace("n1.pem", "absent.pem"), ["tls.cert_file", "absent.pem", "cannot be read"]),
        (good.replace("n1.pem", "empty.pem"), ["tls.cert_file", "empty.pem", "no certificate in it"]),
        (good.replace("n1.key", "n2.key"), ["tls.key_file", "n2.key", "not the key of tls.cert_file"]),
        (good.replace("peer-ca.pem", "empty.pem"), ["tls.peer_ca_file", "empty.pem", "no certificate in it"]),
        (good.replace("peer-ca.pem", "client-ca.pem"), ["tls.cert_file", "peers would refuse it", "UnknownIssuer"]),
        (pki.toml("nameless"), ["tls.cert_file", "peers would refuse it", PEER_NAME]),
        (pki.toml("old"), ["tls.cert_file", "old.pem", "it expired at"]),
    ] {
        let node = cluster.node(1);
        node.write_config(&members(&cluster), &extra);
        cluster.node_mut(1).start();
        let (success, output) = cluster.node_mut(1).exit().await;
        assert!(!success && !output.contains("panicked"), "{output}");
        for word in words {
            assert!(output.contains(word), "{word:?} is missing in:\n{output}");
        }
        std::fs::remove_file(cluster.node(1).config().with_file_name("output.log")).unwrap();
    }
}
