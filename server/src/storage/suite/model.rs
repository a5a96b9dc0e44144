//! The storage engine as slow and plain as it can be written, and random writes for it.

use bytes::Bytes;
use d_engine_proto::{LogIndex, NodeId, Term};
use fastrand::Rng;

use crate::storage::{Identity, LogPosition, LogRecord, StorageOperation, StorageState, Vote};

/// What an engine must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::storage) struct Model {
    records: Vec<LogRecord>,
    /// All but `last`, which the records tell.
    saved: StorageState,
}

impl Model {
    pub(in crate::storage) fn apply(&mut self, operation: &StorageOperation) {
        match operation {
            StorageOperation::Append(record) => self.records.push(record.clone()),
            StorageOperation::TruncateAfter(Some(index)) => {
                self.records.retain(|record| record.position.index <= *index);
            }
            StorageOperation::TruncateAfter(None) => self.records.clear(),
            StorageOperation::PurgeTo(position) => {
                if self.purged_index() < position.index.get() || self.saved.purged.is_none() {
                    self.saved.purged = Some(*position);
                    self.records.retain(|record| record.position.index > position.index);
                }
            }
            StorageOperation::SaveVote(vote) => self.saved.vote = Some(*vote),
            StorageOperation::SaveCommitted(position) => self.saved.committed = Some(*position),
            StorageOperation::SaveIdentity(identity) => self.saved.identity = Some(*identity),
        }
    }

    pub(in crate::storage) fn state(&self) -> StorageState {
        let last = self.records.last().map(|record| record.position);
        StorageState { last, ..self.saved.clone() }
    }

    pub(in crate::storage) fn records(&self) -> &[LogRecord] {
        &self.records
    }

    pub(in crate::storage) fn read(&self, start: LogIndex, end: LogIndex, bytes_max: usize) -> Vec<LogRecord> {
        let mut bytes = 0;
        let mut records = Vec::new();
        for record in self.records.iter().filter(|record| (start..end).contains(&record.position.index)) {
            if !records.is_empty() && bytes >= bytes_max {
                break;
            }
            bytes += record.payload.len();
            records.push(record.clone());
        }
        records
    }

    /// A write this model can take, and takes.
    pub(in crate::storage) fn random_write(&mut self, rng: &mut Rng) -> Vec<StorageOperation> {
        let count = rng.usize(1..=6);
        let mut operations = Vec::with_capacity(count);
        for _ in 0..count {
            let operation = self.random_operation(rng);
            self.apply(&operation);
            operations.push(operation);
        }
        operations
    }

    fn random_operation(&self, rng: &mut Rng) -> StorageOperation {
        let (purged, last) = (self.purged_index(), self.last_index());
        match rng.u32(0..100) {
            0..70 => StorageOperation::Append(self.random_record(rng)),
            70..71 => StorageOperation::TruncateAfter(None),
            // Mostly the tail, but also what is not there, on both sides.
            71..80 => {
                StorageOperation::TruncateAfter(Some(LogIndex(last.saturating_sub(rng.u64(0..12)) + rng.u64(0..2))))
            }
            80..86 => StorageOperation::PurgeTo(random_position(rng, purged.saturating_sub(1)..=purged + 6)),
            86..87 => StorageOperation::PurgeTo(random_position(rng, last..=last + 20)),
            87..91 => StorageOperation::SaveVote(Vote {
                term: Term(rng.u64(0..9)),
                node_id: NodeId(rng.u32(..)),
                committed: rng.bool(),
            }),
            91..97 => StorageOperation::SaveCommitted(random_position(rng, 0..=last)),
            _ => StorageOperation::SaveIdentity(Identity {
                node_id: NodeId(rng.u32(..)),
                incarnation: rng.u64(..),
                cluster_id: rng.bool().then(|| rng.u64(..)),
            }),
        }
    }

    fn random_record(&self, rng: &mut Rng) -> LogRecord {
        let gap = if self.records.is_empty() && rng.u8(0..4) == 0 { rng.u64(0..300) } else { 0 };
        let length = match rng.u8(0..20) {
            0..3 => 0,
            3..19 => rng.usize(1..300),
            // Longer than the blocks of any file below.
            _ => rng.usize(10_000..80_000),
        };
        let mut payload = vec![0; length];
        rng.fill(&mut payload);
        LogRecord {
            position: LogPosition { term: Term(rng.u64(1..9)), index: LogIndex(self.last_index() + 1 + gap) },
            payload: Bytes::from(payload),
        }
    }

    /// The last entry's index, or where the next one goes on from.
    fn last_index(&self) -> u64 {
        self.records.last().map_or(self.purged_index(), |record| record.position.index.get())
    }

    fn purged_index(&self) -> u64 {
        self.saved.purged.map_or(0, |purged| purged.index.get())
    }
}

fn random_position(rng: &mut Rng, indices: std::ops::RangeInclusive<u64>) -> LogPosition {
    LogPosition { term: Term(rng.u64(1..9)), index: LogIndex(rng.u64(indices)) }
}
