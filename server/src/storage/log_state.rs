//! What the operations of a write mean for a log's bounds, told once for every engine: pure, without a disk.

use std::ops::RangeInclusive;
use std::path::Path;

use d_engine_proto::LogIndex;

use super::{LogPosition, StorageError, StorageOperation, StorageState};

/// A [`StorageState`] and the one bound it does not tell.
///
/// Invariant: `first` is known if and only if `state.last` is; `state.purged < first <= state.last` by index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LogState {
    /// What the engine reports.
    pub(super) state: StorageState,
    /// Index of the first entry held.
    pub(super) first: Option<LogIndex>,
}

/// Indices of entries that are to go.
pub(super) type Dropped = RangeInclusive<u64>;

impl LogState {
    /// Indices of the entries held.
    pub(super) fn held(&self) -> Option<RangeInclusive<u64>> {
        Some(self.first?.get()..=self.state.last?.index.get())
    }

    /// Whether the invariant holds; asked of a state read from a disk.
    pub(super) fn is_valid(&self) -> bool {
        let Some(held) = self.held() else { return self.first.is_none() && self.state.last.is_none() };
        let after_purged = self.state.purged.is_none_or(|purged| purged.index.get() < *held.start());
        !held.is_empty() && after_purged
    }

    /// Takes one step of a write and tells which entries must go for it. An appended entry is left to the caller.
    ///
    /// `position_of` looks up an entry that is held; `path` is for the refusal.
    ///
    /// # Errors
    /// [`StorageError::Refused`], or that of `position_of`.
    pub(super) fn apply(
        &mut self,
        operation: &StorageOperation,
        path: &Path,
        position_of: impl FnOnce(LogIndex) -> Result<LogPosition, StorageError>,
    ) -> Result<Option<Dropped>, StorageError> {
        let mut dropped = None;
        match operation {
            StorageOperation::Append(record) => self.append(record.position, path)?,
            StorageOperation::TruncateAfter(index) => dropped = self.truncate_after(*index, position_of)?,
            StorageOperation::PurgeTo(position) => dropped = self.purge_to(*position),
            StorageOperation::SaveVote(vote) => self.state.vote = Some(*vote),
            StorageOperation::SaveCommitted(position) => self.state.committed = Some(*position),
            StorageOperation::SaveIdentity(identity) => self.state.identity = Some(*identity),
        }
        Ok(dropped)
    }

    fn append(&mut self, position: LogPosition, path: &Path) -> Result<(), StorageError> {
        let index = position.index;
        let refused = |message| Err(StorageError::Refused { path: path.into(), message });
        match (self.state.last, self.state.purged) {
            (Some(last), _) if last.index.get().checked_add(1) != Some(index.get()) => {
                return refused(format!("entry {index} cannot follow entry {}", last.index));
            }
            (None, Some(purged)) if index <= purged.index => {
                return refused(format!("entry {index} lies before the purged entry {}", purged.index));
            }
            _ => {}
        }
        self.first.get_or_insert(index);
        self.state.last = Some(position);
        Ok(())
    }

    fn truncate_after(
        &mut self,
        index: Option<LogIndex>,
        position_of: impl FnOnce(LogIndex) -> Result<LogPosition, StorageError>,
    ) -> Result<Option<Dropped>, StorageError> {
        let Some(held) = self.held() else { return Ok(None) };
        match index {
            Some(index) if index.get() >= *held.end() => Ok(None),
            Some(index) if held.contains(&index.get()) => {
                self.state.last = Some(position_of(index)?);
                Ok(Some(index.get() + 1..=*held.end()))
            }
            _ => {
                self.clear();
                Ok(Some(held))
            }
        }
    }

    /// A purge never goes back.
    fn purge_to(&mut self, position: LogPosition) -> Option<Dropped> {
        if self.state.purged.is_some_and(|purged| position.index <= purged.index) {
            return None;
        }
        self.state.purged = Some(position);
        let held = self.held()?;
        let end = position.index.get();
        if end < *held.start() {
            return None;
        }
        if end >= *held.end() {
            self.clear();
            return Some(held);
        }
        self.first = Some(LogIndex(end + 1));
        Some(*held.start()..=end)
    }

    fn clear(&mut self) {
        self.first = None;
        self.state.last = None;
    }
}
