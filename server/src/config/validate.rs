//! The rules that no single key can be checked for, and what follows from other keys.

use rustls::pki_types::ServerName;

use super::address::Address;
use super::error::ConfigError;
use super::{
    ClientAuth, DEFAULT_LISTEN_ADDRESS, FlushPolicy, InitialMember, MemberRole, MemberStatus, PersistenceStrategy,
    RaftNodeConfig, milliseconds,
};
use crate::limits;

const ADDRESS_REMEDY: &str =
    "write host:port, such as \"127.0.0.1:9081\", \"node1.example.org:9081\" or \"[::1]:9081\"";

/// Checks every rule and fills in addresses and members that follow from others.
pub(super) fn validate(config: &mut RaftNodeConfig) -> Result<(), ConfigError> {
    config.warnings.clear();
    unsupported(config)?;
    node(config)?;
    addresses(config)?;
    members(config)?;
    timings(config)?;
    persistence(config)?;
    tls(config)?;
    tracing(config)?;
    bounds(config)
}

fn invalid(config: &RaftNodeConfig, key: &'static str, problem: String, remedy: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { place: config.place_of(key), key, problem, remedy: remedy.into() }
}

fn unsupported(config: &RaftNodeConfig) -> Result<(), ConfigError> {
    let joining = config.cluster.initial_cluster.iter().any(|member| member.status == MemberStatus::Joining);
    let mem_first = config.raft.persistence.strategy == PersistenceStrategy::MemFirst;
    let features: [(bool, &'static str, &'static str, &'static str); 2] = [
        (mem_first, "raft.persistence.strategy", "\"MemFirst\"", "use \"DiskFirst\""),
        (joining, "cluster.initial_cluster", "status \"joining\"", "list the founding members only, as \"active\""),
    ];
    match features.into_iter().find(|(wanted, ..)| *wanted) {
        Some((_, key, value, remedy)) => {
            Err(ConfigError::Unsupported { place: config.place_of(key), key, value, remedy })
        }
        None => Ok(()),
    }
}

fn node(config: &RaftNodeConfig) -> Result<(), ConfigError> {
    if config.cluster.node_id == 0 {
        return Err(invalid(config, "cluster.node_id", "0 is not a node".into(), "number the nodes from 1"));
    }
    if config.cluster.db_root_dir.as_os_str().is_empty() {
        let remedy = "name the directory for this node's data";
        return Err(invalid(config, "cluster.db_root_dir", "the path is empty".into(), remedy));
    }
    Ok(())
}

/// Fills in the addresses left out. What others are told is never a wildcard.
fn addresses(config: &mut RaftNodeConfig) -> Result<(), ConfigError> {
    let node_id = config.cluster.node_id;
    let own = config.cluster.initial_cluster.iter().find(|member| member.id == node_id);
    let own = own.map(|member| member.address.clone());
    let listen = config.cluster.listen_address.clone();
    let listen = listen.or_else(|| own.clone()).unwrap_or_else(|| DEFAULT_LISTEN_ADDRESS.to_owned());
    let listen = parsed(config, "cluster.listen_address", &listen)?;
    let advertised = match config.cluster.advertise_address.clone().or(own) {
        Some(address) => parsed(config, "cluster.advertise_address", &address)?,
        None => listen.clone(),
    };
    let advertised = reachable(config, "cluster.advertise_address", advertised);
    if let Some(monitoring) = config.monitoring.listen_address.clone() {
        let monitoring = parsed(config, "monitoring.listen_address", &monitoring)?;
        if monitoring.collides_with(&listen) {
            let problem = format!("{monitoring} is the port of cluster.listen_address {listen} too");
            return Err(invalid(config, "monitoring.listen_address", problem, "give it a port of its own"));
        }
        config.monitoring.listen_address = Some(monitoring.to_string());
    }
    config.cluster.listen_address = Some(listen.to_string());
    config.cluster.advertise_address = Some(advertised.to_string());
    Ok(())
}

fn parsed(config: &RaftNodeConfig, key: &'static str, text: &str) -> Result<Address, ConfigError> {
    // An address may stand in for one that was left out.
    let stands = if config.place_of(key).is_none() && config.place_of("cluster.initial_cluster").is_some() {
        "cluster.initial_cluster"
    } else {
        key
    };
    Address::parse(text).map_err(|problem| invalid(config, stands, problem, ADDRESS_REMEDY))
}

fn reachable(config: &mut RaftNodeConfig, key: &str, address: Address) -> Address {
    let reachable = address.reachable();
    if reachable != address {
        config.warnings.push(format!(
            "{key}: nobody can connect to {address}, so {reachable} is advertised, which works on this machine only"
        ));
    }
    reachable
}

/// Checks the members, and makes up a cluster of this node alone if there are none.
fn members(config: &mut RaftNodeConfig) -> Result<(), ConfigError> {
    const KEY: &str = "cluster.initial_cluster";
    let node_id = config.cluster.node_id;
    if config.cluster.initial_cluster.is_empty() {
        config.cluster.initial_cluster = vec![InitialMember {
            id: node_id,
            address: config.cluster.advertise_address.clone().unwrap_or_default(),
            role: MemberRole::Voter,
            status: MemberStatus::Active,
        }];
    }
    let mut members = config.cluster.initial_cluster.clone();
    for index in 0..members.len() {
        let id = members[index].id;
        if id == 0 {
            return Err(invalid(config, KEY, "a member has id 0".into(), "number the nodes from 1"));
        }
        let address = Address::parse(&members[index].address)
            .map_err(|problem| invalid(config, KEY, format!("member {id}: {problem}"), ADDRESS_REMEDY))?;
        let address = reachable(config, KEY, address).to_string();
        let earlier = &members[..index];
        if earlier.iter().any(|member| member.id == id) {
            return Err(invalid(config, KEY, format!("id {id} is there twice"), "give every node an id of its own"));
        }
        if let Some(twin) = earlier.iter().find(|member| member.address == address) {
            let problem = format!("members {} and {id} share the address {address}", twin.id);
            return Err(invalid(config, KEY, problem, "give every node an address of its own"));
        }
        members[index].address = address;
    }
    let ids: Vec<String> = members.iter().map(|member| member.id.to_string()).collect();
    if !members.iter().any(|member| member.id == node_id) {
        let problem = format!("node {node_id}, this one, is not a member");
        let remedy = format!("add it, or set cluster.node_id to one of {}", ids.join(", "));
        return Err(invalid(config, KEY, problem, remedy));
    }
    if !members.iter().any(|member| member.role == MemberRole::Voter) {
        let remedy = "make at least one of them a voter, better three";
        return Err(invalid(config, KEY, "no member votes, so nobody could lead".into(), remedy));
    }
    config.cluster.initial_cluster = members;
    Ok(())
}

/// The relations that keep a lease shorter than any reign that could end it, and a cluster from electing for no reason.
fn timings(config: &RaftNodeConfig) -> Result<(), ConfigError> {
    const LEASE: &str = "raft.read_consistency.lease_duration_ms";
    const MIN: &str = "raft.election.election_timeout_min";
    const MAX: &str = "raft.election.election_timeout_max";
    const HEARTBEAT: &str = "raft.election.heartbeat_interval";
    let timings = config.raft.timings();
    let [lease, min, max, heartbeat] =
        [timings.lease, timings.election_min, timings.election_max, timings.heartbeat].map(milliseconds);

    if !(limits::LEASE_MS_MIN..=limits::RAFT_TIME_MS_MAX).contains(&lease) {
        let remedy = format!("choose {} to {}", limits::LEASE_MS_MIN, limits::RAFT_TIME_MS_MAX);
        return Err(invalid(config, LEASE, format!("{lease} ms is out of bounds"), remedy));
    }
    let bounds = limits::HEARTBEAT_MS_MIN..=2 * limits::RAFT_TIME_MS_MAX;
    for (key, value) in [(MIN, min), (MAX, max), (HEARTBEAT, heartbeat)] {
        if !bounds.contains(&value) {
            let (start, end) = (bounds.start(), bounds.end());
            let remedy = format!("choose {start} to {end}, or leave it out to have it follow from the lease");
            return Err(invalid(config, key, format!("{value} ms is out of bounds"), remedy));
        }
    }
    if min >= max {
        let problem = format!("{min} ms is not below election_timeout_max, {max} ms, so that nodes campaign in step");
        return Err(invalid(config, MIN, problem, format!("choose less than {max}, or leave both out")));
    }
    let bound = limits::election_timeout_max_ms_above(lease);
    if max <= bound {
        let problem = format!(
            "{max} ms does not outlast the lease of {lease} ms by more than clocks may drift ({} %), so that an \
             old leader could answer stale reads",
            limits::CLOCK_DRIFT_PERCENT_MAX
        );
        let remedy = format!("choose more than {bound}, or a shorter {LEASE}, or leave the election timeouts out");
        return Err(invalid(config, MAX, problem, remedy));
    }
    let heartbeat_max = (min / limits::HEARTBEATS_PER_ELECTION_MIN).min(lease / limits::HEARTBEATS_PER_LEASE_MIN);
    if heartbeat > heartbeat_max {
        let problem = format!(
            "{heartbeat} ms is too long: {} heartbeats have to fit in election_timeout_min, {min} ms, and {} in the \
             lease, {lease} ms",
            limits::HEARTBEATS_PER_ELECTION_MIN,
            limits::HEARTBEATS_PER_LEASE_MIN
        );
        return Err(invalid(config, HEARTBEAT, problem, format!("choose at most {heartbeat_max}, or leave it out")));
    }
    Ok(())
}

fn persistence(config: &mut RaftNodeConfig) -> Result<(), ConfigError> {
    const KEY: &str = "raft.persistence.flush_policy";
    let FlushPolicy::Batch(batch) = config.raft.persistence.flush_policy else { return Ok(()) };
    if batch.threshold == 0 || batch.interval_ms == 0 {
        let remedy = "choose 1 or more for threshold and interval_ms, or use flush_policy = \"Immediate\"";
        return Err(invalid(config, KEY, "a batch of nothing, or of no time".into(), remedy));
    }
    config.warnings.push(format!(
        "{KEY} has nothing to do under strategy \"DiskFirst\": what is acknowledged is on the disks of a majority"
    ));
    Ok(())
}

/// Which keys go together. What the files hold is checked at start, and again whenever they change.
fn tls(config: &RaftNodeConfig) -> Result<(), ConfigError> {
    let tls = &config.tls;
    if !tls.is_on() {
        let others = [
            ("tls.key_file", tls.key_file.is_some()),
            ("tls.client_ca_file", tls.client_ca_file.is_some()),
            ("tls.client_auth", tls.client_auth.is_some()),
            ("tls.peer_ca_file", tls.peer_ca_file.is_some()),
            ("tls.peer_name", tls.peer_name.is_some()),
        ];
        return match others.into_iter().find(|(_, set)| *set && tls.enabled.is_none()) {
            Some((key, _)) => {
                let remedy = "set tls.cert_file too, or tls.enabled = false for a port without TLS";
                Err(invalid(config, key, "there is no tls.cert_file, so TLS would be off".into(), remedy))
            }
            None => Ok(()),
        };
    }
    // A key that is missing has no place; its section has one.
    let needs = |key: &'static str, problem: &str, remedy: &str| {
        let place = config.place_of(key).or_else(|| config.place_of("tls"));
        Err(ConfigError::Invalid { place, key, problem: problem.to_owned(), remedy: remedy.to_owned() })
    };
    if tls.cert_file.is_none() {
        return needs("tls.cert_file", "TLS is on and no certificate is named", "name a PEM file with this node's");
    }
    if tls.key_file.is_none() {
        let remedy = "name the PEM file with the private key of tls.cert_file";
        return needs("tls.key_file", "tls.cert_file is of no use without its key", remedy);
    }
    match (tls.client_auth(), &tls.client_ca_file) {
        (ClientAuth::Optional | ClientAuth::Required, None) => {
            let remedy = "set it, or leave tls.client_auth out";
            return needs("tls.client_ca_file", "clients show certificates, and nothing says whose count", remedy);
        }
        (ClientAuth::None, Some(_)) => {
            let remedy = "choose \"optional\" or \"required\", or leave tls.client_ca_file out";
            return needs("tls.client_auth", "\"none\" leaves tls.client_ca_file without effect", remedy);
        }
        _ => {}
    }
    let alone = config.cluster.initial_cluster.len() == 1;
    match (&tls.peer_ca_file, &tls.peer_name) {
        (None, None) if alone => {}
        (None, _) => {
            let remedy = "name the PEM file with the certificate of the CA that issues those of members";
            return needs("tls.peer_ca_file", "members know each other by certificates of it", remedy);
        }
        (_, None) => {
            let remedy = "choose a DNS name, such as \"peer.d-engine\", that every member's certificate carries";
            return needs("tls.peer_name", "members know each other by this name in their certificates", remedy);
        }
        (Some(_), Some(name)) => {
            if !matches!(ServerName::try_from(name.as_str()), Ok(ServerName::DnsName(_))) {
                let problem = format!("{name:?} is no DNS name");
                return Err(invalid(config, "tls.peer_name", problem, "choose one such as \"peer.d-engine\""));
            }
        }
    }
    let interval = milliseconds(tls.reload_interval);
    let bounds = limits::TLS_RELOAD_INTERVAL_MS_MIN..=limits::TLS_RELOAD_INTERVAL_MS_MAX;
    if !bounds.contains(&interval) {
        let remedy = format!("choose {} to {}", bounds.start(), bounds.end());
        return Err(invalid(config, "tls.reload_interval_ms", format!("{interval} ms is out of bounds"), remedy));
    }
    Ok(())
}

