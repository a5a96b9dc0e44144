//! The commands against a real server, as somebody at a shell runs them.

#![allow(clippy::unwrap_used, clippy::panic)]

mod shell;
#[path = "../../client-rust/tests/support/mod.rs"]
mod support;

use std::process::Command;

use serde_json::{Value, json};
use shell::{Server, code_and_message, ended, run};
use support::{Behaviour, cluster};

#[test]
fn what_is_written_can_be_read_changed_and_deleted() {
    let server = Server::start();
    assert_eq!(server.text(&["kv", "put", "k", "one"]), "written at revision 1\n");
    assert_eq!(server.json(&["kv", "put", "k", "two", "--prev"])["previous"]["value"], "one");
    assert_eq!(server.text(&["kv", "get", "k", "--raw"]), "two");
    assert_eq!(server.text(&["kv", "get", "k", "--raw", "--revision", "1"]), "one");
    let table = server.text(&["kv", "get", "k", "--consistency", "eventual", "--min-revision", "2"]);
    assert_eq!(table, "KEY  VALUE  REVISION  CREATED  VERSION\nk    two    2         1        2\n");
    assert_eq!(server.json(&["kv", "del", "k", "--prev"])["previous"][0]["value"], "two");
    assert_eq!(server.failure(&["kv", "get", "k"]), (1, "d-engine: key k does not exist\n".to_owned()));
    assert_eq!(server.json(&["kv", "del", "k"])["deleted"], 0);
}

#[test]
fn every_byte_survives_the_way_in_and_out() {
    let server = Server::start();
    let bytes: Vec<u8> = (0..=255).collect();
    let written = run(&server.address, &["kv", "put", "\\x00\\xffkey", "-"], &bytes);
    assert!(written.status.success(), "{written:?}");
    assert_eq!(server.run(&["kv", "get", "\\x00\\xffkey", "--raw"]).stdout, bytes);
    for encoding in ["text", "hex", "base64"] {
        // What is printed, given back, names the same key.
        let key = server.text(&["--encoding", encoding, "kv", "range", "--keys-only"]);
        let answer = server.json(&["--encoding", encoding, "kv", "get", key.trim_end()]);
        assert_eq!(answer["kv"]["key_base64"], "AP9rZXk=", "{encoding}: {key}");
        assert_eq!(answer["kv"]["key"], Value::Null, "it is not UTF-8");
    }
}

#[test]
fn ranges_have_bounds_order_limits_and_counts() {
    let server = Server::start();
    for key in ["a", "p/1", "p/2", "p/3", "q"] {
        server.text(&["kv", "put", key, key]);
    }
    let keys = |arguments: &[&str]| -> Vec<String> {
        let arguments = [&["kv", "range", "--keys-only"], arguments].concat();
        server.text(&arguments).lines().map(str::to_owned).collect()
    };
    assert_eq!(keys(&[]), ["a", "p/1", "p/2", "p/3", "q"]);
    assert_eq!(keys(&["--prefix", "p/", "--descending", "--limit", "2"]), ["p/3", "p/2"]);
    assert_eq!(keys(&["p/2", "--end", "q"]), ["p/2", "p/3"]);
    assert_eq!(server.text(&["kv", "range", "--prefix", "p/", "--count-only"]), "3\n");
    let whole = server.json(&["kv", "range"]);
    assert_eq!((&whole["count"], &whole["more"]), (&json!(5), &json!(false)));
    let part = server.json(&["kv", "range", "--limit", "1"]);
    assert_eq!((&part["count"], &part["more"]), (&Value::Null, &json!(true)), "what is left out is not counted");
    assert_eq!(server.json(&["kv", "del", "p/", "--prefix"])["deleted"], 3);
    assert_eq!(server.json(&["kv", "del", "a", "--range-end", "b"])["deleted"], 1);
    assert_eq!(keys(&[]), ["q"]);
}

