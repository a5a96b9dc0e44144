//! Leases at the shell.

#![allow(clippy::unwrap_used, clippy::panic)]

mod shell;

use shell::Server;

#[test]
fn a_lease_takes_its_keys_along_when_it_is_revoked() {
    let server = Server::start();
    assert_eq!(server.text(&["lease", "grant", "1h", "--id", "7"]), "lease 7 granted for 3600s\n");
    server.text(&["kv", "put", "b", "2", "--lease", "7"]);
    assert_eq!(server.json(&["kv", "put", "a", "1", "--lease", "7"])["lease"], 7);
    server.text(&["kv", "put", "c", "3"]);

    let ttl = server.json(&["lease", "ttl", "7", "--keys"]);
    assert_eq!((&ttl["ttl_ms"], &ttl["key_count"]), (&3_600_000.into(), &2.into()));
    assert_eq!((&ttl["keys"][0]["key"], &ttl["keys"][1]["key"]), (&"a".into(), &"b".into()));
    let table = server.text(&["lease", "ttl", "7", "--keys"]);
    assert!(table.starts_with("LEASE  TTL    LEFT") && table.ends_with("\na\nb\n"), "{table}");

    let other = server.json(&["lease", "grant", "10m"])["lease"].as_u64().unwrap().to_string();
    let list = server.json(&["lease", "list"]);
    assert_eq!(list.as_array().unwrap().len(), 2);
    assert!(server.text(&["lease", "list"]).lines().any(|line| line.starts_with("7      3600s")));

    assert_eq!(server.text(&["lease", "revoke", "7"]), "lease 7 revoked, 2 keys deleted, revision 4\n");
    assert_eq!(server.text(&["kv", "range", "--keys-only"]), "c\n");
    assert_eq!(
        server.text(&["lease", "revoke", &other]),
        format!("lease {other} revoked, 0 keys deleted, revision 4\n")
    );
    assert_eq!(server.text(&["lease", "list"]), "LEASE  TTL  LEFT  KEYS\n");
}

#[test]
fn a_lease_that_does_not_exist_has_the_exit_code_of_what_does_not_exist() {
    let server = Server::start();
    for command in [
        &["lease", "ttl", "5"][..],
        &["lease", "revoke", "5"],
        &["lease", "keep-alive", "5"],
        &["lease", "keep-alive", "5", "--once"],
        &["kv", "put", "k", "v", "--lease", "5"],
    ] {
        let (code, message) = server.failure(command);
        assert_eq!(code, 1, "{command:?}: {message}");
    }
    server.text(&["lease", "grant", "10s", "--id", "5"]);
    assert_eq!(server.failure(&["lease", "grant", "10s", "--id", "5"]).0, 5, "the id is taken");
    assert_eq!(server.failure(&["lease", "grant", "1ms"]).0, 2, "shorter than a lease can live");
}

#[test]
fn a_key_with_a_time_to_live_goes_by_itself() {
    let server = Server::start();
    server.text(&["kv", "put", "k", "v", "--ttl", "200ms"]);
    assert_eq!(server.text(&["watch", "k", "--from", "1", "--count", "2"]), "1 [PUT] k = v\n2 [DELETE] k\n");
    assert_eq!(server.failure(&["kv", "get", "k"]).0, 1);
    // Written again, it is an ordinary key.
    server.text(&["kv", "put", "k", "v", "--ttl", "1h"]);
    server.text(&["kv", "put", "k", "v"]);
    assert_eq!(server.json(&["kv", "get", "k"])["kv"]["lease"], serde_json::Value::Null);
}

#[test]
fn a_lease_lives_while_it_is_kept_alive() {
    let server = Server::start();
    server.text(&["lease", "grant", "900ms", "--id", "3"]);
    server.text(&["kv", "put", "k", "v", "--lease", "3"]);
    assert_eq!(server.text(&["lease", "keep-alive", "3", "--once"]), "lease 3 lives for 900ms\n");
    let keeping = server.spawn(&["lease", "keep-alive", "3"]);
    // Three renewals take a time to live.
    for _ in 0..9 {
        assert_eq!(keeping.line(), "lease 3 lives for 900ms");
    }
    assert_eq!(server.text(&["kv", "get", "k", "--raw"]), "v");
    drop(keeping);
    assert_eq!(server.text(&["watch", "k", "--from", "2", "--count", "1"]), "2 [DELETE] k\n");
    assert_eq!(server.failure(&["lease", "ttl", "3"]).0, 1);
}
