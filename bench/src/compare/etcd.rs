//! A cluster of etcd servers as real processes, and what the measurements ask of it.
//!
//! The stubs are generated from etcd's own protocol (`bench/proto/etcd.proto`) and used as a client library would use
//! them: one connection to each member, writes and linearizable reads sent to the leader, so that none is passed on. etcd runs with its default settings, but for a larger quota.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use d_engine_client::Consistency;
use d_engine_tests::cluster::{GRPC_PORT, HTTP_PORT, free_loopback};
use d_engine_tests::process::{Process, bound_to_this_thread};
use d_engine_tests::wait;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use super::client::{Call, expected};
use api::{compare, kv_client::KvClient, lease_client::LeaseClient, maintenance_client::MaintenanceClient};

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub(crate) mod api {
    include!("generated/etcdserverpb.rs");
}

const NODES: u16 = 3;
/// Bytes a member may store: the default is too small for a long run.
const QUOTA_BYTES: u64 = 8 << 30;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// An etcd to compare with: the program, and the version it says it is.
#[derive(Clone, Debug)]
pub(crate) struct Release {
    pub(crate) program: PathBuf,
    pub(crate) version: String,
}

impl Release {
    /// Asks the program for its version.
    pub(crate) fn of(program: &Path) -> Self {
        let output = Command::new(program)
            .arg("--version")
            .output()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}; `make bench` sets it up", program.display()));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.lines().find_map(|line| line.strip_prefix("etcd Version: "));
        let version = version.unwrap_or_else(|| panic!("{} is no etcd: it printed {text:?}", program.display()));
        Self { program: program.to_owned(), version: version.trim().to_owned() }
    }
}

/// Three members in directories of their own, killed on drop.
pub(crate) struct EtcdCluster {
    release: Release,
    extra: Vec<String>,
    ip: Ipv4Addr,
    members: Vec<Option<Process>>,
    directory: TempDir,
}

impl EtcdCluster {
    /// Starts it on free ports and waits until it has a leader. `extra` are further arguments of each member.
    pub(crate) async fn start(release: &Release, extra: &[String]) -> Self {
        let directory = tempfile::Builder::new().prefix("d-engine-bench-etcd-").tempdir().expect("a directory");
        let mut cluster = Self {
            release: release.clone(),
            extra: extra.to_vec(),
            ip: free_loopback(NODES.into()),
            members: (0..NODES).map(|_| None).collect(),
            directory,
        };
        cluster.start_all().await;
        cluster
    }

    /// Starts every member that does not run and waits until all name a leader.
    pub(crate) async fn start_all(&mut self) {
        for id in Self::ids() {
            if self.members[id as usize - 1].is_none() {
                self.members[id as usize - 1] = Some(self.run(id));
            }
        }
        for id in Self::ids() {
            self.leads(id, "to serve").await;
        }
    }

    fn ids() -> impl Iterator<Item = u16> {
        1..=NODES
    }

    fn run(&self, id: u16) -> Process {
        let (client, peer) = (format!("http://{}", self.address(id)), format!("http://{}", self.peer_address(id)));
        let peers: Vec<String> = Self::ids().map(|id| format!("n{id}=http://{}", self.peer_address(id))).collect();
        let mut command = bound_to_this_thread(&self.release.program);
        command.args(["--name", &format!("n{id}"), "--data-dir"]).arg(self.data(id));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &peers.join(","), "--initial-cluster-state", "new"]);
        command.args(["--logger", "zap", "--log-level", "error"]);
        command.arg(format!("--quota-backend-bytes={QUOTA_BYTES}"));
        command.args(&self.extra);
        Process::start(command, &self.directory.path().join(format!("n{id}.log")))
    }

    fn address(&self, id: u16) -> SocketAddr {
        SocketAddr::from((self.ip, GRPC_PORT + id))
    }

    fn peer_address(&self, id: u16) -> SocketAddr {
        SocketAddr::from((self.ip, HTTP_PORT + id))
    }

    /// A member's data directory.
    fn data(&self, id: u16) -> PathBuf {
        self.directory.path().join(format!("n{id}"))
    }

    /// Where the members keep their data.
    pub(crate) fn directories(&self) -> Vec<PathBuf> {
        Self::ids().map(|id| self.data(id)).collect()
    }

    /// The process ids of the members that run.
    pub(crate) fn servers(&self) -> Vec<u32> {
        self.members.iter().flatten().map(Process::id).collect()
    }

    /// Waits until a member names a leader; whether that is the member itself.
    async fn leads(&mut self, id: u16, what: &str) -> bool {
        let what = format!("etcd n{id} {what}, see {}", self.directory.path().display());
        let channel = channel(self.address(id));
        let member = self.members[id as usize - 1].as_mut().expect("it was started");
        wait::until(&what, wait::PATIENCE, || {
            if let Some(status) = member.ended() {
                panic!("etcd ended with {status}:\n{}", member.output());
            }
            let channel = channel.clone();
            async move {
                let answer = MaintenanceClient::new(channel).status(api::StatusRequest {}).await;
                let status = answer.ok()?.into_inner();
                (status.leader != 0).then(|| status.header.is_some_and(|header| header.member_id == status.leader))
            }
        })
        .await
    }

    async fn leader(&mut self) -> u16 {
        loop {
            for id in Self::ids() {
                if self.leads(id, "to know a leader").await {
                    return id;
                }
            }
        }
    }

    /// A client that knows who leads now.
    pub(crate) async fn client(&mut self) -> EtcdClient {
        let leader = self.leader().await;
        let every: Vec<Channel> = Self::ids().map(|id| channel(self.address(id))).collect();
        EtcdClient { leader: every[leader as usize - 1].clone(), every }
    }

    /// SIGKILL of the leader. Returns when it is gone.
    pub(crate) async fn kill_leader(&mut self) {
        let leader = self.leader().await;
        self.members[leader as usize - 1] = None;
    }

    /// SIGTERM of every member, and waits for their end.
    pub(crate) async fn stop_all(&mut self) {
        for member in self.members.iter_mut() {
            if let Some(mut member) = member.take() {
                member.stop(wait::PATIENCE).await;
            }
        }
    }
}