#[test]
fn the_largest_request_is_served_and_a_larger_one_names_the_limit() {
    let server = Server::start();
    const LIMIT: usize = 3 << 19;
    let put = |value: &[u8]| run(&server.address, &["kv", "put", "k", "-"], value);
    // The key, the session and the headers of the fields take some bytes; each refusal tells by how many it was too large.
    let mut largest = vec![b'v'; LIMIT];
    for _ in 0..4 {
        let output = put(&largest);
        if output.status.success() {
            break;
        }
        let (code, message) = code_and_message(output);
        assert_eq!(code, 5, "{message}");
        let bytes = message.split("the request has ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        largest.truncate(largest.len() + LIMIT - bytes.parse::<usize>().unwrap());
    }
    assert!(largest.len() > LIMIT - 64, "{} bytes", largest.len());
    assert!(server.run(&["kv", "get", "k", "--raw"]).stdout == largest);
    let (code, message) = code_and_message(put(&[&largest[..], b"v"].concat()));
    assert_eq!(code, 5, "{message}");
    assert!(message.contains("1572865 bytes, the limit is 1572864 (request_bytes_max)"), "{message}");
    assert!(server.run(&["kv", "get", "k", "--raw"]).stdout == largest);
}

#[test]
fn conditions_that_do_not_hold_have_their_exit_code() {
    let server = Server::start();
    assert!(server.run(&["kv", "cas", "k", "1", "--missing"]).status.success());
    let (code, message) = server.failure(&["kv", "cas", "k", "2", "--expected", "other"]);
    assert_eq!(code, 3);
    assert!(message.contains("not applied"), "{message}");
    assert_eq!(server.json(&["kv", "cas", "k", "2", "--expected", "1"])["succeeded"], true);

    let txn = br#"{ "when": [{ "key": "k", "value": "2" }], "then": [{ "put": { "key": "k", "value": "3" } }],
        "otherwise": [{ "get": { "key": "k" } }] }"#;
    let held = run(&server.address, &["kv", "txn"], txn);
    assert!(held.status.success(), "{held:?}");
    let failed = run(&server.address, &["-o", "json", "kv", "txn"], txn);
    assert_eq!(failed.status.code(), Some(3));
    let answer: Value = serde_json::from_slice(&failed.stdout).unwrap();
    assert_eq!(answer["results"][0]["get"]["kv"]["value"], "3");
    assert_eq!(run(&server.address, &["kv", "txn"], b"{ \"if\": [] }").status.code(), Some(2));
}

#[test]
fn the_cluster_is_shown_with_its_leader() {
    let server = Server::start();
    let table = server.text(&["status"]);
    assert!(table.lines().nth(1).unwrap().starts_with("*  1 "), "{table}");
    assert_eq!(server.json(&["status"])[0]["role"], "leader");
    assert_eq!(server.json(&["member", "list"])["leader"]["client_address"], *server.address);
    assert!(server.text(&["member", "list"]).contains("voter"));
}

#[test]
fn failures_say_what_became_of_the_call() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (code, message) = code_and_message(run(&nobody, &["kv", "put", "k", "v", "--timeout", "200ms"], b""));
    assert_eq!(code, 5);
    for part in [&nobody, "refused", "Outcome: not applied", "majority"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let (code, message) = code_and_message(run(&nobody, &["status"], b""));
    assert_eq!(code, 5);
    assert!(message.contains("no leader"), "{message}");
    assert_eq!(code_and_message(run(&nobody, &["kv", "put", "\\q", "v"], b"")).0, 2);
    assert_eq!(code_and_message(run("nowhere", &["kv", "get", "k"], b"")).0, 2);
    assert_eq!(code_and_message(run(&nobody, &["kv", "get"], b"")).0, 2);
}

#[test]
fn an_unknown_outcome_has_its_exit_code() {
    let nodes = cluster(1);
    nodes[0].behave(Behaviour::Silent);
    let (code, message) = code_and_message(run(&nodes[0].address, &["kv", "put", "k", "v", "--timeout", "1s"], b""));
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("Outcome: unknown") && message.contains("read the key"), "{message}");
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let server = Server::start();
    let (code, message) = server.failure(&["server", "--dev", "--listen-address", &server.address]);
    assert_eq!(code, 6);
    assert!(message.contains(&server.address), "{message}");
    let (code, message) = server.failure(&["server", "--config", "/nowhere/n1.toml"]);
    assert_eq!(code, 2);
    assert!(message.contains("/nowhere/n1.toml"), "{message}");
}

#[test]
#[cfg(unix)]
fn a_server_that_is_told_to_stop_stops_well() {
    let mut server = Server::start();
    let told = Command::new("kill").args(["-TERM", &server.process.id().to_string()]).status().unwrap();
    assert!(told.success());
    let status = ended(&mut server.process);
    assert!(status.success(), "{status}");
}

#[test]
fn completion_scripts_exist_for_the_usual_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run("127.0.0.1:1", &["completion", shell], b"");
        assert!(output.status.success());
        assert!(String::from_utf8(output.stdout).unwrap().contains("member"), "{shell}");
    }
}
