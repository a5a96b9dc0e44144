//! What a watch asks for, checked; and which changes that are.

use bytes::Bytes;
use d_engine_proto::{Revision, v1};

use super::WatchError;
use crate::state_machine::kv::{self, KvError};
use crate::storage::versions::Change;

/// What a watch asks for, apart from where it begins. Watches with equal interests share what is delivered to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interest {
    pub(super) span: Span,
    pub(super) options: Options,
}

/// The keys from `start` (inclusive) to `end` (exclusive; `None`: to the last); never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: Bytes,
    pub(super) end: Option<Bytes>,
}

/// Which changes of the keys, and what to tell of each. At least one of `puts` and `deletes` is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) previous: bool,
    pub(super) puts: bool,
    pub(super) deletes: bool,
    pub(super) keys_only: bool,
}

impl Interest {
    /// Checks a request.
    pub(super) fn of(create: &v1::WatchCreate) -> Result<Self, WatchError> {
        // The rules of an interval are those of a read.
        let read = v1::RangeRequest { range: create.range.clone(), ..v1::RangeRequest::default() };
        kv::validate_range(&read)?;
        if create.no_puts && create.no_deletes {
            return Err(WatchError::NothingLeft);
        }
        let v1::KeyRange { start, end } = create.range.as_ref().ok_or(KvError::Missing { field: "range" })?;
        // Copies: a slice would keep the buffer it was received in for as long as the watch lives.
        let start = Bytes::copy_from_slice(start);
        let end = (!end.is_empty()).then(|| Bytes::copy_from_slice(end));
        let options = Options {
            previous: create.previous,
            puts: !create.no_puts,
            deletes: !create.no_deletes,
            keys_only: create.keys_only,
        };
        Ok(Self { span: Span { start, end }, options })
    }

    /// The changes that match and were made after a revision.
    pub(super) fn select(&self, changes: &[Change], after: Revision) -> Vec<Change> {
        let wanted =
            |change: &&Change| change.revision > after && self.span.contains(&change.key) && self.options.wants(change);
        changes.iter().filter(wanted).cloned().collect()
    }
}

impl Span {
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        *self.start <= *key && self.end.as_ref().is_none_or(|end| *key < **end)
    }

    /// Whether it holds one key only, which is then its start.
    pub(super) fn is_one_key(&self) -> bool {
        let end = self.end.as_deref().and_then(|end| end.split_last());
        end.is_some_and(|(last, rest)| *last == 0 && rest == self.start)
    }
}

impl Options {
    pub(super) fn wants(self, change: &Change) -> bool {
        if change.after.is_some() { self.puts } else { self.deletes }
    }
}
