//! The service in three processes, alone and behind a real HAProxy, whose leader is killed.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use d_engine_tests::http;
use d_engine_tests::process::{Process, bound_to_this_thread};
use d_engine_tests::wait::{self, PATIENCE};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

/// One service after the other: their timing matters more than the tests' duration.
static TURN: Mutex<()> = Mutex::const_new(());

const EXAMPLE: &str = env!("CARGO_MANIFEST_DIR");

/// Three programs on a loopback address of their own, at the ports that the example names.
struct Service {
    host: Ipv4Addr,
    nodes: Vec<Option<Process>>,
    directory: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Service {
    async fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("d-engine-three-embedded-").tempdir().unwrap();
        let turn = TURN.lock().await;
        let process = std::process::id();
        let host = (200..=u8::MAX)
            .map(|net| Ipv4Addr::new(127, net, (process >> 8) as u8, (process as u8).max(1)))
            .find(|host| TcpListener::bind((*host, 8081)).is_ok())
            .unwrap();
        let mut service = Self { host, nodes: Vec::new(), directory, _turn: turn };
        for id in 1..=3 {
            let node = service.run(id);
            service.nodes.push(Some(node));
        }
        for id in 1..=3 {
            let address = service.address(10_000 + id);
            wait::until("a node to be ready", PATIENCE, || async {
                matches!(http::get(address, "/ready").await, Ok((200, _))).then_some(())
            })
            .await;
        }
        service
    }

    /// Runs a node by the example's own configuration, moved to this host and directory.
    fn run(&self, id: u16) -> Process {
        let config = std::fs::read_to_string(format!("{EXAMPLE}/config/n{id}.toml")).unwrap();
        let path = self.directory.path().join(format!("n{id}"));
        std::fs::write(path.with_extension("toml"), config.replace("127.0.0.1", &self.host.to_string())).unwrap();
        let mut command = bound_to_this_thread(Path::new(env!("CARGO_BIN_EXE_d-engine-example-three-nodes-embedded")));
        let ports = [("--port", 8080 + id), ("--health-port", 10_000 + id)];
        command.current_dir(&self.directory).arg("--config-path").arg(path).args(["--host", &self.host.to_string()]);
        command.args(ports.into_iter().flat_map(|(name, port)| [name.to_owned(), port.to_string()]));
        Process::start(command, &self.directory.path().join(format!("n{id}.log")))
    }

    fn address(&self, port: u16) -> SocketAddr {
        (self.host, port).into()
    }

    async fn leader(&self) -> u16 {
        wait::until("a leader", PATIENCE, || async {
            for id in 1..=3 {
                if matches!(http::get(self.address(10_000 + id), "/primary").await, Ok((200, _))) {
                    return Some(id);
                }
            }
            None
        })
        .await
    }

    /// The status of `POST /kv`, and where it redirects to, by Debian's curl as a user would.
    async fn put(&self, port: u16, key: &str, value: &str, query: &str) -> (u16, String) {
        let url = format!("http://{}/kv{query}", self.address(port));
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--max-time", "5", "--json", &json!({"key": key, "value": value}).to_string()]);
        curl.args(["--output", "/dev/null", "--write-out", "%{http_code} %{redirect_url}", &url]);
        let output = tokio::task::spawn_blocking(move || curl.output()).await.unwrap().expect("curl runs");
        let text = String::from_utf8(output.stdout).unwrap();
        let (status, target) = text.split_once(' ').unwrap();
        (status.parse().unwrap(), target.to_owned())
    }

    async fn get(&self, port: u16, key: &str) -> (u16, Value) {
        let (status, body) = http::get(self.address(port), &format!("/kv/{key}")).await.unwrap();
        (status, serde_json::from_str(&body).unwrap_or_default())
    }
}

#[tokio::test]
async fn any_node_takes_writes_and_reads_and_tells_what_it_is() {
    let service = Service::start().await;
    let leader = service.leader().await;
    for id in 1..=3 {
        let leads = id == leader;
        for (path, is_so) in [("/primary", leads), ("/replica", !leads)] {
            let (status, _) = http::get(service.address(10_000 + id), path).await.unwrap();
            assert_eq!(status, if is_so { 200 } else { 503 }, "{path} of node {id}, and {leader} leads");
        }
        let (key, value) = (format!("written-at-{id}"), format!("value {id}"));
        wait::until("a write", PATIENCE, || async {
            (service.put(8080 + id, &key, &value, "").await.0 == 200).then_some(())
        })
        .await;
        for reader in 1..=3 {
            assert_eq!(service.get(8080 + reader, &key).await, (200, json!({ "value": value })));
        }
        let (status, target) = service.put(8080 + id, "k", "v", "?redirect=true").await;
        let expected = format!("http://{}/kv", service.address(8080 + leader));
        assert_eq!((status, &*target), if leads { (200, "") } else { (307, &*expected) });
    }
    assert_eq!(service.get(8081, "nothing").await, (404, json!({ "value": null })));
    assert_eq!(service.put(8081, "", "no key", "").await.0, 400);
}

/// Kills the leader behind HAProxy under a steady stream of writes, and reports for how long they fail.
#[tokio::test]
async fn writes_through_haproxy_go_on_when_the_leader_dies() {
    let mut service = Service::start().await;
    let host = service.host.to_string();
    let config = format!("{EXAMPLE}/haproxy.cfg");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "haproxy", "-db", "-f", &config]).env("HOST", &host);
    let _haproxy = Process::start(command, &service.directory.path().join("haproxy.log"));
    wait::until("HAProxy to know who is who", PATIENCE, || async {
        let (put, _) = service.put(8080, "first", "write", "").await;
        let read = http::get(service.address(8080), "/kv/first").await;
        (put == 200 && matches!(read, Ok((200, _)))).then_some(())
    })
    .await;

    let mut outages = Vec::new();
    let mut acknowledged = 0;
    for _ in 0..3 {
        let leader = service.leader().await;
        let dead = service.nodes[usize::from(leader) - 1].take();
        drop(dead);
        let killed = Instant::now();
        wait::until("a write after the leader's death", PATIENCE, || async {
            (service.put(8080, &format!("key-{acknowledged}"), "kept", "").await.0 == 200).then_some(())
        })
        .await;
        outages.push(killed.elapsed());
        for _ in 0..20 {
            // A busy machine may cost the new leader its lease for a moment.
            wait::until("a write", PATIENCE, || async {
                (service.put(8080, &format!("key-{acknowledged}"), "kept", "").await.0 == 200).then_some(())
            })
            .await;
            acknowledged += 1;
        }
        let again = service.run(leader);
        service.nodes[usize::from(leader) - 1] = Some(again);
        let address = service.address(10_000 + leader);
        wait::until("it to follow", PATIENCE, || async {
            matches!(http::get(address, "/replica").await, Ok((200, _))).then_some(())
        })
        .await;
    }
    let milliseconds: Vec<u128> = outages.iter().map(Duration::as_millis).collect();
    println!("writes through HAProxy failed for {milliseconds:?} ms after the leader was killed");
    for key in 0..acknowledged {
        let found = wait::until("a read", PATIENCE, || async {
            let (status, found) = service.get(8080, &format!("key-{key}")).await;
            [200, 404].contains(&status).then_some(found)
        })
        .await;
        assert_eq!(found, json!({ "value": "kept" }), "key-{key} was acknowledged");
    }
}
