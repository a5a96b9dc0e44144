//! What clients asked and were told, as the judge in `tests/linearizability` reads it: JSON lines.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Result, Write};
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

/// Keys with their values; `None` stands for an absent key.
pub type Values = BTreeMap<String, Option<String>>;

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Answered.
    Ok,
    /// Certainly without effect.
    NotApplied,
    /// With effect, without, or with a later one.
    Unknown,
}

/// One operation, whatever its kind: if all comparisons hold, the writes take place at once. Its meaning is told in
/// `tests/linearizability/operation.go`.
#[derive(Clone, Debug, Serialize)]
pub struct Operation {
    /// "eventual" for eventual reads; any other name is judged for linearizability.
    pub kind: &'static str,
    /// Who asked.
    pub client: usize,
    /// Nanoseconds on the recorder's clock.
    pub call: u64,
    /// Nanoseconds on the recorder's clock.
    #[serde(rename = "return")]
    pub returned: u64,
    /// What became of it.
    pub outcome: Outcome,
    /// What must hold.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub compare: Values,
    /// What is written then.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub write: Values,
    /// The state before, as far as it was shown.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub observed: Values,
    /// Whether the comparisons held.
    pub succeeded: bool,
    /// Revision of the answer.
    pub revision: u64,
    /// Lower bound an eventual read asked for.
    pub min_revision: u64,
    /// Revisions at which the observed keys were written.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub mod_revisions: BTreeMap<String, u64>,
}

/// What an answer showed.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Whether the comparisons held.
    pub succeeded: bool,
    /// Revision of the header.
    pub revision: u64,
    /// The state before.
    pub observed: Values,
    /// Revisions at which the observed keys were written.
    pub mod_revisions: BTreeMap<String, u64>,
}

impl Answer {
    /// An answer that shows nothing but its revision.
    #[must_use]
    pub fn at(revision: u64) -> Self {
        Self { succeeded: true, revision, ..Self::default() }
    }

    /// Adds what it showed of `key`: its value and modification revision.
    #[must_use]
    pub fn showing(mut self, key: &str, found: Option<(String, u64)>) -> Self {
        if let Some((_, at)) = &found {
            self.mod_revisions.insert(key.to_owned(), *at);
        }
        self.observed.insert(key.to_owned(), found.map(|(value, _)| value));
        self
    }
}

/// Times and collects the operations of one client.
#[derive(Debug)]
pub struct Recorder {
    client: usize,
    start: Instant,
    operations: Vec<Operation>,
}

impl Recorder {
    /// A recorder whose clock counts from `start`, which all recorders of a history share.
    #[must_use]
    pub fn new(client: usize, start: Instant) -> Self {
        Self { client, start, operations: Vec::new() }
    }

    /// The time, as operations carry it.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// Begins an operation now.
    #[must_use]
    pub fn begin(&self, kind: &'static str) -> Operation {
        Operation {
            kind,
            client: self.client,
            call: self.now(),
            returned: 0,
            outcome: Outcome::Unknown,
            compare: Values::new(),
            write: Values::new(),
            observed: Values::new(),
            succeeded: false,
            revision: 0,
            min_revision: 0,
            mod_revisions: BTreeMap::new(),
        }
    }

    /// Ends an operation now, with the answer or the outcome of its failure.
    pub fn end(&mut self, mut operation: Operation, result: std::result::Result<Answer, Outcome>) {
        operation.returned = self.now();
        match result {
            Ok(answer) => {
                operation.outcome = Outcome::Ok;
                operation.succeeded = answer.succeeded;
                operation.revision = answer.revision;
                operation.observed = answer.observed;
                operation.mod_revisions = answer.mod_revisions;
            }
            Err(outcome) => operation.outcome = outcome,
        }
        self.operations.push(operation);
    }

    /// Everything recorded.
    #[must_use]
    pub fn into_operations(self) -> Vec<Operation> {
        self.operations
    }
}

/// Writes a history as JSON lines.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, operations: &[Operation]) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for operation in operations {
        serde_json::to_writer(&mut file, operation)?;
        file.write_all(b"\n")?;
    }
    file.flush()
}