fn channel(address: SocketAddr) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a socket address makes a URL");
    endpoint.connect_timeout(CONNECT_TIMEOUT).connect_lazy()
}

/// One connection to each member.
#[derive(Clone)]
pub(crate) struct EtcdClient {
    leader: Channel,
    every: Vec<Channel>,
}

impl EtcdClient {
    /// Makes a call.
    ///
    /// # Errors
    /// When it fails, or is answered with something else than was to be expected.
    pub(crate) async fn call(&self, call: Call) -> Result<(), String> {
        let mut leader = KvClient::new(self.leader.clone());
        let as_expected = match call {
            Call::Put { key, value } => leader.put(put(key, value)).await.map(|_| true),
            Call::Get { key, consistency: Consistency::Eventual } => {
                let request = api::RangeRequest { key, serializable: true, ..api::RangeRequest::default() };
                KvClient::new(self.any().clone()).range(request).await.map(|answer| has(&answer, 1))
            }
            // There are no lease reads in etcd.
            Call::Get { key, .. } => {
                let request = api::RangeRequest { key, ..api::RangeRequest::default() };
                leader.range(request).await.map(|answer| has(&answer, 1))
            }
            Call::CompareAndPut { key, value } => {
                let exists = api::Compare {
                    result: compare::CompareResult::Greater as i32,
                    target: compare::CompareTarget::Version as i32,
                    key: key.clone(),
                    target_union: Some(compare::TargetUnion::Version(0)),
                };
                let put = api::request_op::Request::RequestPut(put(key, value));
                let success = vec![api::RequestOp { request: Some(put) }];
                let request = api::TxnRequest { compare: vec![exists], success, failure: Vec::new() };
                leader.txn(request).await.map(|answer| answer.get_ref().succeeded)
            }
            Call::Range { from, end, limit } => {
                let limit_wanted = i64::try_from(limit).unwrap_or(i64::MAX);
                let request = api::RangeRequest { key: from, range_end: end, limit: limit_wanted, serializable: false };
                leader.range(request).await.map(|answer| has(&answer, limit))
            }
        };
        expected(as_expected.map_err(|status| status.to_string())?)
    }

    /// A put to any member, which must answer within `patience`.
    pub(crate) async fn put_anywhere(&self, key: Bytes, value: Bytes, patience: Duration) -> bool {
        let mut member = KvClient::new(self.any().clone());
        let answer = tokio::time::timeout(patience, member.put(put(key, value))).await;
        answer.is_ok_and(|answer| answer.is_ok())
    }

    fn any(&self) -> &Channel {
        &self.every[fastrand::usize(..self.every.len())]
    }

    /// Connections for streams that are spread over the members.
    pub(crate) fn channels(&self) -> &[Channel] {
        &self.every
    }

    /// Leases, at the leader.
    pub(crate) fn leases(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.leader.clone())
    }
}

fn put(key: Bytes, value: Bytes) -> api::PutRequest {
    api::PutRequest { key, value, lease: 0 }
}

fn has(answer: &tonic::Response<api::RangeResponse>, keys: usize) -> bool {
    answer.get_ref().kvs.len() == keys
}
