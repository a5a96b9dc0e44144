//! The contract's examples are accepted and mean what they say; every refusal names the place and what is valid.

use std::path::PathBuf;

use super::*;

const THREE_NODES: &str = r#"
[cluster]
node_id = 2
listen_address = "0.0.0.0:9082"
initial_cluster = [
    { id = 1, address = "10.0.0.1:9081", role = 1, status = 2 },
    { id = 2, address = "node2.example.org:9082", role = "Follower", status = "active" },
    { id = 3, address = "[::1]:9083" },
    { id = 4, address = "10.0.0.4:9084", role = 4, status = 3 },
]
db_root_dir = "./db/2"
log_dir = "./logs"
"#;

fn with_variables(text: &str, variables: &[(&str, &str)]) -> Result<RaftNodeConfig, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("n1.toml");
    std::fs::write(&path, text).unwrap();
    let path = (CONFIG_PATH_VARIABLE.to_owned(), path.to_str().unwrap().to_owned());
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    RaftNodeConfig::from_environment(variables.chain([path]))
}

fn load(text: &str) -> Result<RaftNodeConfig, ConfigError> {
    with_variables(text, &[])?.validate()
}

fn error_of(text: &str) -> String {
    let error = load(text).map(|_| ()).expect_err(text).to_string();
    let start = error.find("n1.toml").unwrap_or_else(|| panic!("no file in: {error}"));
    error[start..].to_owned()
}

