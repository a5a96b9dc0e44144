//! Locks and elections at the shell, and the commands that run under them.

#![allow(clippy::unwrap_used, clippy::panic)]

mod shell;

use shell::{Server, run};

/// A command that says when it has begun, and when it was told to end.
const POLITE: &str = "trap 'echo told; exit 0' TERM; echo begun; while :; do sleep 0.05; done";
/// One that does not want to end.
const STUBBORN: &str = "trap '' TERM; echo begun; while :; do sleep 0.05; done";
/// One that starts another one, which does not want to end, and says its number.
const PARENT: &str = "sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.05; done' & wait";

/// Ends the lock's lease behind the back of who holds it.
fn take_away(server: &Server) {
    let leases = server.json(&["lease", "list"]);
    let lease = leases[0]["lease"].as_u64().unwrap().to_string();
    server.text(&["lease", "revoke", &lease]);
}

/// Whether the process runs: neither gone nor waiting to be buried.
fn runs(process: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[test]
fn a_command_learns_its_token_and_gives_its_exit_code() {
    let server = Server::start();
    let show = "echo $D_ENGINE_LOCK_NAME $D_ENGINE_FENCING_TOKEN; exit 9";
    let first = server.run(&["lock", "jobs/nightly", "--", "sh", "-c", show]);
    assert_eq!(first.status.code(), Some(9), "{first:?}");
    let second = server.run(&["lock", "jobs/nightly", "--", "sh", "-c", show]);
    let token = |output: std::process::Output| -> (u64, u64) {
        let text = String::from_utf8(output.stdout).unwrap();
        let token = text.trim_end().strip_prefix("jobs/nightly ").unwrap();
        let (epoch, revision) = token.split_once('.').unwrap();
        (epoch.parse().unwrap(), revision.parse().unwrap())
    };
    assert!(token(first) < token(second), "a later holder has a greater token");
    assert_eq!(server.run(&["lock", "l", "--", "sh", "-c", "kill -9 $$"]).status.code(), Some(137));
    assert_eq!(server.run(&["lock", "l", "--", "/nowhere/program"]).status.code(), Some(127));
    assert_eq!(server.run(&["lock", "l", "--", "/etc/passwd"]).status.code(), Some(126));
    assert_eq!(server.text(&["kv", "range"]), "KEY  VALUE  REVISION  CREATED  VERSION\n", "all of them were released");
}

#[test]
fn a_command_reads_and_writes_as_without_a_lock() {
    let server = Server::start();
    let output = run(&server.address, &["lock", "l", "--", "tr", "a-z", "A-Z"], b"through");
    assert_eq!(output.stdout, b"THROUGH");
}

#[test]
fn a_lock_has_one_holder_until_that_is_told_to_end() {
    let server = Server::start();
    let mut holder = server.spawn(&["lock", "l", "--ttl", "1h"]);
    let token = holder.line();
    let (code, message) = server.failure(&["lock", "l", "--try", "--", "true"]);
    assert_eq!(code, 3, "{message}");

    // One that waits and is told to end leaves the queue: with its place there, the next one would wait for an hour.
    let mut waiting = server.spawn(&["lock", "l", "--ttl", "1h"]);
    let places = ["kv", "range", "--prefix", "l/", "--count-only"];
    server.prints(&places, "2\n");
    waiting.signal("TERM");
    assert_eq!(waiting.code(), 128 + 15);
    let mut next = server.spawn(&["lock", "l"]);

    holder.signal("INT");
    assert_eq!(holder.code(), 0);
    assert_ne!(next.line(), token);
    next.signal("TERM");
    assert_eq!(next.code(), 0);
    server.prints(&places, "0\n");
}

#[test]
fn a_command_ends_when_its_lock_is_lost() {
    let server = Server::start();
    let mut holder = server.spawn(&["lock", "l", "--ttl", "1h", "--", "sh", "-c", POLITE]);
    assert_eq!(holder.line(), "begun");
    take_away(&server);
    assert_eq!(holder.line(), "told");
    assert_eq!(holder.code(), 7);

    let mut holder = server.spawn(&["lock", "l", "--ttl", "1h", "--grace", "100ms", "--", "sh", "-c", STUBBORN]);
    assert_eq!(holder.line(), "begun");
    take_away(&server);
    assert_eq!(holder.code(), 7);

    let mut holder = server.spawn(&["lock", "l", "--ttl", "1h"]);
    holder.line();
    take_away(&server);
    assert_eq!(holder.code(), 7, "without a command, too");
}

#[test]
fn what_a_command_started_ends_with_it() {
    let server = Server::start();
    let mut holder = server.spawn(&["lock", "l", "--ttl", "1h", "--grace", "100ms", "--", "sh", "-c", PARENT]);
    let child = holder.line();
    assert!(runs(&child));
    take_away(&server);
    assert_eq!(holder.code(), 7);
    let begun = std::time::Instant::now();
    while runs(&child) {
        assert!(begun.elapsed() < shell::PATIENCE, "{child} goes on without the lock");
    }
}

#[test]
fn a_holder_that_is_told_to_end_ends_its_command_first() {
    let server = Server::start();
    let mut holder = server.spawn(&["lock", "l", "--ttl", "1h", "--", "sh", "-c", POLITE]);
    assert_eq!(holder.line(), "begun");
    holder.signal("INT");
    assert_eq!(holder.line(), "told");
    assert_eq!(holder.code(), 0, "the command's");

    let mut holder = server.spawn(&["lock", "l", "--ttl", "1h", "--grace", "1h", "--", "sh", "-c", STUBBORN]);
    assert_eq!(holder.line(), "begun");
    holder.signal("TERM");
    // Told again, it does not wait for the grace to be over.
    let begun = std::time::Instant::now();
    while server.failure(&["lock", "l", "--try", "--", "true"]).0 != 0 {
        holder.signal("TERM");
        assert!(begun.elapsed() < shell::PATIENCE, "the command goes on");
    }
    assert_eq!(holder.code(), 128 + 9);
}

#[test]
fn a_signal_that_is_ignored_stays_ignored() {
    let server = Server::start();
    let mut holder = server.spawn_with("--ignore-signal=HUP", &["lock", "l", "--", "sh", "-c", POLITE]);
    assert_eq!(holder.line(), "begun");
    let status = std::fs::read_to_string(format!("/proc/{}/status", holder.id())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    assert_eq!(u64::from_str_radix(ignored.trim(), 16).unwrap() & 1, 1, "{status}");
    holder.signal("TERM");
    assert_eq!(holder.line(), "told");
    assert_eq!(holder.code(), 0);
}

#[test]
fn a_holder_that_was_stopped_too_long_knows_it() {
    let server = Server::start();
    let mut holder = server.spawn(&["lock", "l", "--ttl", "500ms", "--", "sh", "-c", POLITE]);
    assert_eq!(holder.line(), "begun");
    holder.signal("STOP");
    // Waits until the lock of the one that stands still has ended.
    assert!(server.run(&["lock", "l", "--", "true"]).status.success());
    holder.signal("CONT");
    assert_eq!(holder.line(), "told");
    assert_eq!(holder.code(), 7);
}

#[test]
fn candidates_lead_one_after_the_other_and_observers_hear_it() {
    let server = Server::start();
    let mut observer = server.spawn(&["elect", "e", "--observe", "--count", "3"]);
    assert_eq!(observer.line(), "nobody leads");
    let mut first = server.spawn(&["elect", "e", "first"]);
    let token = first.line();
    assert_eq!(observer.line(), format!("first leads, token {token}"));
    let show = "echo $D_ENGINE_ELECTION_NAME $D_ENGINE_FENCING_TOKEN; exit 4";
    let mut second = server.spawn(&["elect", "e", "second", "--", "sh", "-c", show]);
    server.prints(&["kv", "range", "--prefix", "e/", "--count-only"], "2\n");
    first.signal("TERM");
    assert_eq!(first.code(), 0);
    let line = second.line();
    let token = line.strip_prefix("e ").unwrap();
    assert_eq!(observer.line(), format!("second leads, token {token}"));
    assert_eq!(observer.code(), 0);
    assert_eq!(second.code(), 4);
    let nobody = server.text(&["-o", "json", "elect", "e", "--observe", "--count", "1"]);
    assert_eq!(nobody, "{\"leader\":null,\"leader_base64\":null,\"token\":null}\n");
}
