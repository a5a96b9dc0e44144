//! Watches, history and compaction at the shell.

#![allow(clippy::unwrap_used, clippy::panic)]

mod shell;

use serde_json::Value;
use shell::Server;

/// A store with a past: `a` and `b` written twice, then `a` deleted.
fn store_with_a_past() -> Server {
    let server = Server::start();
    for (key, value) in [("a", "one"), ("b", "x"), ("a", "two"), ("b", "y")] {
        server.text(&["kv", "put", key, value]);
    }
    server.text(&["kv", "del", "a"]);
    server
}

#[test]
fn a_watch_shows_the_past_it_is_asked_for() {
    let server = store_with_a_past();
    assert_eq!(
        server.text(&["watch", "a", "--from", "1", "--count", "3"]),
        "1 [PUT] a = one\n3 [PUT] a = two\n5 [DELETE] a\n"
    );
    assert_eq!(
        server.text(&["watch", "--all", "--from", "3", "--count", "3", "--prev"]),
        "3 [PUT] a = two (before: one)\n4 [PUT] b = y (before: x)\n5 [DELETE] a (before: two)\n"
    );
    assert_eq!(server.text(&["watch", "--prefix", "b", "--from", "1", "--count", "1"]), "2 [PUT] b = x\n");
    assert_eq!(server.text(&["watch", "--range", "b", "c", "--from", "3", "--count", "1"]), "4 [PUT] b = y\n");
    assert_eq!(
        server.text(&["watch", "a", "--from", "1", "--count", "2", "--puts", "--keys-only"]),
        "1 [PUT] a\n3 [PUT] a\n"
    );
    assert_eq!(server.text(&["watch", "--all", "--from", "1", "--count", "1", "--deletes"]), "5 [DELETE] a\n");
}

#[test]
fn a_watch_is_one_json_object_a_line_for_programs() {
    let server = store_with_a_past();
    let text = server.text(&["-o", "json", "watch", "a", "--from", "3", "--count", "2", "--prev"]);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[0]["kind"], &lines[0]["value"]), (&"put".into(), &"two".into()));
    assert_eq!((&lines[0]["revision"], &lines[0]["version"]), (&3.into(), &2.into()));
    assert_eq!((&lines[1]["kind"], &lines[1]["key_base64"]), (&"delete".into(), &"YQ==".into()));
    assert_eq!(lines[1]["previous"]["value"], "two");
    assert_eq!(lines.len(), 2);
}

#[test]
fn a_watch_goes_on_after_the_keys_it_found() {
    let server = store_with_a_past();
    let mut watch = server.spawn(&["watch", "--all", "--snapshot", "--bookmarks", "--count", "2"]);
    assert_eq!(watch.line(), "4 [KEY] b = y");
    assert_eq!(watch.line(), "5 [BOOKMARK]");
    server.text(&["kv", "put", "c", "new"]);
    assert_eq!(watch.line(), "6 [PUT] c = new");
    server.text(&["kv", "del", "b"]);
    assert_eq!(watch.code(), 0);
    assert_eq!(watch.rest().last().unwrap(), "7 [DELETE] b");
}

#[test]
fn history_shows_every_version_that_is_kept() {
    let server = store_with_a_past();
    let table = "REVISION  CHANGE  VERSION  VALUE\n2         PUT     1        x\n4         PUT     2        y\n";
    assert_eq!(server.text(&["kv", "get", "b", "--history"]), table);
    let history = server.json(&["kv", "get", "b", "--history"]);
    assert_eq!(history["history"][1]["value"], "y");
    assert_eq!(server.failure(&["kv", "get", "a", "--history"]).0, 1);

    server.text(&["kv", "put", "a", "three"]);
    assert_eq!(
        server.text(&["kv", "get", "a", "--history"]),
        "REVISION  CHANGE  VERSION  VALUE\n\
         1         PUT     1        one\n\
         3         PUT     2        two\n\
         5         DELETE\n\
         6         PUT     1        three\n"
    );
    server.text(&["compact", "4"]);
    assert_eq!(
        server.text(&["kv", "get", "a", "--history"]),
        "REVISION  CHANGE  VERSION  VALUE\n\
         3         PUT     2        two\n\
         5         DELETE\n\
         6         PUT     1        three\n",
        "what revision 4 shows is still there"
    );
}

#[test]
fn what_was_compacted_is_refused_with_the_oldest_revision_left() {
    let server = store_with_a_past();
    assert_eq!(server.text(&["compact", "3"]), "the history begins at revision 3\n");
    for command in [&["kv", "get", "a", "--revision", "2"][..], &["watch", "a", "--from", "2", "--count", "1"]] {
        let (code, message) = server.failure(command);
        assert_eq!(code, 5, "{message}");
        assert!(message.contains('3'), "{message}");
    }
    assert_eq!(server.text(&["kv", "get", "a", "--revision", "3", "--raw"]), "two");
    assert_eq!(server.text(&["watch", "a", "--from", "3", "--count", "1"]), "3 [PUT] a = two\n");
    assert_eq!(server.json(&["compact", "--older-than", "1d"])["compacted_revision"], 3);
    assert_eq!(server.failure(&["compact", "99"]).0, 5, "there is no such revision yet");
}
