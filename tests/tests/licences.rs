//! Every dependency's licence is one that `deny.toml` allows, or an exception of which it gives the reason.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use std::path::{Path, PathBuf};
use std::process::Command;

use d_engine_tests::licences::{Metadata, Policy, violations};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

fn policy() -> Policy {
    let text = std::fs::read_to_string(root().join("deny.toml")).expect("deny.toml");
    toml::from_str(&text).expect("deny.toml has the lists")
}

#[test]
fn every_licence_is_allowed() {
    // Not offline: a build fetches only what its own platform needs, and the licences of all platforms count.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Metadata = serde_json::from_slice(&output.stdout).expect("cargo prints its metadata");
    let found = violations(&policy(), &metadata);
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn a_forbidden_or_missing_licence_is_seen() {
    let metadata = |package: &str| -> Metadata {
        serde_json::from_str(&format!("{{\"packages\":[{{\"version\":\"1.0.0\",{package}}}]}}")).unwrap()
    };
    let policy: Policy =
        toml::from_str("[licenses]\nallow = [\"MIT\"]\nexceptions = [{ crate = \"copied\", allow = [\"MPL-2.0\"] }]")
            .unwrap();
    let judged = |package: &str| violations(&policy, &metadata(package)).join("; ");

    let outside = "\"source\":\"registry\"";
    let unused = "deny.toml: nothing needs the exception for copied";
    assert_eq!(judged(&format!("\"name\":\"a\",\"license\":\"MIT OR GPL-3.0\",{outside}")), unused);
    assert_eq!(judged("\"name\":\"own\",\"license\":null,\"source\":null"), unused);
    assert_eq!(judged(&format!("\"name\":\"copied\",\"license\":\"MPL-2.0\",{outside}")), "");
    for (package, problem) in [
        ("\"name\":\"a\",\"license\":\"GPL-3.0-only\"", "does not allow"),
        ("\"name\":\"a\",\"license\":\"MIT AND GPL-3.0-only\"", "does not allow"),
        ("\"name\":\"a\",\"license\":\"MPL-2.0\"", "does not allow"),
        ("\"name\":\"a\",\"license\":null", "states no licence"),
        ("\"name\":\"a\",\"license\":\"Whatever\"", "is no licence expression"),
    ] {
        let found = judged(&format!("{package},{outside}"));
        assert!(found.contains(problem), "{package}: {found}");
    }
}
