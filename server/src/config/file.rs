//! The keys of a configuration file, as they are written. All optional: what a file leaves out stays as it was.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

use super::{
    ClientAuth, FlushPolicy, InitialMember, MemberRole, MemberStatus, PersistenceStrategy, RaftNodeConfig, ReadPolicy,
};

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileConfig {
    cluster: Cluster,
    raft: Raft,
    network: Network,
    tls: Tls,
    monitoring: Monitoring,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Cluster {
    node_id: Option<u32>,
    listen_address: Option<String>,
    advertise_address: Option<String>,
    application_address: Option<String>,
    #[serde(deserialize_with = "member_list")]
    initial_cluster: Option<Vec<InitialMember>>,
    db_root_dir: Option<PathBuf>,
    log_dir: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Member {
    id: u32,
    address: String,
    #[serde(default)]
    role: MemberRole,
    #[serde(default)]
    status: MemberStatus,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raft {
    read_consistency: ReadConsistency,
    persistence: Persistence,
    election: Election,
    snapshot: Snapshot,
    watch: Switch,
    state_machine: StateMachine,
    backpressure: Backpressure,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ReadConsistency {
    default_policy: Option<ReadPolicy>,
    lease_duration_ms: Option<u64>,
    allow_client_override: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Persistence {
    strategy: Option<PersistenceStrategy>,
    flush_policy: Option<FlushPolicy>,
}

/// Milliseconds, all of them.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Election {
    election_timeout_min: Option<u64>,
    election_timeout_max: Option<u64>,
    heartbeat_interval: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Snapshot {
    enable: Option<bool>,
    max_log_entries_before_snapshot: Option<u64>,
    max_log_bytes_before_snapshot: Option<u64>,
    retained_log_entries: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Switch {
    enabled: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StateMachine {
    lease: Switch,
    history: History,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct History {
    retention_ms: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Backpressure {
    max_pending_bytes: Option<usize>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Network {
    call_timeout_ms: Option<u64>,
    connections_max: Option<usize>,
    streams_per_connection_max: Option<u32>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Tls {
    enabled: Option<bool>,
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    client_ca_file: Option<PathBuf>,
    client_auth: Option<ClientAuth>,
    peer_ca_file: Option<PathBuf>,
    peer_name: Option<String>,
    reload_interval_ms: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Monitoring {
    listen_address: Option<String>,
    otlp_endpoint: Option<String>,
    otlp_sample_ratio: Option<f64>,
}

impl FileConfig {
    /// Sets what the file sets.
    pub(super) fn apply_to(self, config: &mut RaftNodeConfig) {
        let Self { cluster, raft, network, tls, monitoring } = self;

        let target = &mut config.cluster;
        set(&mut target.node_id, cluster.node_id);
        set_optional(&mut target.listen_address, cluster.listen_address);
        set_optional(&mut target.advertise_address, cluster.advertise_address);
        set(&mut target.application_address, cluster.application_address);
        set(&mut target.initial_cluster, cluster.initial_cluster);
        set(&mut target.db_root_dir, cluster.db_root_dir);
        set_optional(&mut target.log_dir, cluster.log_dir);

        let target = &mut config.raft;
        set(&mut target.read_consistency.default_policy, raft.read_consistency.default_policy);
        let lease_duration = raft.read_consistency.lease_duration_ms.map(Duration::from_millis);
        set(&mut target.read_consistency.lease_duration, lease_duration);
        set(&mut target.read_consistency.allow_client_override, raft.read_consistency.allow_client_override);
        set(&mut target.persistence.strategy, raft.persistence.strategy);
        set(&mut target.persistence.flush_policy, raft.persistence.flush_policy);
        let Election { election_timeout_min, election_timeout_max, heartbeat_interval } = raft.election;
        set_optional(&mut target.election.timeout_min, election_timeout_min.map(Duration::from_millis));
        set_optional(&mut target.election.timeout_max, election_timeout_max.map(Duration::from_millis));
        set_optional(&mut target.election.heartbeat_interval, heartbeat_interval.map(Duration::from_millis));
        set(&mut target.snapshot.enabled, raft.snapshot.enable);
        set(&mut target.snapshot.log_entries_max, raft.snapshot.max_log_entries_before_snapshot);
        set(&mut target.snapshot.log_bytes_max, raft.snapshot.max_log_bytes_before_snapshot);
        set(&mut target.snapshot.retained_log_entries, raft.snapshot.retained_log_entries);
        set(&mut target.watch.enabled, raft.watch.enabled);
        set(&mut target.state_machine.lease_enabled, raft.state_machine.lease.enabled);
        let retention = raft.state_machine.history.retention_ms.map(Duration::from_millis);
        set(&mut target.state_machine.history_retention, retention);
        set(&mut target.backpressure.max_pending_bytes, raft.backpressure.max_pending_bytes);

        let target = &mut config.network;
        set(&mut target.call_timeout, network.call_timeout_ms.map(Duration::from_millis));
        set(&mut target.connections_max, network.connections_max);
        set(&mut target.streams_per_connection_max, network.streams_per_connection_max);

        let target = &mut config.tls;
        set_optional(&mut target.enabled, tls.enabled);
        set_optional(&mut target.cert_file, tls.cert_file);
        set_optional(&mut target.key_file, tls.key_file);
        set_optional(&mut target.client_ca_file, tls.client_ca_file);
        set_optional(&mut target.client_auth, tls.client_auth);
        set_optional(&mut target.peer_ca_file, tls.peer_ca_file);
        set_optional(&mut target.peer_name, tls.peer_name);
        set(&mut target.reload_interval, tls.reload_interval_ms.map(Duration::from_millis));

        set_optional(&mut config.monitoring.listen_address, monitoring.listen_address);
        set_optional(&mut config.monitoring.otlp_endpoint, monitoring.otlp_endpoint);
        set(&mut config.monitoring.otlp_sample_ratio, monitoring.otlp_sample_ratio);
    }
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

fn set_optional<T>(target: &mut Option<T>, value: Option<T>) {
    if value.is_some() {
        *target = value;
    }
}

/// A list of tables, or on the command line and in the environment also `1=host:port,2=host:port`.
fn member_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<InitialMember>>, D::Error> {
    struct Members;
    impl<'de> Visitor<'de> for Members {
        type Value = Vec<InitialMember>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(
                "a list such as [{ id = 1, address = \"10.0.0.1:9081\" }] or \"1=10.0.0.1:9081,2=10.0.0.2:9081\"",
            )
        }

        fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
            let members = Vec::<Member>::deserialize(SeqAccessDeserializer::new(seq))?;
            let member = |Member { id, address, role, status }| InitialMember { id, address, role, status };
            Ok(members.into_iter().map(member).collect())
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
            let member = |item: &str| {
                let (id, address) = item.split_once('=')?;
                let id = id.trim().parse().ok()?;
                let (role, status) = (MemberRole::default(), MemberStatus::default());
                Some(InitialMember { id, address: address.trim().to_owned(), role, status })
            };
            text.split(',')
                .map(|item| member(item).ok_or_else(|| E::invalid_value(Unexpected::Str(item), &self)))
                .collect()
        }
    }
    deserializer.deserialize_any(Members).map(Some)
}

/// Something written as a word or as a number.
struct WordOrNumber<T> {
    expected: &'static str,
    read: fn(&str) -> Option<T>,
    value: PhantomData<T>,
}

impl<T> Visitor<'_> for WordOrNumber<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        (self.read)(&number.to_string()).ok_or_else(|| E::invalid_value(Unexpected::Signed(number), &self))
    }

    fn visit_str<E: Error>(self, word: &str) -> Result<T, E> {
        (self.read)(&word.to_ascii_lowercase()).ok_or_else(|| E::invalid_value(Unexpected::Str(word), &self))
    }
}

impl<'de> Deserialize<'de> for MemberRole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WordOrNumber {
            expected: "a role: \"voter\" (also \"follower\", 1; \"candidate\", 2; \"leader\", 3) or \"learner\" (also 4)",
            read: |text| match text {
                "voter" | "follower" | "candidate" | "leader" | "1" | "2" | "3" => Some(Self::Voter),
                "learner" | "4" => Some(Self::Learner),
                _ => None,
            },
            value: PhantomData,
        })
    }
}

impl<'de> Deserialize<'de> for MemberStatus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WordOrNumber {
            expected: "a status: \"active\" (also 2, 3) or \"joining\" (also \"promotable\", 1)",
            read: |text| match text {
                "joining" | "promotable" | "1" => Some(Self::Joining),
                "active" | "2" | "3" => Some(Self::Active),
                _ => None,
            },
            value: PhantomData,
        })
    }
}
