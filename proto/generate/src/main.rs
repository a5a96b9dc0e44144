//! Writes what `d-engine-proto` checks in, from `vocabulary.toml` and the `.proto` files, and the comparison's stubs of
//! etcd: `make generate`.
//!
//! A crate of its own, so that a stale or broken generated file never keeps it from building. Its test fails when
//! what is checked in is not what it would write.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a developer's tool: a panic is its error message"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vocabulary {
    error: Vec<ErrorRow>,
    limits: BTreeMap<String, NumberRow>,
    defaults: BTreeMap<String, NumberRow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ErrorRow {
    name: String,
    number: i32,
    grpc: String,
    retry: String,
    meaning: String,
    remedy: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NumberRow {
    value: u64,
    meaning: String,
}

const NOTICE: &str = "// Generated from proto/vocabulary.toml by `make generate`; change it there.\n";

fn main() {
    for (path, bytes) in generated_files() {
        std::fs::write(path, bytes).unwrap();
    }
}

/// Every generated file: where it stands and what it must hold.
fn generated_files() -> Vec<(PathBuf, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = std::fs::read_to_string(root.join("vocabulary.toml")).unwrap();
    let vocabulary: Vocabulary = toml::from_str(&text).unwrap();
    let codes = root.join("d_engine/v1/error_codes.proto");
    let codes_text = error_codes_proto(&vocabulary);
    if std::fs::read_to_string(&codes).ok().as_deref() != Some(&codes_text) && !cfg!(test) {
        // The other .proto files import it.
        std::fs::write(&codes, &codes_text).unwrap();
    }
    let mut files = vec![
        (codes, codes_text.into_bytes()),
        (root.join("src/vocabulary.rs"), vocabulary_rs(&vocabulary).into_bytes()),
    ];
    files.extend(compiled_protos(root));
    files.push(etcd_stubs(root));
    files
}

fn screaming(name: &str) -> String {
    let mut out = String::new();
    for (index, letter) in name.chars().enumerate() {
        if letter.is_ascii_uppercase() && index > 0 {
            out.push('_');
        }
        out.push(letter.to_ascii_uppercase());
    }
    out
}

fn error_codes_proto(vocabulary: &Vocabulary) -> String {
    let mut out = format!("{NOTICE}syntax = \"proto3\";\npackage d_engine.v1;\n\nenum ErrorCode {{\n");
    out.push_str("  ERROR_CODE_UNSPECIFIED = 0;\n");
    for row in &vocabulary.error {
        writeln!(out, "  // {}", row.meaning).unwrap();
        writeln!(out, "  ERROR_CODE_{} = {};", screaming(&row.name), row.number).unwrap();
    }
    out.push_str("}\n");
    out
}

fn vocabulary_rs(vocabulary: &Vocabulary) -> String {
    let mut out = NOTICE.to_owned();
    let arm = |out: &mut String, function: &str, doc: &str, result: &str, value: &dyn Fn(&ErrorRow) -> String| {
        let constant = if function == "retry" || function == "grpc" { "" } else { "const " };
        writeln!(out, "\n    /// {doc}\n    #[must_use]\n    pub {constant}fn {function}(self) -> {result} {{\n        match self {{").unwrap();
        for row in &vocabulary.error {
            writeln!(out, "            Self::{} => {},", row.name, value(row)).unwrap();
        }
        out.push_str("        }\n    }\n");
    };
    out.push_str("\nuse crate::RetryWhere;\n\n/// Why a request failed. A code exists only if a caller would act differently on it.\n");
    out.push_str("#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]\n#[non_exhaustive]\npub enum ErrorCode {\n");
    for row in &vocabulary.error {
        writeln!(out, "    /// {}\n    {},", row.meaning, row.name).unwrap();
    }
    out.push_str(
        "}\n\nimpl ErrorCode {\n    /// Every code, by ascending number.\n    pub const ALL: &'static [Self] = &[\n",
    );
    for row in &vocabulary.error {
        writeln!(out, "        Self::{},", row.name).unwrap();
    }
    out.push_str("    ];\n");
    arm(&mut out, "number", "The number on the wire; never reused.", "i32", &|row| row.number.to_string());
    arm(&mut out, "name", "The name, the same in every language.", "&'static str", &|row| format!("{:?}", row.name));
    arm(&mut out, "meaning", "What happened, in one sentence.", "&'static str", &|row| format!("{:?}", row.meaning));
    arm(&mut out, "remedy", "What the caller can do about it.", "&'static str", &|row| format!("{:?}", row.remedy));
    arm(&mut out, "grpc", "The gRPC status code that carries it.", "tonic::Code", &|row| {
        format!("tonic::Code::{}", row.grpc)
    });
    arm(&mut out, "retry", "Where the same request may be sent again, its outcome permitting.", "RetryWhere", &|row| {
        match row.retry.as_str() {
            "never" => "RetryWhere::Never".to_owned(),
            "here" => "RetryWhere::Here".to_owned(),
            "leader" => "RetryWhere::Leader".to_owned(),
            other => panic!("{}: unknown retry {other:?}", row.name),
        }
    });
    out.push_str("\n    /// The code of a number; `None` for one from a newer version.\n    #[must_use]\n    pub fn from_number(number: i32) -> Option<Self> {\n        Self::ALL.iter().copied().find(|code| code.number() == number)\n    }\n}\n");
    for (module, doc, rows) in [
        ("limits", "Bounds that are part of the protocol.", &vocabulary.limits),
        ("defaults", "Defaults of options that every language's client has.", &vocabulary.defaults),
    ] {
        writeln!(out, "\n/// {doc}\npub mod {module} {{").unwrap();
        for (name, row) in rows {
            writeln!(out, "    /// {}\n    pub const {}: u64 = {};", row.meaning, name.to_ascii_uppercase(), row.value)
                .unwrap();
        }
        out.push_str("}\n");
    }
    rustfmt(&out)
}

/// Formats as the workspace does, so that `cargo fmt --check` and this test agree.
fn rustfmt(source: &str) -> String {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../rustfmt.toml");
    let mut child = Command::new("rustfmt")
        .args(["--edition", "2024", "--config-path"])
        .arg(config)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("rustfmt is part of the toolchain");
    child.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

fn compiled_protos(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(root.join("d_engine/v1")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "proto"));
    files.sort();
    let descriptors = protox::compile(&files, [root]).unwrap();
    let code = stubs("d_engine.v1", |builder| {
        let servers = "#[cfg(feature = \"server\")]";
        builder.server_mod_attribute(".", servers).compile_fds(descriptors.clone()).unwrap();
    });
    let generated = root.join("src/generated");
    vec![
        (generated.join("d_engine.v1.rs"), code),
        (generated.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors)),
    ]
}

/// What the comparison speaks to etcd.
fn etcd_stubs(root: &Path) -> (PathBuf, Vec<u8>) {
    let bench = root.parent().unwrap().join("bench");
    let descriptors = protox::compile(["etcd.proto"], [bench.join("proto")]).unwrap();
    let code = stubs("etcdserverpb", |builder| builder.build_server(false).compile_fds(descriptors).unwrap());
    (bench.join("src/compare/generated/etcdserverpb.rs"), code)
}

/// The formatted code of a package, written by what `compile` makes of a builder.
fn stubs(package: &str, compile: impl FnOnce(tonic_prost_build::Builder)) -> Vec<u8> {
    let out = tempfile::tempdir().unwrap();
    compile(tonic_prost_build::configure().out_dir(out.path()).bytes("."));
    rustfmt(&std::fs::read_to_string(out.path().join(format!("{package}.rs"))).unwrap()).into_bytes()
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_checked_in_is_what_would_be_generated() {
        for (path, expected) in super::generated_files() {
            let current = std::fs::read(&path).unwrap_or_default();
            assert!(current == expected, "{} is stale: run `make generate`", path.display());
        }
    }
}
