//! The documents say what the code does: tables are compared with their source, examples are parsed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use d_engine_server::config::RaftNodeConfig;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn documents() -> Vec<(String, String)> {
    let mut found = vec!["README.md".to_owned()];
    for entry in std::fs::read_dir(root().join("docs")).expect("docs/") {
        let name = entry.expect("an entry").file_name().into_string().expect("a UTF-8 name");
        if Path::new(&name).extension().is_some_and(|extension| extension == "md") {
            found.push(format!("docs/{name}"));
        }
    }
    found.into_iter().map(|path| (path.clone(), read(&path))).collect()
}

/// The fenced blocks of one language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    text.split(fence.as_str()).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}

fn accepts(path: &Path) -> Result<(), String> {
    RaftNodeConfig::default()
        .with_override_config(path)
        .and_then(RaftNodeConfig::validate)
        .map(drop)
        .map_err(|error| error.to_string())
}

#[test]
fn every_configuration_shown_is_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let mut checked = 0;
    for (document, text) in documents() {
        for block in blocks(&text, "toml").into_iter().filter(|block| !block.contains("[dependencies]")) {
            let path = directory.path().join("shown.toml");
            std::fs::write(&path, block).unwrap();
            accepts(&path).unwrap_or_else(|error| panic!("{document}: {error}"));
            checked += 1;
        }
    }
    for example in ["three-nodes-standalone", "three-nodes-cluster", "three-nodes-embedded", "single-node-expansion"] {
        for node in 1..=3 {
            let path = root().join(format!("examples/{example}/config/n{node}.toml"));
            accepts(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            checked += 1;
        }
    }
    for node in 1..=3 {
        let path = root().join(format!("examples/tls/n{node}.toml"));
        accepts(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        checked += 1;
    }
    assert!(checked >= 11, "only {checked} configurations were found");
}

/// The keys of the table in docs/configuration.md, with their defaults where these are written as code.
fn documented_keys() -> Vec<(String, Option<String>)> {
    let text = read("docs/configuration.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    let code = |cell: &str| cell.trim().strip_prefix('`')?.strip_suffix('`').map(str::to_owned);
    let rows: Vec<_> = rows
        .filter_map(|row| {
            let (key, rest) = row.split_once('`')?;
            key.contains('.').then(|| (key.to_owned(), rest.split('|').nth(1).and_then(code)))
        })
        .collect();
    assert!(rows.len() > 15, "the table of keys was not found");
    rows
}

#[test]
fn every_documented_key_takes_its_documented_default() {
    for (key, default) in documented_keys() {
        let Some(default) = default else { continue };
        let set = RaftNodeConfig::default().with_setting("the documents", &key, &default);
        let changed = set.unwrap_or_else(|error| panic!("{key} = {default}: {error}"));
        let was = RaftNodeConfig::default();
        assert_eq!(
            format!(
                "{:?} {:?} {:?} {:?} {:?}",
                changed.cluster, changed.raft, changed.network, changed.tls, changed.monitoring
            ),
            format!("{:?} {:?} {:?} {:?} {:?}", was.cluster, was.raft, was.network, was.tls, was.monitoring),
            "{default} is not the default of {key}"
        );
    }
}

#[test]
fn every_key_is_documented() {
    let documented: BTreeSet<String> = documented_keys().into_iter().map(|(key, _)| key).collect();
    let mut sections: BTreeSet<&str> = BTreeSet::new();
    for key in &documented {
        sections.extend(key.match_indices('.').map(|(at, _)| &key[..at]));
    }
    for section in sections {
        let wrong = format!("{section}.no_such_key");
        let error =
            RaftNodeConfig::default().with_setting("test", &wrong, "1").expect_err("an unknown key").to_string();
        let (_, expected) =
            error.split_once("expected").unwrap_or_else(|| panic!("{section}: no keys named in {error}"));
        let expected = expected.split(['\n', ';']).next().unwrap_or_default();
        let known: Vec<&str> =
            expected.split('`').skip(1).step_by(2).filter(|name| !name.contains([' ', '.'])).collect();
        assert!(!known.is_empty() && !known.contains(&"no_such_key"), "{section}: {error}");
        for key in known {
            let key = format!("{section}.{key}");
            let is_there = documented.iter().any(|found| *found == key || found.starts_with(&format!("{key}.")));
            assert!(is_there, "docs/configuration.md does not mention {key}");
        }
    }
}

#[test]
fn the_tables_of_errors_and_limits_are_those_of_the_vocabulary() {
    let vocabulary: toml::Table = read("proto/vocabulary.toml").parse().expect("the vocabulary");
    let text = read("docs/errors.md");
    let field = |table: &toml::Value, name: &str| match &table[name] {
        toml::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let errors = vocabulary["error"].as_array().expect("errors");
    for error in errors {
        let [name, number, grpc, meaning, remedy] =
            ["name", "number", "grpc", "meaning", "remedy"].map(|name| field(error, name));
        let row = format!("| `{name}` | {number} | `{grpc}` | {meaning} | {remedy} |");
        assert!(text.contains(&row), "docs/errors.md lacks this row:\n{row}");
    }
    for (name, limit) in vocabulary["limits"].as_table().expect("limits") {
        let row = format!("| `{name}` | {} | {} |", field(limit, "value"), field(limit, "meaning"));
        assert!(text.contains(&row), "docs/errors.md lacks this row:\n{row}");
    }
}

#[test]
fn every_link_to_a_file_leads_somewhere() {
    for (document, text) in documents() {
        let directory = root().join(&document).parent().expect("a file lies somewhere").to_owned();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            assert!(directory.join(target).exists(), "{document} links to {target}, which is not there");
        }
    }
}
