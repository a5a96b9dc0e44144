//! House rules as a test: the architecture is described by what is absent, and this looks whether it is absent.
//!
//! [`check`] judges a tree of files as text; it knows nothing of the tree it is asked about, so that its own tests
//! can plant a bad one.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

/// Lines a source file may have before somebody must say why.
pub const LINES_MAX: usize = 800;

/// What excuses a longer file, followed by the reason; near its top.
const LONG_BECAUSE: &str = "tidy: long because ";

/// What excuses a line that lets time pass.
const MAY_PASS_TIME: &str = "tidy: the one exemption";

/// Markers that must not stay. Written in two halves, so that this file may be checked too.
const LEFT_OVERS: [&str; 5] = [
    concat!("to", "do!("),
    concat!("dbg", "!("),
    concat!("unimplemented", "!("),
    concat!("FIX", "ME"),
    concat!("XX", "X:"),
];

/// A name that belongs to some directories only.
struct Edge {
    names: &'static [&'static str],
    within: &'static str,
    allowed: &'static [&'static str],
}

const EDGES: [Edge; 4] = [
    Edge {
        names: &["openraft::", "openraft_rt", "openraft_macros", "use openraft"],
        within: "",
        allowed: &["server/src/consensus"],
    },
    Edge { names: &["rocksdb::", "use rocksdb"], within: "", allowed: &["server/src/storage"] },
    Edge {
        names: &["tonic::", "use tonic"],
        within: "server/src/",
        allowed: &[
            "server/src/services",
            "server/src/consensus/appends",
            "server/src/consensus/network",
            "server/src/consensus/peer_service",
            "server/src/consensus/tests",
        ],
    },
    Edge { names: &["pyo3::", "#[pyclass", "uniffi::", "extern \"C\""], within: "", allowed: &["bindings/"] },
];

/// A file of the tree: its path from the root, with `/`, and its text.
#[derive(Clone, Debug)]
pub struct SourceFile {
    /// Path from the root.
    pub path: String,
    /// Content.
    pub text: String,
}

/// A rule that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The file.
    pub path: String,
    /// Its line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// The rule and the remedy.
    pub rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.rule)
    }
}

/// Reads the text files below `root`, except for hidden directories and build output.
///
/// # Panics
/// When a directory cannot be read.
#[must_use]
pub fn read_tree(root: &Path) -> Vec<SourceFile> {
    let mut files = Vec::new();
    collect(root, root, &mut files);
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

fn collect(root: &Path, directory: &Path, files: &mut Vec<SourceFile>) {
    for entry in fs::read_dir(directory).expect("a readable directory") {
        let entry = entry.expect("a readable directory entry");
        let name = entry.file_name().to_string_lossy().into_owned();
        let kind = entry.file_type().expect("a directory entry has a type");
        if kind.is_dir() {
            if !name.starts_with('.') && name != "target" && name != "generated" {
                collect(root, &entry.path(), files);
            }
        } else if kind.is_file() && is_source(&name) {
            let path = entry.path();
            let relative = path.strip_prefix(root).expect("below the root").to_string_lossy().replace('\\', "/");
            if let Ok(text) = fs::read_to_string(&path) {
                files.push(SourceFile { path: relative, text });
            }
        }
    }
}

fn is_source(name: &str) -> bool {
    let known = ["rs", "go", "proto", "toml", "md"];
    name.rsplit_once('.').is_some_and(|(_, extension)| known.contains(&extension))
}

/// Every violation of a house rule in `files`.
#[must_use]
pub fn check(files: &[SourceFile]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in files {
        edges(file, &mut violations);
        left_overs(file, &mut violations);
        length(file, &mut violations);
        sleeping_tests(file, &mut violations);
        inherited_lints(file, &mut violations);
    }
    undocumented_protocol(files, &mut violations);
    orphans(files, &mut violations);
    violations
}

fn has_extension(file: &SourceFile, extension: &str) -> bool {
    file.path.rsplit_once('.').is_some_and(|(_, found)| found == extension)
}

/// The lines of a file that are not comments, with their numbers.
fn code(file: &SourceFile) -> impl Iterator<Item = (usize, &str)> {
    file.text.lines().enumerate().map(|(index, line)| (index + 1, line)).filter(|(_, line)| {
        let line = line.trim_start();
        !line.starts_with("//") && !line.starts_with('*')
    })
}

fn edges(file: &SourceFile, violations: &mut Vec<Violation>) {
    if !has_extension(file, "rs") || file.path == "tests/src/tidy.rs" || file.path == "tests/tests/tidy.rs" {
        return;
    }
    for edge in &EDGES {
        if !file.path.starts_with(edge.within) || edge.allowed.iter().any(|allowed| file.path.starts_with(allowed)) {
            continue;
        }
        for (line, text) in code(file) {
            if let Some(name) = edge.names.iter().find(|name| names(text, name)) {
                let rule = format!("`{name}` belongs to {} only", edge.allowed.join(" and "));
                violations.push(Violation { path: file.path.clone(), line, rule });
            }
        }
    }
}

/// Whether `text` contains `name` as the start of a word.
fn names(text: &str, name: &str) -> bool {
    text.match_indices(name).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        before.is_none_or(|before| !before.is_alphanumeric() && before != '_')
    })
}

