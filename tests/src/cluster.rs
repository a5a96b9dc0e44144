//! A cluster of real server processes in directories of its own.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::direct::DirectNode;
use crate::disk::Disk;
use crate::faulty::FaultPoints;
use crate::nemesis::Reach;
use crate::network::{End, PrivateNetwork};
use crate::process::{Process, bound_to_this_thread, built, d_engine};
use crate::proxy::Proxy;
use crate::wall_clock::WallClock;
use crate::{http, wait};

/// Clusters of one test program run one after the other: their timing matters more than the test's duration.
pub(crate) static TURN: std::sync::LazyLock<Arc<Semaphore>> = std::sync::LazyLock::new(|| Arc::new(Semaphore::new(1)));

/// A node's port for clients and peers, less its id.
pub const GRPC_PORT: u16 = 9080;
/// A node's second port, less its id.
pub const HTTP_PORT: u16 = 9180;

/// Who leads, and in which term. A term is led by one node only, so two equal reigns are one that never broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reign {
    /// The leader.
    pub leader: u32,
    /// Its term.
    pub term: u64,
}

/// What a cluster is made of.
#[derive(Debug)]
pub struct Shape {
    /// Number of nodes, all voters, with ids from 1.
    pub nodes: u32,
    /// TOML added to the end of every node's configuration.
    pub extra: String,
    /// A network in which links can be cut; without it the nodes share a loopback address.
    pub network: Option<PrivateNetwork>,
    /// Whether clients reach the nodes only through proxies that can lose answers.
    pub proxied: bool,
    /// Whether the nodes have fault points: see [`crate::faulty`].
    pub faulty: bool,
    /// Mebibytes of the disk that each node has for itself; without it they share the machine's. Needs mounts of one's
    /// own, as a network does.
    pub disks: Option<u32>,
    /// Whether each node has a wall clock of its own.
    pub wall_clocks: bool,
    /// Whether each node is an application that embeds the engine, and prints when it believed to lead: see
    /// [`crate::embedded::Claim`].
    pub embedding: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            nodes: 3,
            extra: String::new(),
            network: None,
            proxied: false,
            faulty: false,
            disks: None,
            wall_clocks: false,
            embedding: false,
        }
    }
}

/// A cluster. When the test fails, its directory is kept and named.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    network: Option<PrivateNetwork>,
    disks: Vec<Disk>,
    wall_clocks: Vec<WallClock>,
    // After the disks, which are mounted in it.
    directory: Option<TempDir>,
    _turn: Arc<OwnedSemaphorePermit>,
}

impl Cluster {
    /// Starts a cluster of `nodes` voters on loopback and waits until each is ready.
    pub async fn start(nodes: u32) -> Self {
        let mut cluster = Self::prepare(Shape { nodes, ..Shape::default() }).await;
        cluster.start_all().await;
        cluster
    }

    /// Writes the configurations; starts nothing yet.
    pub async fn prepare(shape: Shape) -> Self {
        let [cluster] = Self::prepare_together([shape]).await;
        cluster
    }

    /// Prepares clusters that run at the same time, for a test that has them wait for the most part.
    pub async fn prepare_together<const N: usize>(shapes: [Shape; N]) -> [Self; N] {
        let turn = Arc::new(Arc::clone(&TURN).acquire_owned().await.expect("never closed"));
        let mut clusters = Vec::new();
        for shape in shapes {
            clusters.push(Self::lay_out(shape, Arc::clone(&turn)).await);
        }
        clusters.try_into().expect("one of each shape")
    }

