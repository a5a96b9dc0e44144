//! What a node is told at start: defaults, a file, the environment, an overriding file.
//!
//! ```text
//! RaftNodeConfig::new()?               defaults, the file named by CONFIG_PATH, the environment
//!     .with_override_config(path)?     another file on top; the environment still wins
//!     .validate()?                     the rules that no single key can be checked for
//! ```
//!
//! A configuration that is accepted is honoured: an unknown key, a value out of bounds, keys that contradict each
//! other, and keys of features this version lacks are refused, naming file, line, key and what would be valid.
//! Nothing outside this module reads a configuration file or an environment variable.
//!
//! Fields are public, so that a program may also fill them in itself; it calls [`validate`](RaftNodeConfig::validate)
//! as everybody does.

mod address;
mod error;
mod file;
mod source;
#[cfg(test)]
mod tests;
mod validate;

use std::path::{Path, PathBuf};
use std::time::Duration;

use d_engine_proto::v1::Consistency;
use serde::Deserialize;

pub use error::ConfigError;
pub use source::Place;

use crate::consensus::{Persistence, Timings};
use crate::limits;
use source::Source;

/// Names the file that [`RaftNodeConfig::new`] reads.
pub const CONFIG_PATH_VARIABLE: &str = "CONFIG_PATH";

/// Begins the environment variables that override keys: `D_ENGINE__CLUSTER__NODE_ID` is `cluster.node_id`.
pub const ENVIRONMENT_PREFIX: &str = "D_ENGINE__";

/// The configuration of one node.
#[derive(Clone, Debug)]
pub struct RaftNodeConfig {
    /// `[cluster]`
    pub cluster: ClusterConfig,
    /// `[raft.*]`
    pub raft: RaftConfig,
    /// `[network]`
    pub network: NetworkConfig,
    /// `[tls]`
    pub tls: TlsConfig,
    /// `[monitoring]`
    pub monitoring: MonitoringConfig,
    /// Filled by [`validate`](Self::validate): what the operator should know, to be logged at start.
    pub warnings: Vec<String>,
    environment: Vec<(String, String)>,
    sources: Vec<Source>,
}

/// Who this node is and where it keeps its data.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// This node's number; not 0.
    pub node_id: u32,
    /// host:port to listen on for clients and peers. Unset: this node's own address in `initial_cluster`, else
    /// [`DEFAULT_LISTEN_ADDRESS`]. [`validate`](RaftNodeConfig::validate) fills it in.
    pub listen_address: Option<String>,
    /// host:port at which clients reach this node. Unset: its own address in `initial_cluster`, else the listen
    /// address. [`validate`](RaftNodeConfig::validate) fills it in.
    pub advertise_address: Option<String>,
    /// Free address that members and clients are told of, for the application that embeds the node; may be empty.
    pub application_address: String,
    /// The members a fresh cluster is formed of, this node included; the same list on every node. Empty: a cluster
    /// of this node alone, which [`validate`](RaftNodeConfig::validate) fills in.
    pub initial_cluster: Vec<InitialMember>,
    /// Directory of the node's data.
    pub db_root_dir: PathBuf,
    /// Directory for log files; unset: standard error only.
    pub log_dir: Option<PathBuf>,
}

/// Where a node listens unless told otherwise.
pub const DEFAULT_LISTEN_ADDRESS: &str = "127.0.0.1:9081";

/// A member of the cluster to form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitialMember {
    /// Its number; not 0.
    pub id: u32,
    /// host:port at which its peers reach it.
    pub address: String,
    /// Whether it votes.
    pub role: MemberRole,
    /// Whether it takes part from the beginning.
    pub status: MemberStatus,
}

/// What a member does. In files a word, or the number that older files use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemberRole {
    /// Replicates and votes: `voter`, `follower` or 1; also `candidate` or 2 and `leader` or 3, since who leads is
    /// for the cluster to decide.
    #[default]
    Voter,
    /// Replicates without a vote: `learner` or 4.
    Learner,
}

/// How far a member has joined. In files a word, or the number that older files use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemberStatus {
    /// To be added or promoted once it has caught up: `joining`, `promotable` or 1.
    Joining,
    /// Takes part: `active`, 2 or 3.
    #[default]
    Active,
}

/// How consensus, persistence and reads work.
#[derive(Clone, Debug, Default)]
pub struct RaftConfig {
    /// `[raft.read_consistency]`
    pub read_consistency: ReadConsistencyConfig,
    /// `[raft.persistence]`
    pub persistence: PersistenceConfig,
    /// `[raft.election]`
    pub election: ElectionConfig,
    /// `[raft.backpressure]`
    pub backpressure: BackpressureConfig,
    /// `[raft.snapshot]`
    pub snapshot: SnapshotConfig,
    /// `[raft.watch]`
    pub watch: WatchConfig,
    /// `[raft.state_machine]`
    pub state_machine: StateMachineConfig,
}