fn left_overs(file: &SourceFile, violations: &mut Vec<Violation>) {
    for (index, text) in file.text.lines().enumerate() {
        if let Some(marker) = LEFT_OVERS.iter().find(|marker| text.contains(**marker)) {
            let rule = format!("a left-over `{marker}`: finish it or open an issue");
            violations.push(Violation { path: file.path.clone(), line: index + 1, rule });
        }
    }
}

fn length(file: &SourceFile, violations: &mut Vec<Violation>) {
    let lines = file.text.lines().count();
    let is_code = ["rs", "go", "proto"].iter().any(|extension| has_extension(file, extension));
    let excused = file.text.lines().take(20).any(|line| line.contains(LONG_BECAUSE));
    if is_code && lines > LINES_MAX && !excused {
        let rule = format!("{lines} lines, more than {LINES_MAX}: split it, or say near the top `{LONG_BECAUSE}...`");
        violations.push(Violation { path: file.path.clone(), line: 0, rule });
    }
}

fn sleeping_tests(file: &SourceFile, violations: &mut Vec<Violation>) {
    let (is_rust, is_go) = (has_extension(file, "rs"), file.path.ends_with("_test.go"));
    if !is_rust && !is_go {
        return;
    }
    let whole =
        is_go || file.path.starts_with("tests/") || file.path.contains("/tests/") || file.path.ends_with("/tests.rs");
    let from = if whole { 0 } else { test_part(&file.text) };
    let mut before = "";
    for (line, text) in code(file).filter(|(line, _)| *line > from) {
        // The pace at which a loop looks for its condition is no fixed time.
        let polls = before.trim_start().starts_with("while ");
        before = text;
        let excused = polls || (file.path == "tests/src/wait.rs" && text.contains(MAY_PASS_TIME));
        if text.to_lowercase().contains(concat!("sleep", "(")) && !excused {
            let rule = "a test that sleeps: wait for the condition (tests/src/wait.rs)".to_owned();
            violations.push(Violation { path: file.path.clone(), line, rule });
        }
    }
}

/// The line after which a source file is tests; past its end if it has none.
fn test_part(text: &str) -> usize {
    text.lines().position(|line| line.trim() == "#[cfg(test)]").unwrap_or(usize::MAX)
}

fn inherited_lints(file: &SourceFile, violations: &mut Vec<Violation>) {
    let is_crate = file.path.ends_with("Cargo.toml") && file.text.contains("[package]");
    if is_crate && !file.text.contains("[lints]\nworkspace = true") {
        let rule = "the crate must take the workspace's lints: `[lints]` `workspace = true`".to_owned();
        violations.push(Violation { path: file.path.clone(), line: 0, rule });
    }
}

fn undocumented_protocol(files: &[SourceFile], violations: &mut Vec<Violation>) {
    let documents: String =
        files.iter().filter(|file| file.path.starts_with("docs/")).map(|file| file.text.as_str()).collect();
    for file in files.iter().filter(|file| has_extension(file, "proto")) {
        let name = file.path.rsplit('/').next().unwrap_or(&file.path);
        if !documents.contains(name) {
            let rule = format!("no document in docs/ mentions {name}");
            violations.push(Violation { path: file.path.clone(), line: 0, rule });
        }
    }
}

/// Source files that no module declares: code nobody compiles and tests nobody runs.
fn orphans(files: &[SourceFile], violations: &mut Vec<Violation>) {
    let mut declared = BTreeSet::new();
    for file in files.iter().filter(|file| has_extension(file, "rs")) {
        let (directory, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
        let stem = name.trim_end_matches(".rs");
        let children = match stem {
            "lib" | "main" | "mod" => directory.to_owned(),
            _ => format!("{directory}/{stem}"),
        };
        let mut path_attribute = None;
        for (_, text) in code(file) {
            let text = text.trim();
            if let Some(path) = text.strip_prefix("#[path = \"").and_then(|rest| rest.strip_suffix("\"]")) {
                path_attribute = Some(format!("{directory}/{path}"));
            } else if let Some(module) = declared_module(text) {
                declared.insert(format!("{children}/{module}.rs"));
                declared.insert(format!("{children}/{module}/mod.rs"));
                declared.extend(path_attribute.take());
            }
        }
    }
    for file in files.iter().filter(|file| has_extension(file, "rs")) {
        let Some((_, inside)) = file.path.split_once("src/") else { continue };
        let is_root = ["lib.rs", "main.rs"].contains(&inside) || inside.starts_with("bin/");
        if !is_root && !declared.contains(&file.path) {
            let rule = "no `mod` declares this file: nobody compiles it".to_owned();
            violations.push(Violation { path: file.path.clone(), line: 0, rule });
        }
    }
}

/// The name in `mod name;`, with any visibility.
fn declared_module(text: &str) -> Option<&str> {
    let declaration = text.strip_suffix(';')?;
    let (before, name) = declaration.rsplit_once("mod ")?;
    let visibility = before.is_empty() || before.starts_with("pub");
    (visibility && name.chars().all(|c| c.is_alphanumeric() || c == '_')).then_some(name)
}