#[track_caller]
fn assert_refused(text: &str, parts: &[&str]) {
    let error = error_of(text);
    for part in parts {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
}

#[test]
fn the_defaults_are_a_cluster_of_one_node() {
    let config = RaftNodeConfig::default().validate().unwrap();
    assert_eq!(config.cluster.node_id, 1);
    assert_eq!(config.cluster.listen_address.as_deref(), Some("127.0.0.1:9081"));
    assert_eq!(config.cluster.advertise_address.as_deref(), Some("127.0.0.1:9081"));
    assert_eq!(config.cluster.initial_cluster.len(), 1);
    assert_eq!(config.cluster.initial_cluster[0].address, "127.0.0.1:9081");
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn a_development_node_keeps_its_data_where_the_caller_says() {
    let config = RaftNodeConfig::dev("/tmp/somewhere").validate().unwrap();
    assert_eq!(config.cluster.db_root_dir, PathBuf::from("/tmp/somewhere"));
}

#[test]
fn members_are_read_with_roles_and_states_as_words_numbers_or_left_out() {
    let config = load(THREE_NODES).unwrap();
    assert_eq!(config.cluster.node_id, 2);
    assert_eq!(config.cluster.listen_address.as_deref(), Some("0.0.0.0:9082"));
    assert_eq!(config.cluster.advertise_address.as_deref(), Some("node2.example.org:9082"));
    assert_eq!(config.cluster.db_root_dir, PathBuf::from("./db/2"));
    assert_eq!(config.cluster.log_dir, Some(PathBuf::from("./logs")));
    let members: Vec<_> =
        config.cluster.initial_cluster.iter().map(|member| (member.id, member.address.as_str(), member.role)).collect();
    let expected = [
        (1, "10.0.0.1:9081", MemberRole::Voter),
        (2, "node2.example.org:9082", MemberRole::Voter),
        (3, "[::1]:9083", MemberRole::Voter),
        (4, "10.0.0.4:9084", MemberRole::Learner),
    ];
    assert_eq!(members, expected);
    assert!(config.cluster.initial_cluster.iter().all(|member| member.status == MemberStatus::Active));
}

#[test]
fn candidates_and_leaders_of_older_files_are_voters() {
    for role in ["2", "3", "\"candidate\"", "\"LEADER\"", "\"voter\""] {
        let text = format!("[cluster]\ninitial_cluster = [{{ id = 1, address = \"a:1\", role = {role} }}]");
        assert_eq!(load(&text).unwrap().cluster.initial_cluster[0].role, MemberRole::Voter, "{role}");
    }
}

#[test]
fn a_file_that_only_says_how_long_the_lease_is_starts_as_it_is() {
    let config = load("[raft.read_consistency]\nlease_duration_ms = 500").unwrap();
    let milliseconds = Duration::from_millis;
    let expected = Timings {
        lease: milliseconds(500),
        election_min: milliseconds(500),
        election_max: milliseconds(750),
        heartbeat: milliseconds(166),
    };
    assert_eq!(config.raft.timings(), expected);
}

#[test]
fn every_lease_within_bounds_starts_as_it_is() {
    for lease in limits::LEASE_MS_MIN..2000 {
        load(&format!("[raft.read_consistency]\nlease_duration_ms = {lease}")).unwrap();
    }
    load(&format!("[raft.read_consistency]\nlease_duration_ms = {}", limits::RAFT_TIME_MS_MAX)).unwrap();
}

#[test]
fn every_election_timeout_that_stands_alone_and_suits_the_lease_is_accepted() {
    for min in (50..3000).step_by(7) {
        load(&format!("[raft.election]\nelection_timeout_min = {min}")).unwrap();
    }
    for max in (264..3000).step_by(7) {
        load(&format!("[raft.election]\nelection_timeout_max = {max}")).unwrap();
    }
}

#[test]
fn the_sections_of_the_contract_are_accepted_and_mean_what_they_say() {
    let config = load(
        r#"
        [raft.read_consistency]
        default_policy = "LeaseRead"
        lease_duration_ms = 400
        allow_client_override = false
        [raft.persistence]
        strategy = "DiskFirst"
        flush_policy = { Batch = { threshold = 100, interval_ms = 20 } }
        [raft.election]
        election_timeout_min = 1000
        election_timeout_max = 2000
        heartbeat_interval = 90
        [raft.snapshot]
        enable = false
        [raft.watch]
        enabled = false
        [raft.state_machine.lease]
        enabled = false
        [raft.state_machine.history]
        retention_ms = 5000
        [raft.backpressure]
        max_pending_bytes = 8_388_608
        [network]
        call_timeout_ms = 3000
        connections_max = 100
        streams_per_connection_max = 10
        [tls]
        enabled = false
        [monitoring]
        listen_address = "127.0.0.1:9181"
        otlp_endpoint = "http://collector:4317"
        otlp_sample_ratio = 0.01
        "#,
    )
    .unwrap();
    assert_eq!(config.raft.read_consistency.default_policy, ReadPolicy::LeaseRead);
    assert!(!config.raft.read_consistency.allow_client_override);
    let StateMachineConfig { lease_enabled, history_retention } = config.raft.state_machine;
    assert_eq!((lease_enabled, history_retention), (false, Duration::from_secs(5)));
    let batch = FlushBatch { threshold: 100, interval_ms: 20 };
    assert_eq!(config.raft.persistence.flush_policy, FlushPolicy::Batch(batch));
    assert!(config.warnings[0].contains("DiskFirst"));
    let timings = config.raft.timings();
    assert_eq!((timings.lease.as_millis(), timings.election_min.as_millis()), (400, 1000));
    assert_eq!((timings.election_max.as_millis(), timings.heartbeat.as_millis()), (2000, 90));
    assert_eq!(config.raft.backpressure.max_pending_bytes, 8 << 20);
    assert_eq!(config.network.call_timeout, Duration::from_secs(3));
    assert_eq!((config.network.connections_max, config.network.streams_per_connection_max), (100, 10));
    assert_eq!(config.monitoring.listen_address.as_deref(), Some("127.0.0.1:9181"));
    assert_eq!(config.monitoring.otlp_endpoint.as_deref(), Some("http://collector:4317"));
    assert_eq!(config.monitoring.otlp_sample_ratio.to_string(), "0.01");
}

#[test]
fn a_collector_has_an_address_and_a_share_lies_between_nothing_and_everything() {
    for endpoint in ["collector:4317", "https://collector:4317", "http://collector", "http://", ""] {
        let text = format!("[monitoring]\notlp_endpoint = \"{endpoint}\"");
        assert_refused(&text, &["n1.toml:2: monitoring.otlp_endpoint", "http://127.0.0.1:4317"]);
    }
    for ratio in ["-0.1", "1.1", "nan", "inf"] {
        assert_refused(
            &format!("[monitoring]\notlp_sample_ratio = {ratio}"),
            &["monitoring.otlp_sample_ratio", "0.0 to"],
        );
    }
    for ratio in ["0", "1", "0.5"] {
        load(&format!("[monitoring]\notlp_sample_ratio = {ratio}")).unwrap();
    }
}

#[test]
fn a_wildcard_among_the_members_is_advertised_as_loopback_with_a_warning() {
    let config = load(
        "[cluster]\ninitial_cluster = [{ id = 1, address = \"0.0.0.0:9081\" }, { id = 2, address = \"[::]:9082\" }]",
    )
    .unwrap();
    assert_eq!(config.cluster.initial_cluster[0].address, "127.0.0.1:9081");
    assert_eq!(config.cluster.initial_cluster[1].address, "[::1]:9082");
    assert_eq!(config.cluster.listen_address.as_deref(), Some("0.0.0.0:9081"));
    assert_eq!(config.cluster.advertise_address.as_deref(), Some("127.0.0.1:9081"));
    assert!(config.warnings.iter().any(|warning| warning.contains("0.0.0.0:9081") && warning.contains("127.0.0.1")));
}

#[test]
fn a_configuration_can_be_validated_twice() {
    let once = load(THREE_NODES).unwrap();
    let twice = once.clone().validate().unwrap();
    assert_eq!(format!("{:?}", once.cluster), format!("{:?}", twice.cluster));
}

#[test]
fn a_path_may_leave_out_its_extension() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("n7.toml"), "[cluster]\nnode_id = 7").unwrap();
    let config = RaftNodeConfig::default().with_override_config(directory.path().join("n7")).unwrap();
    assert_eq!(config.cluster.node_id, 7);
}

