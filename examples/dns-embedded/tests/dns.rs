//! Three real servers asked by `dig`: what changes in the store changes in their answers, and they answer while the
//! cluster has no quorum.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use d_engine_client::Client;
use d_engine_tests::process::{Process, bound_to_this_thread};
use d_engine_tests::transcript;
use d_engine_tests::wait::{self, PATIENCE};
use tempfile::TempDir;
use tokio::net::UdpSocket;

const NODES: u16 = 3;

struct Servers {
    ip: Ipv4Addr,
    directory: TempDir,
    processes: BTreeMap<u16, Process>,
    client: Client,
}

impl Servers {
    async fn start() -> Self {
        // All of 127.0.0.0/8 is this machine; nobody else listens at this test's address.
        let [.., high, low] = std::process::id().to_be_bytes();
        let ip = Ipv4Addr::new(127, 91, high, low);
        let directory = tempfile::tempdir().unwrap();
        let members: Vec<String> =
            (1..=NODES).map(|node| format!("{{ id = {node}, address = \"{ip}:{}\" }}", 9580 + node)).collect();
        for node in 1..=NODES {
            let text = format!(
                "[cluster]\nnode_id = {node}\ninitial_cluster = [{}]\ndb_root_dir = \"{}\"\n\
                 [raft.read_consistency]\ndefault_policy = \"EventualConsistency\"\n",
                members.join(", "),
                directory.path().join(format!("data{node}")).display(),
            );
            std::fs::write(directory.path().join(format!("n{node}.toml")), text).unwrap();
        }
        let client = Client::builder().endpoints((1..=NODES).map(|node| format!("{ip}:{}", 9580 + node)));
        let client = client.call_timeout(Duration::from_secs(2)).build().unwrap();
        let mut servers = Self { ip, directory, processes: BTreeMap::new(), client };
        for node in 1..=NODES {
            servers.start_one(node);
        }
        for node in 1..=NODES {
            servers.ready(node).await;
        }
        servers
    }

    fn start_one(&mut self, node: u16) {
        let mut command = bound_to_this_thread(Path::new(env!("CARGO_BIN_EXE_dns-embedded")));
        command.arg("--config").arg(self.directory.path().join(format!("n{node}")));
        command.args(["--listen", &self.address(node).to_string()]);
        // Each run in a log of its own: the line that it serves must be its own, too.
        let log = self.directory.path().join(format!("log{node}"));
        let _ = std::fs::remove_file(&log);
        self.processes.insert(node, Process::start(command, &log));
    }

    async fn ready(&mut self, node: u16) {
        let process = self.processes.get_mut(&node).unwrap();
        wait::until("a server to serve", PATIENCE, || {
            assert!(process.ended().is_none(), "it ended:\n{}", process.output());
            let serves = process.output().contains("serves example.test.");
            async move { serves.then_some(()) }
        })
        .await;
    }

    fn kill(&mut self, node: u16) {
        self.processes.remove(&node).unwrap().kill();
    }

    fn address(&self, node: u16) -> SocketAddr {
        (self.ip, 5300 + node).into()
    }

    /// Everything that `dig` prints.
    fn dig(&self, node: u16, question: &[&str]) -> String {
        let address = self.address(node);
        let at = [format!("@{}", address.ip()), "-p".to_owned(), address.port().to_string()];
        let output = Command::new("dig").args(at).args(["+time=2", "+tries=2", "+noedns"]).args(question).output();
        String::from_utf8(output.expect("dig is installed: scripts/setup test").stdout).unwrap()
    }

    fn short(&self, node: u16, question: &[&str]) -> Vec<String> {
        let mut answer: Vec<_> = self.dig(node, &[&["+short"], question].concat()).lines().map(str::to_owned).collect();
        answer.sort();
        answer
    }

    /// Waits until every running server gives this short answer.
    async fn say(&self, question: &[&str], expected: &[&str]) {
        for node in self.processes.keys() {
            wait::until(&format!("{question:?} to be {expected:?} at {node}"), PATIENCE, || async {
                (self.short(*node, question) == expected).then_some(())
            })
            .await;
        }
    }

    async fn put(&self, key: &str, value: &str) {
        let written = || async { self.client.put(key, value).await.ok() };
        wait::until("a write", PATIENCE, written).await;
    }
}

/// Asks for the address of `www` all the time until it is `expected`; returns when it was. Quicker than `dig` starts.
async fn changes_to(expected: Ipv4Addr, at: SocketAddr) -> Instant {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
    socket.connect(at).await.unwrap();
    let mut question = vec![0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    question.extend_from_slice(b"\x03www\x07example\x04test\x00\x00\x01\x00\x01");
    wait::until("a changed answer", PATIENCE, || async {
        socket.send(&question).await.ok()?;
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer).await.ok()?;
        // The address is the last thing in it.
        (answer[..length].ends_with(&expected.octets())).then(Instant::now)
    })
    .await
}

