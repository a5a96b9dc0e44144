//! The house rules, applied to this repository, and to planted trees that break them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::path::{Path, PathBuf};
use std::process::Command;

use d_engine_tests::tidy::{LINES_MAX, SourceFile, check, read_tree};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

#[test]
fn the_tree_is_tidy() {
    let files = read_tree(&root());
    assert!(files.len() > 20, "the tree is not where it should be: {} files", files.len());
    let violations: Vec<String> = check(&files).iter().map(ToString::to_string).collect();
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

/// What `cargo` says each crate depends on, transitively, by name.
fn dependencies(package: &str) -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--prefix", "none", "--format", "{p}", "-e", "normal", "-p", package])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("cargo prints UTF-8");
    text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn dependencies_run_one_way() {
    let forbidden = [
        ("d-engine-proto", &["d-engine-client", "d-engine-server", "openraft", "rocksdb"][..]),
        ("d-engine-client", &["d-engine-server", "openraft", "rocksdb", "librocksdb-sys"][..]),
        ("d-engine-server", &["d-engine-client", "d-engine-cli", "clap"][..]),
    ];
    for (package, absent) in forbidden {
        let present = dependencies(package);
        assert!(present.contains(&package.to_owned()), "{package} is not in its own tree");
        for name in absent {
            assert!(!present.iter().any(|found| found == name), "{package} depends on {name}");
        }
    }
    assert!(dependencies("d-engine-server").contains(&"openraft".to_owned()), "the check sees no dependency at all");
}

#[track_caller]
fn planted(path: &str, text: &str) -> Vec<String> {
    let file = SourceFile { path: path.to_owned(), text: text.to_owned() };
    check(&[file]).into_iter().map(|violation| violation.rule).collect()
}

#[track_caller]
fn is_refused(path: &str, text: &str, because: &str) {
    let rules = planted(path, text);
    assert!(rules.iter().any(|rule| rule.contains(because)), "{path} passed with {text:?}: {rules:?}");
}

#[track_caller]
fn is_accepted(path: &str, text: &str) {
    assert_eq!(planted(path, text), Vec::<String>::new(), "{path} with {text:?}");
}

#[test]
fn a_forbidden_edge_is_seen() {
    is_refused("server/src/lib.rs", "use openraft::Raft;", "belongs to server/src/consensus only");
    is_refused("cli/src/main.rs", "let db = rocksdb::DB::open();", "belongs to server/src/storage only");
    is_refused("server/src/lib.rs", "fn f() -> tonic::Status {}", "belongs to server/src/services");
    is_refused("client-rust/src/lib.rs", "#[pyclass]", "belongs to bindings/ only");
}

#[test]
fn prose_and_the_rightful_owner_may_name_it() {
    is_accepted("server/src/lib.rs", "//! only `consensus` names openraft::Raft");
    is_accepted("server/src/main.rs", "let my_rocksdb::x = 1;");
    is_accepted("server/src/lib.rs", "let filter = \"info,openraft=warn\";");
    let files = [("server/src/lib.rs", "mod consensus;"), ("server/src/consensus/mod.rs", "use openraft::Raft;")];
    let files = files.map(|(path, text)| SourceFile { path: path.to_owned(), text: text.to_owned() });
    assert_eq!(check(&files), []);
}

#[test]
fn a_left_over_marker_is_seen() {
    is_refused("server/src/lib.rs", concat!("to", "do!()"), "left-over");
    is_refused("server/src/lib.rs", concat!("// FIX", "ME later"), "left-over");
    is_refused("docs/a.md", concat!("FIX", "ME"), "left-over");
}

#[test]
fn a_long_file_needs_a_reason() {
    let lines = "//\n".repeat(LINES_MAX);
    is_accepted("server/src/lib.rs", &lines);
    is_refused("server/src/lib.rs", &format!("{lines}//\n"), "more than 800");
    is_accepted("server/src/lib.rs", &format!("// tidy: long because it is a table\n{lines}"));
}

#[test]
fn a_sleeping_test_is_seen() {
    let nap = concat!("tokio::time::sle", "ep(second).await;");
    is_refused("tests/tests/a.rs", nap, "a test that sleeps");
    is_refused("server/src/lib.rs", &format!("#[cfg(test)]\nmod tests {{\n{nap}\n}}"), "a test that sleeps");
    is_refused("go/a_test.go", concat!("time.Sle", "ep(1)"), "a test that sleeps");
    is_accepted("server/src/lib.rs", nap);
    is_accepted("tests/tests/a.rs", &format!("while !done() {{\n{nap}\n}}"));
}

#[test]
fn a_protocol_file_without_a_document_is_seen() {
    is_refused("proto/d_engine/v1/kv.proto", "", "no document in docs/ mentions kv.proto");
}

#[test]
fn a_file_nobody_compiles_is_seen() {
    is_refused("server/src/forgotten.rs", "", "no `mod` declares this file");
    is_refused("server/src/storage/forgotten.rs", "", "no `mod` declares this file");
    is_accepted("server/src/bin/tool.rs", "");
}

#[test]
fn a_crate_without_the_lints_is_seen() {
    is_refused("server/Cargo.toml", "[package]\nname = \"x\"\n", "must take the workspace's lints");
    is_accepted("Cargo.toml", "[workspace]\n");
}