    async fn lay_out(shape: Shape, turn: Arc<OwnedSemaphorePermit>) -> Self {
        let directory = tempfile::Builder::new().prefix("d-engine-test-").tempdir().expect("a temporary directory");
        let loopback = if shape.network.is_some() { Ipv4Addr::LOCALHOST } else { free_loopback(shape.nodes) };
        let ids = 1..=shape.nodes;
        let mut nodes: Vec<Node> = ids
            .map(|id| {
                let (ip, port) = match shape.network {
                    Some(_) => (End::Node(id).address(), 0),
                    None => (loopback, id as u16),
                };
                let directory = directory.path().join(format!("n{id}"));
                std::fs::create_dir(&directory).expect("an empty temporary directory");
                Node {
                    id,
                    address: SocketAddr::from((ip, GRPC_PORT + port)),
                    http_address: SocketAddr::from((ip, HTTP_PORT + port)),
                    directory,
                    proxy: None,
                    in_namespace: shape.network.is_some(),
                    faulty: shape.faulty,
                    embedding: shape.embedding,
                    faults: None,
                    environment: Vec::new(),
                    process: None,
                    starts: Arc::default(),
                }
            })
            .collect();
        if shape.proxied {
            let ip = if shape.network.is_some() { End::Clients.address() } else { loopback };
            for node in &mut nodes {
                node.proxy = Some(Proxy::start(ip, node.address).await);
            }
        }
        let members: Vec<(u32, SocketAddr)> = nodes.iter().map(|node| (node.id, node.address)).collect();
        for node in &mut nodes {
            node.write_config(&members, &shape.extra);
        }
        let disks = match shape.disks {
            Some(mebibytes) => nodes.iter().map(|node| Disk::in_file(&node.data(), mebibytes)).collect(),
            None => Vec::new(),
        };
        let wall_clocks = match shape.wall_clocks {
            true => nodes.iter_mut().map(|node| WallClock::give(node, directory.path())).collect(),
            false => Vec::new(),
        };
        Self { nodes, network: shape.network, disks, wall_clocks, directory: Some(directory), _turn: turn }
    }

    /// Starts every node that does not run and waits until all are ready.
    pub async fn start_all(&mut self) {
        for node in self.nodes.iter_mut().filter(|node| node.process.is_none()) {
            node.start();
        }
        for node in &mut self.nodes {
            node.ready().await;
        }
    }

    /// The nodes, by ascending id.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of this id.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn node(&self, id: u32) -> &Node {
        self.nodes.iter().find(|node| node.id == id).expect("a node of the cluster")
    }

    /// The node of this id, to do something to it.
    ///
    /// # Panics
    /// When there is none.
    pub fn node_mut(&mut self, id: u32) -> &mut Node {
        self.nodes.iter_mut().find(|node| node.id == id).expect("a node of the cluster")
    }

    /// The network whose links can be cut, if the cluster has one.
    #[must_use]
    pub fn network(&self) -> Option<&PrivateNetwork> {
        self.network.as_ref()
    }

    /// The disk of this node, if the cluster was prepared with some.
    pub fn disk_mut(&mut self, id: u32) -> Option<&mut Disk> {
        self.disks.get_mut(id as usize - 1)
    }

    /// The wall clock of this node, if the cluster was prepared with some.
    #[must_use]
    pub fn wall_clock(&self, id: u32) -> Option<&WallClock> {
        self.wall_clocks.get(id as usize - 1)
    }

    /// What of it an adversary can lay hands on.
    #[must_use]
    pub fn reach(&self) -> Reach {
        Reach {
            network: self.network.is_some(),
            disks: !self.disks.is_empty(),
            wall_clocks: !self.wall_clocks.is_empty(),
        }
    }

    /// Where clients reach the nodes, as `host:port`: through their proxies, if they have some.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        let address = |node: &Node| node.proxy.as_ref().map_or(node.address, Proxy::address).to_string();
        self.nodes.iter().map(address).collect()
    }

    /// Where the cluster keeps its files.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.as_ref().expect("kept until dropped").path()
    }

    /// The node that is leader, once there is one among those that run and are not listed in `except`.
    pub async fn leader(&self, except: &[u32]) -> u32 {
        wait::until("a leader", wait::PATIENCE, || self.leader_now(except)).await
    }

    /// The node that says it is leader now.
    pub async fn leader_now(&self, except: &[u32]) -> Option<u32> {
        for node in &self.nodes {
            let asked = node.process.is_some() && !except.contains(&node.id);
            if asked && matches!(http::get(node.http_address, "/primary").await, Ok((200, _))) {
                return Some(node.id);
            }
        }
        None
    }

    /// The reign that every running node acknowledges, once all name the same.
    pub async fn reign(&self) -> Reign {
        wait::until("all nodes to name one leader", wait::PATIENCE, || async {
            let mut common = None;
            for node in self.nodes.iter().filter(|node| node.runs()) {
                let leader = node.direct(wait::PATIENCE).status().await.ok()?.leader?;
                let reign = Reign { leader: leader.node_id, term: leader.term };
                if *common.get_or_insert(reign) != reign {
                    return None;
                }
            }
            common
        })
        .await
    }

    /// Makes sure that every node that should run does.
    ///
    /// # Panics
    /// When one has ended by itself; the message carries its last lines.
    pub fn check_alive(&mut self) {
        for node in &mut self.nodes {
            let Some(process) = &mut node.process else { continue };
            if let Some(status) = process.ended() {
                panic!("node {} ended by itself with {status}:\n{}", node.id, last_lines(&process.output()));
            }
        }
    }

    /// Takes note of the nodes that have died, as they were told to, so that they can be started again.
    pub fn bury(&mut self) {
        for node in &mut self.nodes {
            if node.process.as_mut().is_some_and(|process| process.ended().is_some()) {
                node.process = None;
            }
        }
    }

    /// Keeps the directory after the test, and names it.
    pub fn keep(&mut self) -> PathBuf {
        let directory = self.directory.take().expect("kept until dropped").keep();
        println!("the cluster's files are kept in {}", directory.display());
        directory
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() && self.directory.is_some() {
            self.keep();
        }
    }
}