#[test]
fn a_missing_file_is_refused_with_both_names_tried() {
    let error = RaftNodeConfig::default().with_override_config("/nowhere/n1").unwrap_err();
    assert!(matches!(error, ConfigError::NotFound { .. }));
    assert!(error.to_string().contains("/nowhere/n1 or /nowhere/n1.toml"), "{error}");
}

#[test]
fn an_overriding_file_wins_key_by_key_and_the_environment_wins_over_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("override.toml");
    std::fs::write(&path, "[cluster]\nnode_id = 3\ndb_root_dir = \"./other\"").unwrap();
    let variables =
        [("D_ENGINE__CLUSTER__DB_ROOT_DIR", "/data/1"), ("D_ENGINE__RAFT__ELECTION__HEARTBEAT_INTERVAL", "20")];
    let config = with_variables(THREE_NODES, &variables).unwrap();
    assert_eq!(config.cluster.node_id, 2);
    let config = config.with_override_config(&path).unwrap().validate().unwrap();
    assert_eq!(config.cluster.node_id, 3);
    assert_eq!(config.cluster.db_root_dir, PathBuf::from("/data/1"));
    assert_eq!(config.cluster.log_dir, Some(PathBuf::from("./logs")));
    assert_eq!(config.raft.timings().heartbeat, Duration::from_millis(20));
}