/// When a node makes a snapshot and purges its log.
#[derive(Clone, Debug)]
pub struct SnapshotConfig {
    /// `enable`: whether it does so by itself.
    pub enabled: bool,
    /// `max_log_entries_before_snapshot`: entries applied since the last one.
    pub log_entries_max: u64,
    /// `max_log_bytes_before_snapshot`: bytes applied since the last one, or since the start.
    pub log_bytes_max: u64,
    /// `retained_log_entries`: entries kept behind it for members that are behind.
    pub retained_log_entries: u64,
}

/// What the store does beyond keys and values.
#[derive(Clone, Debug)]
pub struct StateMachineConfig {
    /// `[raft.state_machine.lease] enabled`: whether leases, and keys with a time to live, may be made through this node.
    pub lease_enabled: bool,
    /// `[raft.state_machine.history] retention_ms`: for how long past revisions are kept, in store time. Zero: until they
    /// are compacted by a request.
    pub history_retention: Duration,
    /// `[raft.state_machine] check_interval_ms`: how often the leader has the members compare their states. Zero: only by
    /// request.
    pub check_interval: Duration,
}

/// Watches.
#[derive(Clone, Debug)]
pub struct WatchConfig {
    /// Whether this node serves them.
    pub enabled: bool,
}

/// How reads are served unless the request says otherwise.
#[derive(Clone, Debug)]
pub struct ReadConsistencyConfig {
    /// The policy of a read that names none.
    pub default_policy: ReadPolicy,
    /// How long a quorum's acknowledgement lets the leader answer reads from memory.
    pub lease_duration: Duration,
    /// Whether a request may choose another policy.
    pub allow_client_override: bool,
}

/// How a read is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum ReadPolicy {
    /// After one confirmation of leadership by a quorum; relies on no clock.
    LinearizableRead,
    /// By the leader within its lease.
    LeaseRead,
    /// From the memory of any node.
    EventualConsistency,
}

impl From<ReadPolicy> for Consistency {
    fn from(policy: ReadPolicy) -> Self {
        match policy {
            ReadPolicy::LinearizableRead => Self::Linearizable,
            ReadPolicy::LeaseRead => Self::Lease,
            ReadPolicy::EventualConsistency => Self::Eventual,
        }
    }
}

/// When an acknowledged write is on the disk.
#[derive(Clone, Debug, Default)]
pub struct PersistenceConfig {
    /// What an acknowledgement promises.
    pub strategy: PersistenceStrategy,
    /// When `MemFirst` writes to the disk. Under `DiskFirst` everything acknowledged already is there.
    pub flush_policy: FlushPolicy,
    /// Which files the Raft log is kept in.
    pub engine: LogEngine,
}

/// Which files the Raft log is kept in. A directory written by one is refused by the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum LogEngine {
    /// A RocksDB of its own.
    #[default]
    #[serde(rename = "RocksDB")]
    RocksDb,
    /// A journal in segment files.
    Segments,
}

/// What an acknowledgement promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum PersistenceStrategy {
    /// On the disks of a majority.
    #[default]
    DiskFirst,
    /// In the operating systems of a majority.
    MemFirst,
}

/// When `MemFirst` writes to the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum FlushPolicy {
    /// At once.
    #[default]
    Immediate,
    /// After this many entries or this much time, whichever comes first.
    Batch(FlushBatch),
}

/// See [`FlushPolicy::Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlushBatch {
    /// Entries.
    pub threshold: u64,
    /// Milliseconds.
    pub interval_ms: u64,
}

/// The times Raft runs by. What is unset follows from the lease; [`RaftConfig::timings`] tells the result.
#[derive(Clone, Debug, Default)]
pub struct ElectionConfig {
    /// Shortest time without a leader before a campaign; unset: the lease.
    pub timeout_min: Option<Duration>,
    /// Longest such time; unset: one and a half times the larger of lease and `timeout_min`.
    pub timeout_max: Option<Duration>,
    /// Pause between two heartbeats; unset: a third of the smaller of lease and `timeout_min`.
    pub heartbeat_interval: Option<Duration>,
}

/// When new writes are refused.
#[derive(Clone, Debug)]
pub struct BackpressureConfig {
    /// Bytes of proposals that may wait for their answer.
    pub max_pending_bytes: usize,
}

/// Bounds of the gRPC port.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Deadline of a call whose client names none.
    pub call_timeout: Duration,
    /// Connections at the same time; fewer if the process may not open as many files.
    pub connections_max: usize,
    /// Calls in flight on one connection.
    pub streams_per_connection_max: u32,
}