/// A node: its files, and its process while it runs.
#[derive(Debug)]
pub struct Node {
    /// Its id in the cluster.
    pub id: u32,
    /// Where clients and peers reach it.
    pub address: SocketAddr,
    /// Where it answers HTTP.
    pub http_address: SocketAddr,
    /// What stands between it and clients, if the cluster was prepared so.
    pub proxy: Option<Proxy>,
    directory: PathBuf,
    in_namespace: bool,
    faulty: bool,
    embedding: bool,
    faults: Option<FaultPoints>,
    environment: Vec<(String, OsString)>,
    process: Option<Process>,
    starts: Arc<AtomicU64>,
}

impl Node {
    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.directory.join("config.toml")
    }

    /// Its data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// Everything the node has printed in all its runs.
    #[must_use]
    pub fn output(&self) -> String {
        let bytes = std::fs::read(self.log()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn log(&self) -> PathBuf {
        self.directory.join("output.log")
    }

    /// Writes its configuration with these members and `extra` TOML at the end.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn write_config(&self, members: &[(u32, SocketAddr)], extra: &str) {
        let members: Vec<String> =
            members.iter().map(|(id, address)| format!("    {{ id = {id}, address = \"{address}\" }},")).collect();
        let text = format!(
            "[cluster]\n\
             node_id = {id}\n\
             listen_address = \"{address}\"\n\
             {advertise}\
             initial_cluster = [\n{members}\n]\n\
             db_root_dir = \"{data}\"\n\
             \n\
             [monitoring]\n\
             listen_address = \"{http}\"\n\
             \n{extra}\n",
            id = self.id,
            address = self.address,
            advertise = self
                .proxy
                .as_ref()
                .map_or_else(String::new, |proxy| format!("advertise_address = \"{}\"\n", proxy.address())),
            members = members.join("\n"),
            data = self.data().display(),
            http = self.http_address,
        );
        std::fs::write(self.config(), text).expect("the configuration can be written");
    }

    /// Has clients told to reach it at `address`, from its next start on, if that is its first.
    ///
    /// # Panics
    /// When its configuration cannot be changed.
    pub fn advertise(&self, address: &str) {
        let text = std::fs::read_to_string(self.config()).expect("it has a configuration");
        let kept = text.lines().filter(|line| !line.starts_with("advertise_address"));
        let line = format!("advertise_address = {address:?}");
        let lines = kept.flat_map(|kept| if kept == "[cluster]" { vec![kept, &line] } else { vec![kept] });
        let text: Vec<&str> = lines.collect();
        std::fs::write(self.config(), text.join("\n")).expect("the configuration can be written");
    }

    /// Has it ask to join a cluster that is there, from its next start on.
    ///
    /// # Panics
    /// When its configuration cannot be changed.
    pub fn joins(&self) {
        let text = std::fs::read_to_string(self.config()).expect("it has a configuration");
        let own = format!("{{ id = {}, address = \"{}\" }}", self.id, self.address);
        let joining = format!("{{ id = {}, address = \"{}\", status = \"joining\" }}", self.id, self.address);
        assert!(text.contains(&own), "node {} is in its own list", self.id);
        std::fs::write(self.config(), text.replace(&own, &joining)).expect("the configuration can be written");
    }

    /// Moves it to ports that are this much higher, from its next start on. The other nodes are not told.
    ///
    /// # Panics
    /// When its configuration cannot be changed.
    pub fn move_by(&mut self, ports: u16) {
        let text = std::fs::read_to_string(self.config()).expect("it has a configuration");
        let mut text = text;
        for address in [&mut self.address, &mut self.http_address] {
            let before = format!("\"{address}\"");
            address.set_port(address.port() + ports);
            text = text.replace(&before, &format!("\"{address}\""));
        }
        std::fs::write(self.config(), text).expect("the configuration can be written");
    }

    /// Deletes its data, as when a disk is lost.
    ///
    /// # Panics
    /// When it runs, or its data cannot be deleted.
    pub fn lose_data(&self) {
        assert!(!self.runs(), "node {} runs", self.id);
        // One by one: a disk of its own is mounted there.
        for entry in std::fs::read_dir(self.data()).expect("it has data") {
            let path = entry.expect("its data can be listed").path();
            let deleted = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            deleted.expect("its data can be deleted");
        }
    }

    /// Gives it an environment variable from its next start on.
    pub fn set_environment(&mut self, name: &str, value: impl Into<OsString>) {
        self.environment.push((name.to_owned(), value.into()));
    }

    /// Starts the process; does not wait for it.
    ///
    /// # Panics
    /// When it runs already or cannot be started.
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "node {} runs already", self.id);
        // Before whoever starts here can answer.
        self.starts.fetch_add(1, Ordering::SeqCst);
        let program = match (self.faulty, self.embedding) {
            (true, _) => built("d-engine-faulty"),
            (_, true) => built("d-engine-embedding"),
            _ => d_engine(),
        };
        let mut command = if self.in_namespace {
            let mut command = PrivateNetwork::command(self.id);
            command.args(["setpriv", "--pdeathsig", "KILL"]).arg(&program);
            command
        } else {
            bound_to_this_thread(&program)
        };
        command.args(["server", "--config"]).arg(self.config()).env("RUST_BACKTRACE", "1");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if self.faulty {
            let (process, orders, output) = Process::start_to_talk_to(command, &self.log());
            self.process = Some(process);
            self.faults = Some(FaultPoints::new(orders, output));
        } else {
            self.process = Some(Process::start(command, &self.log()));
        }
    }

    /// The fault points of its latest run, which may be over.
    ///
    /// # Panics
    /// When it has none.
    pub fn faults(&mut self) -> &mut FaultPoints {
        self.faults.as_mut().expect("the cluster was prepared with fault points")
    }

    /// Waits until it answers that it serves.
    ///
    /// # Panics
    /// When it ends instead, with its last lines, or does not become ready.
    pub async fn ready(&mut self) {
        let address = self.http_address;
        let what = format!("node {} to be ready at {address}, see {}", self.id, self.log().display());
        let process = self.process.as_mut().expect("the node was started");
        wait::until(&what, wait::PATIENCE, || {
            if let Some(status) = process.ended() {
                panic!("the node ended with {status}:\n{}", last_lines(&process.output()));
            }
            async move { matches!(http::get(address, "/ready").await, Ok((200, _))).then_some(()) }
        })
        .await;
    }

    /// Its process.
    ///
    /// # Panics
    /// When it does not run.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap_or_else(|| panic!("node {} does not run", self.id))
    }

    /// Whether it was started and neither killed nor stopped since.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process().kill();
        self.process = None;
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Panics
    /// When it does not end well.
    pub async fn stop(&mut self) {
        let status = self.process().stop(wait::PATIENCE).await;
        self.process = None;
        assert!(status.success(), "node {} ended with {status}:\n{}", self.id, last_lines(&self.output()));
    }

    /// Waits for it to end by itself, as after a bad start; returns whether it reported success, and its output.
    pub async fn exit(&mut self) -> (bool, String) {
        let status = self.process().exit(wait::PATIENCE).await;
        self.process = None;
        (status.success(), self.output())
    }

    /// A connection to this node alone.
    #[must_use]
    pub fn direct(&self, deadline: Duration) -> DirectNode {
        DirectNode::new(self.address, deadline, Arc::clone(&self.starts))
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// A loopback address of which the ports of a cluster are free. The whole of 127.0.0.0/8 is ours on Linux, and
/// nobody else gets a port there by chance. Two callers of one process never get the same one, whether they use it yet
/// or not.
///
/// # Panics
/// When none is free.
#[must_use]
pub fn free_loopback(nodes: u32) -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(0);
    let process = std::process::id();
    (0..=u8::MAX)
        .map(|_| NEXT.fetch_add(1, Ordering::Relaxed) % 100)
        .map(|next| Ipv4Addr::new(127, 100 + next, (process >> 8) as u8, (process as u8).max(1)))
        .find(|ip| {
            (1..=nodes as u16)
                .all(|node| [GRPC_PORT, HTTP_PORT].iter().all(|base| TcpListener::bind((*ip, base + node)).is_ok()))
        })
        .expect("a free loopback address")
}
