//! What `deploy/` names is there: every metric of the rules and the dashboard, every flag of the server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use d_engine_tests::process::d_engine;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The words of a text that begin so, as far as the letters of a metric or flag go.
fn words<'a>(text: &'a str, begin: &str, letter: fn(char) -> bool) -> BTreeSet<&'a str> {
    text.match_indices(begin)
        .map(|(at, _)| {
            let word = &text[at..];
            &word[..begin.len() + word[begin.len()..].find(|c| !letter(c)).unwrap_or(word.len() - begin.len())]
        })
        .collect()
}

#[test]
fn every_metric_of_rules_and_dashboard_exists() {
    let documented = read("docs/metrics.md");
    let letter = |c: char| c.is_ascii_lowercase() || c == '_';
    let known = words(&documented, "d_engine_", letter);
    for file in ["deploy/monitoring/alerts.yaml", "deploy/monitoring/dashboard.json"] {
        let text = read(file);
        let used = words(&text, "d_engine_", letter);
        assert!(used.len() > 5, "{file}: only {used:?}");
        for metric in used {
            assert!(known.contains(metric.trim_end_matches("_bucket")), "{file}: there is no metric {metric}");
        }
    }
    let dashboard: serde_json::Value = serde_json::from_str(&read("deploy/monitoring/dashboard.json")).unwrap();
    assert!(dashboard["panels"].as_array().is_some_and(|panels| panels.len() > 10));
}

#[test]
fn every_flag_of_the_server_exists() {
    let help = Command::new(d_engine()).args(["server", "--help"]).output().expect("d-engine runs");
    let help = String::from_utf8(help.stdout).unwrap();
    let letter = |c: char| c.is_ascii_lowercase() || c == '-';
    for file in
        ["deploy/container/Containerfile", "deploy/systemd/d-engine.service", "deploy/kubernetes/statefulset.yaml"]
    {
        let text = read(file);
        let begin = text.find("d-engine server").or_else(|| text.find("CMD [\"server\""));
        let line = begin.map_or("", |at| &text[at..]);
        let command = line.split("\n\n").next().and_then(|text| text.split("env:").next()).unwrap_or_default();
        let flags: Vec<&str> = words(command, "--", letter).into_iter().collect();
        assert!(!flags.is_empty(), "{file} starts no server");
        for flag in flags {
            assert!(help.contains(flag), "{file}: the server has no flag {flag}");
        }
    }
}