fn tracing(config: &RaftNodeConfig) -> Result<(), ConfigError> {
    if let Some(endpoint) = &config.monitoring.otlp_endpoint {
        let address = endpoint.strip_prefix("http://").map(|rest| rest.strip_suffix('/').unwrap_or(rest));
        if address.is_none_or(|address| Address::parse(address).is_err()) {
            let problem = format!("{endpoint:?} is no collector's address");
            let remedy = "write http://host:port, such as \"http://127.0.0.1:4317\"";
            return Err(invalid(config, "monitoring.otlp_endpoint", problem, remedy));
        }
    }
    let ratio = config.monitoring.otlp_sample_ratio;
    if !(0.0..=1.0).contains(&ratio) {
        let problem = format!("{ratio} is out of bounds");
        return Err(invalid(config, "monitoring.otlp_sample_ratio", problem, "choose 0.0 to 1.0"));
    }
    Ok(())
}

fn bounds(config: &RaftNodeConfig) -> Result<(), ConfigError> {
    let pending = config.raft.backpressure.max_pending_bytes;
    if pending < limits::PENDING_BYTES_MIN {
        let remedy = format!("choose {} or more", limits::PENDING_BYTES_MIN);
        let problem = format!("{pending} bytes leave no room for a few large requests");
        return Err(invalid(config, "raft.backpressure.max_pending_bytes", problem, remedy));
    }
    let retention = milliseconds(config.raft.state_machine.history_retention);
    let bounds = limits::HISTORY_RETENTION_MS_MIN..=limits::HISTORY_RETENTION_MS_MAX;
    if retention != 0 && !bounds.contains(&retention) {
        let remedy =
            format!("choose {} to {}, or 0 to keep history until it is compacted", bounds.start(), bounds.end());
        let problem = format!("{retention} ms is out of bounds");
        return Err(invalid(config, "raft.state_machine.history.retention_ms", problem, remedy));
    }
    for (key, value) in [
        ("raft.snapshot.max_log_entries_before_snapshot", config.raft.snapshot.log_entries_max),
        ("raft.snapshot.max_log_bytes_before_snapshot", config.raft.snapshot.log_bytes_max),
    ] {
        if value == 0 {
            let remedy = "choose 1 or more, or set raft.snapshot.enable to false";
            return Err(invalid(config, key, "0 would make snapshots without end".into(), remedy));
        }
    }
    let timeout = milliseconds(config.network.call_timeout);
    let timeout_max = milliseconds(limits::CALL_TIMEOUT_MAX);
    if timeout == 0 || timeout > timeout_max {
        let problem = format!("{timeout} ms is out of bounds");
        return Err(invalid(config, "network.call_timeout_ms", problem, format!("choose 1 to {timeout_max}")));
    }
    for (key, zero) in [
        ("network.connections_max", config.network.connections_max == 0),
        ("network.streams_per_connection_max", config.network.streams_per_connection_max == 0),
    ] {
        if zero {
            return Err(invalid(config, key, "0 would let nobody in".into(), "choose 1 or more"));
        }
    }
    let streams = config.network.streams_per_connection_max;
    if streams as usize > limits::READS_WAITING_MAX {
        let problem = format!("{streams} is out of bounds");
        let remedy = format!("choose 1 to {}", limits::READS_WAITING_MAX);
        return Err(invalid(config, "network.streams_per_connection_max", problem, remedy));
    }
    Ok(())
}
