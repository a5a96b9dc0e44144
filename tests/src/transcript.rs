//! Sessions shown in documents, run for real.
//!
//! A block fenced as `console` holds commands, each after `$ `, and what they print. `...` stands for any text within a
//! line; on a line of its own, for any number of lines. The blocks of a document are one session in one shell.

use std::path::Path;
use std::process::Stdio;

use crate::network;
use crate::process::{bound_to_this_thread, d_engine};

/// A command of a session and what it is said to print.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The command, possibly of several lines.
    pub command: String,
    /// The lines it prints.
    pub expected: Vec<String>,
}

/// The session of a document.
#[must_use]
pub fn session(document: &str) -> Vec<Exchange> {
    let mut exchanges: Vec<Exchange> = Vec::new();
    for block in document.split("```console\n").skip(1).filter_map(|rest| rest.split("```").next()) {
        let mut continued = false;
        for line in block.lines() {
            if let Some(command) = line.strip_prefix("$ ") {
                exchanges.push(Exchange { command: command.to_owned(), expected: Vec::new() });
            } else if let Some(last) = exchanges.last_mut() {
                if continued {
                    last.command.push('\n');
                    last.command.push_str(line);
                } else {
                    last.expected.push(line.trim_end().to_owned());
                }
            }
            continued = line.ends_with('\\') && exchanges.last().is_some_and(|last| last.expected.is_empty());
        }
    }
    exchanges
}

/// Runs a session in `directory`, with `d-engine` on the path, and returns what differs from what it shows.
///
/// The shell gets namespaces of its own where the system grants them, so that ports are free and nothing outlives it.
///
/// # Panics
/// When the shell cannot be started.
#[must_use]
pub fn run(session: &[Exchange], directory: &Path) -> Vec<String> {
    const MARK: &str = "--8<-- ";
    let mut script = String::from("exec 2>&1\n");
    for exchange in session {
        script.push_str(&format!("echo; echo '{MARK}'\n{}\n", exchange.command));
    }
    script.push_str(&format!("echo; echo '{MARK}'\n"));
    let script_file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(script_file.path(), script).expect("the script can be written");

    let mut shell = match network::namespaces() {
        Ok(flags) => {
            let mut shell = bound_to_this_thread(Path::new("unshare"));
            shell.args(flags).args(["--pid", "--fork", "--kill-child", "--"]);
            shell.args(["sh", "-c", "ip link set lo up && exec bash \"$0\""]);
            shell
        }
        Err(_) => bound_to_this_thread(Path::new("bash")),
    };
    let binaries = d_engine().parent().expect("a file lies somewhere").to_owned();
    let path = std::env::var("PATH").unwrap_or_default();
    let output = shell
        .arg(script_file.path())
        .current_dir(directory)
        .env("PATH", format!("{}:{path}", binaries.display()))
        .env("D_ENGINE", d_engine())
        .env("COLUMNS", "120")
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL")
        .stdin(Stdio::null())
        .output()
        .expect("a shell starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let parts: Vec<&str> = text.split(&format!("{MARK}\n")).skip(1).collect();
    let mut differences = Vec::new();
    for (index, exchange) in session.iter().enumerate() {
        let part = parts.get(index).copied().unwrap_or("(the session ended before this command)");
        let found: Vec<&str> = part.trim_end().lines().map(str::trim_end).collect();
        let expected: Vec<&str> = exchange.expected.iter().map(String::as_str).collect();
        let expected = trimmed(&expected);
        if !matches_lines(expected, &found) {
            differences.push(format!(
                "$ {}\n  shown:\n    {}\n  printed:\n    {}",
                exchange.command,
                expected.join("\n    "),
                found.join("\n    ")
            ));
        }
    }
    differences
}

fn trimmed<'a, 'b>(lines: &'a [&'b str]) -> &'a [&'b str] {
    let end = lines.iter().rposition(|line| !line.is_empty()).map_or(0, |last| last + 1);
    &lines[..end]
}

fn matches_lines(expected: &[&str], found: &[&str]) -> bool {
    match expected.split_first() {
        None => found.is_empty(),
        Some((&"...", rest)) => (0..=found.len()).any(|skipped| matches_lines(rest, &found[skipped..])),
        Some((first, rest)) => {
            found.split_first().is_some_and(|(line, others)| matches_line(first, line) && matches_lines(rest, others))
        }
    }
}

fn matches_line(expected: &str, found: &str) -> bool {
    match expected.split_once("...") {
        None => expected == found,
        Some((before, after)) => found.strip_prefix(before).is_some_and(|rest| {
            rest.char_indices().map(|(at, _)| at).chain([rest.len()]).any(|at| matches_line(after, &rest[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_read_from_all_blocks() {
        let text = "a\n```console\n$ one \\\n    two\nprinted\n$ three\n```\n```sh\nfour\n```\n```console\n$ five\n6\n7\n```\n";
        let exchange = |command: &str, expected: &[&str]| Exchange {
            command: command.to_owned(),
            expected: expected.iter().map(|line| (*line).to_owned()).collect(),
        };
        assert_eq!(
            session(text),
            [exchange("one \\\n    two", &["printed"]), exchange("three", &[]), exchange("five", &["6", "7"])]
        );
    }

    #[test]
    fn dots_stand_for_what_varies_and_nothing_else_does() {
        assert!(matches_lines(&["a ... c"], &["a b c"]));
        assert!(!matches_lines(&["a ... c"], &["a b"]));
        assert!(matches_lines(&["...", "end"], &["a", "b", "end"]));
        assert!(!matches_lines(&["...", "end"], &["a", "b"]));
        assert!(!matches_lines(&["a"], &["a", "b"]));
        assert!(!matches_lines(&["a", "b"], &["a"]));
        assert!(matches_lines(&[], &[]));
    }
}
