//! Both programs against a real cluster that loses its leader, and an instance that dies without a word.
#![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

use std::path::Path;
use std::time::Duration;

use d_engine_tests::cluster::Cluster;
use d_engine_tests::process::{Process, bound_to_this_thread};
use d_engine_tests::wait::{self, PATIENCE};

const SERVICE: &str = "services/api-gateway";

/// Programs that talk to one cluster.
struct Programs {
    endpoints: String,
    directory: std::path::PathBuf,
}

impl Programs {
    fn of(cluster: &Cluster) -> Self {
        Self { endpoints: cluster.addresses().join(","), directory: cluster.directory().to_owned() }
    }

    fn start(&self, program: &str, name: &str, arguments: &[&str]) -> Process {
        let mut command = bound_to_this_thread(Path::new(program));
        command.args(arguments).args(["--endpoints", &self.endpoints]);
        Process::start(command, &self.directory.join(name))
    }

    fn watcher(&self, name: &str, keys: &[&str]) -> Process {
        self.start(env!("CARGO_BIN_EXE_watcher"), name, keys)
    }

    fn admin(&self, verb: &str, instance: &str, more: &[&str]) -> Process {
        let arguments = [&[verb, "--name", "api-gateway", "--instance", instance], more].concat();
        self.start(env!("CARGO_BIN_EXE_admin"), &format!("{verb}-{instance}"), &arguments)
    }
}

/// Waits until the watcher has printed the line.
async fn sees(watcher: &Process, line: &str) {
    let what = format!("the watcher to print {line}");
    wait::until(&what, PATIENCE, || async { watcher.output().lines().any(|found| found == line).then_some(()) }).await;
}

async fn succeeds(mut program: Process) {
    let status = program.exit(PATIENCE).await;
    assert!(status.success(), "{}", program.output());
}

#[tokio::test]
async fn a_watcher_sees_every_registration_and_loss_once_and_in_order() {
    let mut cluster = Cluster::start(3).await;
    let programs = Programs::of(&cluster);
    let endpoint = |port: u16| format!("192.168.1.10:{port}");
    let put = |instance: &str, port: u16| format!("[PUT] {SERVICE}/{instance} = {}", endpoint(port));
    let delete = |instance: &str| format!("[DELETE] {SERVICE}/{instance}");

    // What is there before the watcher is read, not watched.
    succeeds(programs.admin("register", "node1", &["--endpoint", &endpoint(8081)])).await;
    let all = programs.watcher("all", &["--prefix", "services/"]);
    let one = programs.watcher("one", &["--key", "services/api-gateway/node1"]);
    sees(&all, &put("node1", 8081)).await;
    sees(&one, &put("node1", 8081)).await;

    let mut kept = programs.admin("register", "node2", &["--endpoint", &endpoint(8082), "--ttl", "3s"]);
    sees(&all, &put("node2", 8082)).await;

    let leader = cluster.leader(&[]).await;
    cluster.node_mut(leader).kill();
    succeeds(programs.admin("register", "node3", &["--endpoint", &endpoint(8083)])).await;
    sees(&all, &put("node3", 8083)).await;
    // Longer than the time to live: it is the program that keeps its instance.
    wait::pass(Duration::from_secs(4)).await;
    assert!(!all.output().contains(&delete("node2")), "{}", all.output());

    kept.kill();
    sees(&all, &delete("node2")).await;
    succeeds(programs.admin("unregister", "node1", &[])).await;
    sees(&all, &delete("node1")).await;
    sees(&one, &delete("node1")).await;

    // Told to end, it takes its instance out itself, long before the time to live is over.
    let mut ending = programs.admin("register", "node4", &["--endpoint", &endpoint(8084), "--ttl", "3600s"]);
    sees(&all, &put("node4", 8084)).await;
    let status = ending.stop(PATIENCE).await;
    assert!(status.success(), "{}", ending.output());
    sees(&all, &delete("node4")).await;

    let expected = [
        put("node1", 8081),
        put("node2", 8082),
        put("node3", 8083),
        delete("node2"),
        delete("node1"),
        put("node4", 8084),
        delete("node4"),
    ];
    assert_eq!(all.output().lines().collect::<Vec<_>>(), expected);
    assert_eq!(one.output().lines().collect::<Vec<_>>(), [put("node1", 8081), delete("node1")]);
}