/// TLS of the port for clients and members; the monitoring port stays as it is.
#[derive(Clone, Debug)]
pub struct TlsConfig {
    /// Whether it is on. Unset: if there is a `cert_file`.
    pub enabled: Option<bool>,
    /// PEM file with this node's certificate, and with those between it and its CA.
    pub cert_file: Option<PathBuf>,
    /// PEM file with the private key of that certificate.
    pub key_file: Option<PathBuf>,
    /// PEM file with the certificates of the CAs whose certificates clients may show.
    pub client_ca_file: Option<PathBuf>,
    /// Whether clients show one. Unset: required if there is a `client_ca_file`, else not.
    pub client_auth: Option<ClientAuth>,
    /// PEM file with the certificates of the CAs of members.
    pub peer_ca_file: Option<PathBuf>,
    /// The DNS name that the certificate of every member carries, and of nobody else.
    pub peer_name: Option<String>,
    /// How often the files are looked at for changes.
    pub reload_interval: Duration,
}

/// Whether a client shows a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientAuth {
    /// It needs none.
    None,
    /// It may; one that is not from `client_ca_file` is refused.
    Optional,
    /// Whoever shows none is refused.
    Required,
}

impl TlsConfig {
    /// Whether the port speaks TLS.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.enabled.unwrap_or(self.cert_file.is_some())
    }

    /// Whether a client shows a certificate.
    #[must_use]
    pub fn client_auth(&self) -> ClientAuth {
        let follows = if self.client_ca_file.is_some() { ClientAuth::Required } else { ClientAuth::None };
        self.client_auth.unwrap_or(follows)
    }
}

/// What is told to whoever watches the node: the HTTP port for metrics and load balancers, and traces.
#[derive(Clone, Debug, Default)]
pub struct MonitoringConfig {
    /// host:port to listen on; unset: none.
    pub listen_address: Option<String>,
    /// The collector that the spans of traced calls are sent to, as http://host:port; unset: none. The program that
    /// sets up `tracing` sends them.
    pub otlp_endpoint: Option<String>,
    /// The share of calls that came without a trace for which one is begun, 0 to 1.
    pub otlp_sample_ratio: f64,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            node_id: 1,
            listen_address: None,
            advertise_address: None,
            application_address: String::new(),
            initial_cluster: Vec::new(),
            db_root_dir: PathBuf::from("./db"),
            log_dir: None,
        }
    }
}

impl Default for ReadConsistencyConfig {
    fn default() -> Self {
        Self {
            default_policy: ReadPolicy::LinearizableRead,
            lease_duration: Duration::from_millis(limits::LEASE_MS_DEFAULT),
            allow_client_override: true,
        }
    }
}

impl Default for WatchConfig {
    fn default() -> Self {
        Self { enabled: true }
    }
}

impl Default for StateMachineConfig {
    fn default() -> Self {
        let history_retention = Duration::from_millis(limits::HISTORY_RETENTION_MS_DEFAULT);
        let check_interval = Duration::from_millis(limits::CHECK_INTERVAL_MS_DEFAULT);
        Self { lease_enabled: true, history_retention, check_interval }
    }
}

impl Default for SnapshotConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            log_entries_max: limits::SNAPSHOT_LOG_ENTRIES_DEFAULT,
            log_bytes_max: limits::SNAPSHOT_LOG_BYTES_DEFAULT,
            retained_log_entries: limits::RETAINED_LOG_ENTRIES_DEFAULT,
        }
    }
}

impl Default for BackpressureConfig {
    fn default() -> Self {
        Self { max_pending_bytes: limits::PENDING_BYTES_DEFAULT }
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            call_timeout: limits::CALL_TIMEOUT_DEFAULT,
            connections_max: limits::CONNECTIONS_MAX_DEFAULT,
            streams_per_connection_max: limits::STREAMS_PER_CONNECTION_DEFAULT,
        }
    }
}

impl Default for TlsConfig {
    fn default() -> Self {
        Self {
            enabled: None,
            cert_file: None,
            key_file: None,
            client_ca_file: None,
            client_auth: None,
            peer_ca_file: None,
            peer_name: None,
            reload_interval: Duration::from_millis(limits::TLS_RELOAD_INTERVAL_MS_DEFAULT),
        }
    }
}

impl Default for RaftNodeConfig {
    /// The defaults alone: one node, no file, no environment.
    fn default() -> Self {
        Self {
            cluster: ClusterConfig::default(),
            raft: RaftConfig::default(),
            network: NetworkConfig::default(),
            tls: TlsConfig::default(),
            monitoring: MonitoringConfig::default(),
            warnings: Vec::new(),
            environment: Vec::new(),
            sources: Vec::new(),
        }
    }
}

