//! The systems side by side, each as three real processes with its default settings.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use d_engine_client::Client;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::process::d_engine;
use d_engine_tests::processes;

use super::client::AnyClient;
use super::etcd::{EtcdCluster, Release};

const NODES: u32 = 3;
/// Longer than any fail-over takes.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// A system that can be started.
#[derive(Clone, Debug)]
pub(crate) enum System {
    DEngine { version: String },
    Etcd(Release),
}

impl System {
    /// The server that the tests use.
    pub(crate) fn d_engine() -> Self {
        let output = Command::new(d_engine()).arg("--version").output().expect("d-engine tells its version");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Self::DEngine { version: text.trim().trim_start_matches("d-engine ").to_owned() }
    }

    /// As tables and pictures name it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::DEngine { .. } => "d-engine".to_owned(),
            Self::Etcd(release) => format!("etcd {}", release.version),
        }
    }

    /// Its name with its version.
    pub(crate) fn version(&self) -> String {
        match self {
            Self::DEngine { version } => format!("d-engine {version} ({})", d_engine().display()),
            Self::Etcd(release) => format!("etcd {} ({})", release.version, release.program.display()),
        }
    }

    /// Starts a fresh cluster.
    pub(crate) async fn start(&self) -> Servers {
        self.start_compacting(None).await
    }

    /// Starts a fresh cluster that keeps no more history than that, if it is told so.
    pub(crate) async fn start_compacting(&self, retention: Option<Duration>) -> Servers {
        match self {
            Self::DEngine { .. } => {
                let extra = retention.map_or_else(String::new, |retention| {
                    format!("[raft.state_machine.history]\nretention_ms = {}\n", retention.as_millis())
                });
                let mut cluster = Cluster::prepare(Shape { nodes: NODES, extra, ..Shape::default() }).await;
                cluster.start_all().await;
                Servers::DEngine(cluster)
            }
            Self::Etcd(release) => {
                let extra = retention.map(|retention| {
                    ["--auto-compaction-mode=periodic".to_owned(), format!("--auto-compaction-retention={retention:?}")]
                });
                Servers::Etcd(EtcdCluster::start(release, extra.as_ref().map_or(&[], |extra| &extra[..])).await)
            }
        }
    }
}

/// A cluster that runs, until dropped.
pub(crate) enum Servers {
    DEngine(Cluster),
    Etcd(EtcdCluster),
}

impl Servers {
    /// A client of it.
    pub(crate) async fn client(&mut self) -> AnyClient {
        match self {
            Self::DEngine(cluster) => {
                let builder = Client::builder().endpoints(cluster.addresses()).call_timeout(CALL_TIMEOUT);
                AnyClient::DEngine(builder.connect().await.expect("the cluster is ready"))
            }
            Self::Etcd(cluster) => AnyClient::Etcd(cluster.client().await),
        }
    }

    /// The processes.
    pub(crate) fn ids(&self) -> Vec<u32> {
        match self {
            Self::DEngine(_) => processes::servers(),
            Self::Etcd(cluster) => cluster.servers(),
        }
    }

    /// Resident memory of all processes.
    pub(crate) fn resident_mib(&self) -> f64 {
        mib(self.ids().into_iter().map(processes::resident_bytes).sum())
    }

    /// What is in all data directories.
    pub(crate) fn disk_mib(&self) -> f64 {
        let directories: Vec<PathBuf> = match self {
            Self::DEngine(cluster) => cluster.nodes().iter().map(|node| node.data()).collect(),
            Self::Etcd(cluster) => cluster.directories(),
        };
        mib(directories.iter().map(|directory| processes::directory_bytes(directory)).sum())
    }

    /// SIGKILL of the leader. Returns when it is gone.
    pub(crate) async fn kill_leader(&mut self) {
        match self {
            Self::DEngine(cluster) => {
                let leader = cluster.leader(&[]).await;
                cluster.node_mut(leader).kill();
            }
            Self::Etcd(cluster) => cluster.kill_leader().await,
        }
    }

    /// Starts what does not run, and waits until all serve.
    pub(crate) async fn start_all(&mut self) {
        match self {
            Self::DEngine(cluster) => cluster.start_all().await,
            Self::Etcd(cluster) => cluster.start_all().await,
        }
    }

    /// SIGTERM of every process, one after the other, and waits for their end.
    pub(crate) async fn stop_all(&mut self) {
        match self {
            Self::DEngine(cluster) => {
                let ids: Vec<u32> = cluster.nodes().iter().filter(|node| node.runs()).map(|node| node.id).collect();
                for id in ids {
                    cluster.node_mut(id).stop().await;
                }
            }
            Self::Etcd(cluster) => cluster.stop_all().await,
        }
    }
}

/// Bytes as the reports show them.
pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