#[test]
fn the_environment_alone_can_configure_a_cluster() {
    let variables = [
        ("D_ENGINE__CLUSTER__NODE_ID", "2"),
        ("D_ENGINE__CLUSTER__INITIAL_CLUSTER", "1=10.0.0.1:9081,2=10.0.0.2:9081"),
        ("D_ENGINE__CLUSTER__DB_ROOT_DIR", "123"),
        ("D_ENGINE__RAFT__READ_CONSISTENCY__DEFAULT_POLICY", "EventualConsistency"),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let config = RaftNodeConfig::from_environment(variables.into_iter()).unwrap().validate().unwrap();
    assert_eq!(config.cluster.node_id, 2);
    assert_eq!(config.cluster.listen_address.as_deref(), Some("10.0.0.2:9081"));
    assert_eq!(config.cluster.initial_cluster[0].address, "10.0.0.1:9081");
    assert_eq!(config.cluster.db_root_dir, PathBuf::from("123"));
    assert_eq!(config.raft.read_consistency.default_policy, ReadPolicy::EventualConsistency);
}

#[test]
fn an_unknown_or_malformed_variable_is_refused_by_its_name() {
    for (name, value, part) in [
        ("D_ENGINE__CLUSTER__NODE", "2", "node_id"),
        ("D_ENGINE__CLUSTER__NODE_ID", "two", "u32"),
        ("D_ENGINE__CLUSTER__INITIAL_CLUSTER", "10.0.0.1:9081", "1=10.0.0.1:9081"),
    ] {
        let variables = [(name.to_owned(), value.to_owned())];
        let error = RaftNodeConfig::from_environment(variables.into_iter()).unwrap_err().to_string();
        assert!(error.starts_with(name) && error.contains(part), "{error}");
    }
}

#[test]
fn a_flag_wins_over_everything_and_is_named_in_errors() {
    let config = load(THREE_NODES).unwrap().with_setting("--node-id", "cluster.node_id", "9").unwrap();
    assert_eq!(config.cluster.node_id, 9);
    let config = config.with_setting("--node-id", "cluster.node_id", "0").unwrap();
    let error = config.validate().unwrap_err().to_string();
    assert!(error.starts_with("--node-id: cluster.node_id: 0 is not a node"), "{error}");
}

#[test]
fn an_unknown_key_is_refused_with_line_and_valid_keys() {
    assert_refused("[cluster]\nnode = 1", &["n1.toml:2", "unknown field `node`", "`node_id`", "`db_root_dir`"]);
    assert_refused("[clutser]\nnode_id = 1", &["n1.toml:1", "`clutser`", "`cluster`", "`monitoring`"]);
    assert_refused("[raft.elections]", &["n1.toml:1", "`elections`", "`election`"]);
    assert_refused("[network]\n\nfast = true", &["n1.toml:3", "`fast`", "`call_timeout_ms`"]);
    assert_refused(
        "[cluster]\ninitial_cluster = [\n{ id = 1, adress = \"a:1\" }]",
        &["n1.toml:3", "`adress`", "`address`"],
    );
    let policy = "[raft.persistence]\nflush_policy = { Batch = { threshold = 1, interval_ms = 1, more = 1 } }";
    assert_refused(policy, &["n1.toml:2", "`more`", "`interval_ms`"]);
}

#[test]
fn a_value_of_the_wrong_kind_is_refused_with_line_and_expectation() {
    assert_refused("[cluster]\nnode_id = \"one\"", &["n1.toml:2", "node_id", "u32"]);
    assert_refused("[cluster]\nnode_id = -1", &["n1.toml:2", "u32"]);
    assert_refused("[raft.read_consistency]\ndefault_policy = \"Fast\"", &["n1.toml:2", "`LeaseRead`"]);
    assert_refused("[raft.persistence]\nstrategy = \"Never\"", &["n1.toml:2", "`DiskFirst`"]);
    let role = "[cluster]\ninitial_cluster = [{ id = 1, address = \"a:1\", role = ";
    assert_refused(&format!("{role}5 }}]"), &["n1.toml:2", "learner"]);
    assert_refused(&format!("{role}\"boss\" }}]"), &["n1.toml:2", "boss", "learner"]);
    assert_refused(&format!("{role}1, status = 9 }}]"), &["n1.toml:2", "joining"]);
    assert_refused("[cluster]\ninitial_cluster = [{ id = 1 }]", &["n1.toml:2", "`address`"]);
    assert_refused("[cluster\nnode_id = 1", &["n1.toml:1"]);
    assert_refused("[cluster]\nnode_id = 1\nnode_id = 2", &["n1.toml:3", "duplicate"]);
}

#[test]
fn members_that_cannot_form_a_cluster_are_refused() {
    let members = |list: &str| format!("[cluster]\nnode_id = 2\ninitial_cluster = [{list}]");
    let key = "n1.toml:3: cluster.initial_cluster";
    assert_refused(&members("{ id = 1, address = \"a:1\" }"), &[key, "node 2", "not a member", "one of 1"]);
    let twice = "{ id = 2, address = \"a:1\" }, { id = 2, address = \"b:1\" }";
    assert_refused(&members(twice), &[key, "id 2 is there twice"]);
    let same = "{ id = 1, address = \"Host:1\" }, { id = 2, address = \"host:1\" }";
    assert_refused(&members(same), &[key, "members 1 and 2 share the address host:1"]);
    let wildcard = "{ id = 1, address = \"0.0.0.0:1\" }, { id = 2, address = \"127.0.0.1:1\" }";
    assert_refused(&members(wildcard), &[key, "share the address 127.0.0.1:1"]);
    let zero = "{ id = 0, address = \"a:1\" }, { id = 2, address = \"b:1\" }";
    assert_refused(&members(zero), &[key, "id 0", "from 1"]);
    assert_refused(&members("{ id = 2, address = \"b:1\", role = 4 }"), &[key, "no member votes"]);
}

#[test]
fn bad_numbers_and_addresses_of_the_node_are_refused() {
    assert_refused("[cluster]\nnode_id = 0", &["n1.toml:2: cluster.node_id", "from 1"]);
    assert_refused("[cluster]\ndb_root_dir = \"\"", &["n1.toml:2: cluster.db_root_dir", "empty"]);
    for (address, problem) in [
        ("localhost", "no port"),
        (":9081", "no host"),
        ("localhost:", "port from 1 to 65535"),
        ("localhost:0", "port from 1 to 65535"),
        ("localhost:70000", "port from 1 to 65535"),
        ("http://localhost:9081", "scheme"),
        ("::1:9081", "brackets"),
        ("[node]:9081", "IPv6"),
        ("a b:9081", "neither a name nor a number"),
    ] {
        for (section, key) in
            [("cluster", "listen_address"), ("cluster", "advertise_address"), ("monitoring", "listen_address")]
        {
            let text = format!("[{section}]\n{key} = \"{address}\"");
            assert_refused(&text, &[&format!("n1.toml:2: {section}.{key}"), problem, "host:port"]);
        }
        let text = format!("[cluster]\ninitial_cluster = [{{ id = 1, address = \"{address}\" }}]");
        assert_refused(&text, &["n1.toml:2: cluster.initial_cluster", problem, "host:port"]);
    }
    for monitoring in ["127.0.0.1:9081", "0.0.0.0:9081"] {
        let text =
            format!("[cluster]\nlisten_address = \"127.0.0.1:9081\"\n[monitoring]\nlisten_address = \"{monitoring}\"");
        assert_refused(&text, &["n1.toml:4: monitoring.listen_address", "a port of its own"]);
    }
}

#[test]
fn times_that_contradict_each_other_are_refused() {
    let election = |keys: &str| format!("[raft.election]\n{keys}");
    let max = "n1.toml:2: raft.election.election_timeout_max";
    assert_refused(&election("election_timeout_max = 262"), &[max, "lease of 250 ms", "more than 263"]);
    assert_refused(&election("election_timeout_max = 263"), &[max]);
    load(&election("election_timeout_max = 264")).unwrap();
    let equal = election("election_timeout_max = 400\nelection_timeout_min = 400");
    assert_refused(&equal, &["n1.toml:3: raft.election.election_timeout_min", "less than 400"]);
    let heartbeat = "n1.toml:2: raft.election.heartbeat_interval";
    assert_refused(&election("heartbeat_interval = 84"), &[heartbeat, "at most 83"]);
    load(&election("heartbeat_interval = 83")).unwrap();
    assert_refused(&election("heartbeat_interval = 9"), &[heartbeat, "out of bounds"]);
    let lease = |ms: u64| format!("[raft.read_consistency]\nlease_duration_ms = {ms}");
    for ms in [0, 49, 60_001] {
        assert_refused(&lease(ms), &["n1.toml:2: raft.read_consistency.lease_duration_ms", "choose 50 to 60000"]);
    }
}

#[test]
fn bounds_that_would_let_nothing_through_are_refused() {
    assert_refused(
        "[raft.backpressure]\nmax_pending_bytes = 1000",
        &["n1.toml:2: raft.backpressure.max_pending_bytes", "or more"],
    );
    assert_refused("[network]\ncall_timeout_ms = 0", &["n1.toml:2: network.call_timeout_ms", "choose 1 to 60000"]);
    let retention = |value: &str| format!("[raft.state_machine.history]\nretention_ms = {value}");
    assert_refused(&retention("999"), &["n1.toml:2: raft.state_machine.history.retention_ms", "1000 to", "or 0"]);
    assert_refused(&retention("31536000001"), &["raft.state_machine.history.retention_ms", "31536000000"]);
    assert!(load(&retention("0")).unwrap().raft.state_machine.history_retention.is_zero());
    assert_refused("[network]\nconnections_max = 0", &["n1.toml:2: network.connections_max", "1 or more"]);
    assert_refused("[network]\nstreams_per_connection_max = 0", &["network.streams_per_connection_max", "1 or more"]);
    assert_refused(
        "[network]\nstreams_per_connection_max = 100000",
        &["network.streams_per_connection_max", "1 to 65536"],
    );
    let batch = "[raft.persistence]\nflush_policy = { Batch = { threshold = 0, interval_ms = 20 } }";
    assert_refused(batch, &["n1.toml:2: raft.persistence.flush_policy", "1 or more"]);
}

#[test]
fn what_would_silently_not_be_honoured_is_refused_as_not_supported_yet() {
    for (text, key) in [
        ("[raft.persistence]\nstrategy = \"MemFirst\"", "raft.persistence.strategy"),
        ("[cluster]\ninitial_cluster = [{ id = 1, address = \"a:1\", status = 1 }]", "cluster.initial_cluster"),
    ] {
        assert_refused(text, &[&format!("n1.toml:2: {key}"), "not supported yet"]);
    }
}

#[test]
fn keys_of_tls_go_together() {
    const ALONE: &str = "[tls]\ncert_file = \"n1.pem\"\nkey_file = \"n1.key\"\n";
    let three = "[cluster]\ninitial_cluster = [{ id = 1, address = \"a:1\" }, { id = 2, address = \"b:1\" }]\n";
    for (text, words) in [
        ("[tls]\nkey_file = \"n1.key\"".to_owned(), ["tls.key_file", "tls.cert_file"]),
        ("[tls]\nenabled = true".to_owned(), ["tls.cert_file", "no certificate"]),
        ("[tls]\ncert_file = \"n1.pem\"".to_owned(), ["tls.key_file", "private key"]),
        (format!("{ALONE}client_auth = \"optional\""), ["tls.client_ca_file", "whose count"]),
        (format!("{ALONE}client_ca_file = \"ca\"\nclient_auth = \"none\""), ["tls.client_auth", "without effect"]),
        (format!("{ALONE}client_auth = \"maybe\""), ["client_auth", "required"]),
        (format!("{ALONE}peer_name = \"peer\""), ["tls.peer_ca_file", "CA"]),
        (format!("{ALONE}peer_ca_file = \"ca\""), ["tls.peer_name", "DNS name"]),
        (format!("{ALONE}peer_ca_file = \"ca\"\npeer_name = \"10.0.0.1\""), ["tls.peer_name", "no DNS name"]),
        (format!("{ALONE}reload_interval_ms = 99"), ["tls.reload_interval_ms", "100 to"]),
        (format!("{three}{ALONE}"), ["tls.peer_ca_file", "CA"]),
    ] {
        assert_refused(&text, &words);
    }
    let off = load(&format!("{ALONE}enabled = false\nclient_auth = \"required\"")).unwrap();
    assert!(!off.tls.is_on());
    assert_eq!(load(ALONE).unwrap().tls.client_auth(), ClientAuth::None);
    let asked = load(&format!("{ALONE}client_ca_file = \"ca\"")).unwrap();
    assert_eq!((asked.tls.is_on(), asked.tls.client_auth()), (true, ClientAuth::Required));
}