impl RaftNodeConfig {
    /// The defaults, then the file that the environment variable `CONFIG_PATH` names, then the variables that begin
    /// with `D_ENGINE__`.
    ///
    /// # Errors
    /// When the file cannot be read, or a key in it or in the environment is unknown or malformed.
    pub fn new() -> Result<Self, ConfigError> {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name == CONFIG_PATH_VARIABLE || name.starts_with(ENVIRONMENT_PREFIX));
        Self::from_environment(variables)
    }

    fn from_environment(variables: impl Iterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let (path, mut environment): (Vec<_>, Vec<_>) = variables.partition(|(name, _)| name == CONFIG_PATH_VARIABLE);
        environment.sort();
        let config = Self { environment, ..Self::default() };
        match path.into_iter().next() {
            Some((_, path)) if !path.is_empty() => config.with_override_config(path),
            _ => config.with_environment(),
        }
    }

    /// Puts a file on top: its keys win over everything but the environment. The path may leave out `.toml`.
    ///
    /// # Errors
    /// When the file cannot be read, or a key in it is unknown or malformed.
    pub fn with_override_config(mut self, path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let (path, text) = source::read(path.as_ref())?;
        let source = Source::File { path, text };
        source.parse()?.apply_to(&mut self);
        self.sources.push(source);
        self.with_environment()
    }

    /// Puts one key on top, which then wins over everything, as a flag on a command line does. `origin` names the
    /// flag in errors, `key` is dotted, and `value` is written as in a file; a string may leave out its quotes.
    ///
    /// # Errors
    /// When the key is unknown or the value malformed.
    pub fn with_setting(mut self, origin: &str, key: &str, value: &str) -> Result<Self, ConfigError> {
        let source = Source::Setting { origin: origin.to_owned(), key: key.to_owned(), value: value.to_owned() };
        source.parse()?.apply_to(&mut self);
        self.sources.push(source);
        Ok(self)
    }

    fn with_environment(mut self) -> Result<Self, ConfigError> {
        for (name, value) in std::mem::take(&mut self.environment) {
            let key = name.trim_start_matches(ENVIRONMENT_PREFIX).replace("__", ".").to_lowercase();
            self = self.with_setting(&name, &key, &value)?;
            self.environment.push((name, value));
        }
        Ok(self)
    }

    /// A node to try things out with: alone, with the defaults, its data in a directory that the caller deletes.
    #[must_use]
    pub fn dev(directory: impl Into<PathBuf>) -> Self {
        let mut config = Self::default();
        config.cluster.db_root_dir = directory.into();
        config
    }

    /// Checks the rules that no single key can be checked for, and fills in what follows from other keys.
    ///
    /// # Errors
    /// The first rule that does not hold, with the place of the key.
    pub fn validate(mut self) -> Result<Self, ConfigError> {
        validate::validate(&mut self)?;
        Ok(self)
    }

    /// Where `key` was set last; `None` for a default.
    fn place_of(&self, key: &str) -> Option<Place> {
        self.sources.iter().rev().find_map(|source| source.place_of(key))
    }
}

impl PersistenceConfig {
    /// What an acknowledgement promises, and when the rest is made good.
    #[must_use]
    pub fn promise(&self) -> Persistence {
        match (self.strategy, self.flush_policy) {
            (PersistenceStrategy::DiskFirst, _) => Persistence::DiskFirst,
            (PersistenceStrategy::MemFirst, FlushPolicy::Immediate) => {
                Persistence::MemFirst { entries: 1, interval: Duration::ZERO }
            }
            (PersistenceStrategy::MemFirst, FlushPolicy::Batch(FlushBatch { threshold, interval_ms })) => {
                Persistence::MemFirst { entries: threshold, interval: Duration::from_millis(interval_ms) }
            }
        }
    }
}

impl RaftConfig {
    /// The times Raft runs by: what is configured, the rest derived from the lease.
    #[must_use]
    pub fn timings(&self) -> Timings {
        let lease = self.read_consistency.lease_duration;
        let election_min = self.election.timeout_min.unwrap_or(lease);
        let election_max = self.election.timeout_max.unwrap_or_else(|| {
            Duration::from_millis(limits::election_timeout_max_ms_default(milliseconds(lease.max(election_min))))
        });
        let heartbeat = self.election.heartbeat_interval.unwrap_or_else(|| {
            Duration::from_millis(milliseconds(lease.min(election_min)) / limits::HEARTBEATS_PER_LEASE_DEFAULT)
        });
        Timings { lease, election_min, election_max, heartbeat }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