#[test]
fn the_readme_shows_what_happens() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = tempfile::tempdir().unwrap();
    for part in ["Makefile", "config"] {
        let copied = Command::new("cp").arg("-r").arg(example.join(part)).arg(directory.path()).status();
        assert!(copied.unwrap().success());
    }
    let session = transcript::session(&std::fs::read_to_string(example.join("README.md")).unwrap());
    assert!(session.len() > 3, "the README shows a session");
    let differences = transcript::run(&session, directory.path());
    assert!(differences.is_empty(), "the README shows what is not so:\n{}", differences.join("\n"));
}

#[tokio::test]
async fn answers_follow_the_store_and_go_on_without_a_quorum() {
    let mut servers = Servers::start().await;
    servers.put("dns/www.example.test/A", "60 192.0.2.1\n60 192.0.2.2").await;
    servers.put("dns/alias.example.test./CNAME", "60 www.example.test.").await;
    servers.put("dns/example.test/MX", "60 10 mail.example.test.").await;
    servers.say(&["www.example.test", "A"], &["192.0.2.1", "192.0.2.2"]).await;
    servers.say(&["+tcp", "WWW.Example.Test", "A"], &["192.0.2.1", "192.0.2.2"]).await;
    servers.say(&["alias.example.test", "A"], &["192.0.2.1", "192.0.2.2", "www.example.test."]).await;
    servers.say(&["example.test", "MX"], &["10 mail.example.test."]).await;
    for node in 1..=NODES {
        let answer = servers.dig(node, &["www.example.test", "A"]);
        assert!(answer.contains("status: NOERROR") && answer.contains("flags: qr aa"), "{answer}");
        let other = servers.dig(node, &["www.example.test", "AAAA"]);
        assert!(other.contains("status: NOERROR") && other.contains("ANSWER: 0") && other.contains("SOA"), "{other}");
        let none = servers.dig(node, &["nobody.example.test", "A"]);
        assert!(none.contains("status: NXDOMAIN") && none.contains("SOA"), "{none}");
        let foreign = servers.dig(node, &["www.example.org", "A"]);
        assert!(foreign.contains("status: REFUSED"), "{foreign}");
    }
    servers.put("dns/www.example.test/A", "60 of no use").await;
    servers.say(&["www.example.test", "A"], &[]).await;

    let mut delays = Vec::new();
    for number in 0..100 {
        let address = Ipv4Addr::new(198, 51, 100, number);
        let asked: Vec<_> = (1..=NODES).map(|node| tokio::spawn(changes_to(address, servers.address(node)))).collect();
        let written = Instant::now();
        servers.client.put("dns/www.example.test/A", format!("1 {address}")).await.unwrap();
        for changed in asked {
            delays.push(changed.await.unwrap() - written);
        }
    }
    delays.sort();
    println!(
        "from the call that writes to the changed answer, of {}: half within {:?}, 99 of 100 within {:?}",
        delays.len(),
        delays[delays.len() / 2],
        delays[delays.len() * 99 / 100],
    );

    servers.put("dns/www.example.test/A", "60 192.0.2.3").await;
    servers.say(&["www.example.test", "A"], &["192.0.2.3"]).await;
    servers.kill(2);
    servers.kill(3);
    servers.client.put("dns/www.example.test/A", "60 192.0.2.4").await.expect_err("no quorum, no write");
    assert_eq!(servers.short(1, &["www.example.test", "A"]), ["192.0.2.3"], "it answers without a quorum");
    servers.kill(1);
    servers.start_one(1);
    servers.ready(1).await;
    assert_eq!(servers.short(1, &["www.example.test", "A"]), ["192.0.2.3"], "it starts without a quorum");

    servers.start_one(2);
    servers.start_one(3);
    servers.ready(2).await;
    servers.ready(3).await;
    servers.put("dns/www.example.test/A", "60 192.0.2.5").await;
    servers.say(&["www.example.test", "A"], &["192.0.2.5"]).await;
    wait::until("a deletion", PATIENCE, || async { servers.client.delete("dns/www.example.test/A").await.ok() }).await;
    servers.say(&["www.example.test", "A"], &[]).await;
    for mut server in std::mem::take(&mut servers.processes).into_values() {
        assert!(server.stop(PATIENCE).await.success(), "{}", server.output());
    }
}
