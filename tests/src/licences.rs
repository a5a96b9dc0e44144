//! Licences of the dependencies, checked against the `[licenses]` part of `deny.toml`.
//!
//! The file is written for cargo-deny, which takes many minutes to compile; this reads the same lists.

use std::collections::BTreeSet;

use serde::Deserialize;
use spdx::{Expression, ParseMode};

/// What may be depended on.
#[derive(Debug, Deserialize)]
pub struct Policy {
    licenses: Licenses,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
    exceptions: Vec<Exception>,
}

/// A licence allowed for one crate only.
#[derive(Debug, Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: BTreeSet<String>,
}

/// The part of `cargo metadata` that matters here.
#[derive(Debug, Deserialize)]
pub struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// Absent for the crates of this workspace.
    source: Option<String>,
}

/// Every dependency whose licence the policy does not allow, and every exception nobody needs.
#[must_use]
pub fn violations(policy: &Policy, metadata: &Metadata) -> Vec<String> {
    let mut violations = Vec::new();
    let mut unused: BTreeSet<&str> =
        policy.licenses.exceptions.iter().map(|exception| exception.name.as_str()).collect();
    for package in metadata.packages.iter().filter(|package| package.source.is_some()) {
        let identity = format!("{} {}", package.name, package.version);
        let Some(license) = &package.license else {
            violations.push(format!("{identity} states no licence"));
            continue;
        };
        let expression = match Expression::parse_mode(license, ParseMode::LAX) {
            Ok(expression) => expression,
            Err(error) => {
                violations.push(format!("{identity}: {license:?} is no licence expression: {}", error.reason));
                continue;
            }
        };
        let allowed = |extra: Option<&Exception>| {
            expression.evaluate(|requirement| {
                let name = requirement.to_string();
                policy.licenses.allow.contains(&name) || extra.is_some_and(|extra| extra.allow.contains(&name))
            })
        };
        if allowed(None) {
            continue;
        }
        let exception = policy.licenses.exceptions.iter().find(|exception| exception.name == package.name);
        if allowed(exception) {
            unused.remove(package.name.as_str());
        } else {
            violations.push(format!("{identity} is licensed {license}, which deny.toml does not allow"));
        }
    }
    violations.extend(unused.into_iter().map(|name| format!("deny.toml: nothing needs the exception for {name}")));
    violations
}
