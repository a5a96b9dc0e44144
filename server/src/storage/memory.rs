//! A [`StorageEngine`] that keeps its promises only as long as the process lives: for tests, never for a cluster.

use std::path::Path;
use std::sync::Arc;

use d_engine_proto::LogIndex;
use imbl::OrdMap;
use parking_lot::RwLock;

use super::log_state::LogState;
use super::{Durability, LogRecord, StorageEngine, StorageError, StorageOperation, StorageState};

/// Stands for a path in errors.
const PLACE: &str = "memory";

/// Log, vote and identity in memory. **Not durable**: a node that restarts on an empty one has forgotten its vote, and
/// may take part in electing two leaders of one term.
#[derive(Debug, Default)]
pub struct MemoryStorageEngine {
    content: Arc<RwLock<Content>>,
}

#[derive(Clone, Debug, Default)]
struct Content {
    log: LogState,
    /// Persistent, so that a write that is refused half-way is undone by forgetting a cheap copy.
    records: OrdMap<u64, LogRecord>,
    poisoned: bool,
}

impl MemoryStorageEngine {
    /// Creates an empty engine.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Another engine on the same content, as if the process had ended and started again. The engines share what is
    /// written from now on: use one at a time.
    #[must_use]
    pub fn reopen(&self) -> Self {
        self.content.write().poisoned = false;
        Self { content: Arc::clone(&self.content) }
    }
}

impl StorageEngine for MemoryStorageEngine {
    fn state(&self) -> Result<StorageState, StorageError> {
        Ok(self.content.read().log.state.clone())
    }

    fn read(&self, start: LogIndex, end: LogIndex, bytes_max: usize) -> Result<Vec<LogRecord>, StorageError> {
        let content = self.content.read();
        let mut bytes = 0_usize;
        let mut records = Vec::new();
        if start < end {
            for record in content.records.range(start.get()..end.get()).map(|(_, record)| record) {
                bytes = bytes.saturating_add(record.payload.len());
                records.push(record.clone());
                if bytes >= bytes_max {
                    break;
                }
            }
        }
        Ok(records)
    }

    fn sync(&self) -> Result<(), StorageError> {
        if self.content.read().poisoned { Err(refused("an earlier write failed")) } else { Ok(()) }
    }

    fn write(&self, operations: &[StorageOperation], _durability: Durability) -> Result<(), StorageError> {
        let mut content = self.content.write();
        if content.poisoned {
            return Err(refused("an earlier write failed"));
        }
        let mut next = content.clone();
        match next.apply(operations) {
            Ok(()) => {
                *content = next;
                Ok(())
            }
            Err(error) => {
                content.poisoned = true;
                Err(error)
            }
        }
    }
}

impl Content {
    fn apply(&mut self, operations: &[StorageOperation]) -> Result<(), StorageError> {
        let Self { log, records, .. } = self;
        for operation in operations {
            let dropped = log.apply(operation, Path::new(PLACE), |index| {
                let record = records.get(&index.get());
                record.map(|record| record.position).ok_or_else(|| refused("an entry is missing"))
            })?;
            for index in dropped.into_iter().flatten() {
                records.remove(&index);
            }
            if let StorageOperation::Append(record) = operation {
                records.insert(record.position.index.get(), record.clone());
            }
        }
        Ok(())
    }
}

fn refused(message: &str) -> StorageError {
    StorageError::Refused { path: PLACE.into(), message: message.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::suite::{self, Subject};

    struct Memory;

    impl Subject for Memory {
        type Engine = MemoryStorageEngine;

        fn empty(&mut self) -> MemoryStorageEngine {
            MemoryStorageEngine::new()
        }

        fn reopen(&mut self, engine: MemoryStorageEngine) -> MemoryStorageEngine {
            engine.reopen()
        }
    }

    #[test]
    fn memory_passes_the_suite() {
        suite::run(&mut Memory, fastrand::u64(..));
    }
}
