//! The last changes, in memory: what those who watch the store read, each at its own pace. It knows nothing of them.
//!
//! Bounded in bytes. Who is too slow finds the changes in the history instead.

use std::collections::VecDeque;
use std::sync::Arc;

use d_engine_proto::Revision;
use parking_lot::Mutex;

use crate::storage::versions::Change;

/// Bytes of keys and values that are kept. Values that are current are in memory anyway.
const RECENT_BYTES_MAX: usize = 32 << 20;
/// What a change costs besides its key and values.
const CHANGE_OVERHEAD_BYTES: usize = 256;

pub(super) struct Recent {
    state: Mutex<State>,
    bytes_max: usize,
}

struct State {
    /// Changes of one log entry each, none empty, in the order of revisions.
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Everything after this revision is here.
    after: Revision,
}

struct Entry {
    changes: Arc<Vec<Change>>,
    last: Revision,
    bytes: usize,
}

impl Recent {
    /// Begins with nothing, at the store's revision.
    pub(super) fn after(revision: Revision) -> Self {
        let state = State { entries: VecDeque::new(), bytes: 0, after: revision };
        Self { state: Mutex::new(state), bytes_max: RECENT_BYTES_MAX }
    }

    /// Adds the changes of a log entry.
    pub(super) fn push(&self, changes: &Arc<Vec<Change>>) {
        let Some(last) = changes.last() else { return };
        let bytes = changes.iter().map(change_bytes).sum();
        let entry = Entry { changes: Arc::clone(changes), last: last.revision, bytes };
        let mut state = self.state.lock();
        state.bytes += bytes;
        state.entries.push_back(entry);
        // The newest stays however large it is, so that who keeps up never needs the history.
        while state.bytes > self.bytes_max
            && state.entries.len() > 1
            && let Some(oldest) = state.entries.pop_front()
        {
            state.bytes -= oldest.bytes;
            state.after = oldest.last;
        }
    }

    /// Forgets everything: the store is another one, at this revision.
    pub(super) fn start_over(&self, revision: Revision) {
        *self.state.lock() = State { entries: VecDeque::new(), bytes: 0, after: revision };
    }

    /// The entries that change something after `revision`; the first may begin before. `None` if some are gone.
    pub(super) fn after_revision(&self, revision: Revision) -> Option<Vec<Arc<Vec<Change>>>> {
        let state = self.state.lock();
        if revision < state.after {
            return None;
        }
        let first = state.entries.partition_point(|entry| entry.last <= revision);
        Some(state.entries.range(first..).map(|entry| Arc::clone(&entry.changes)).collect())
    }

    /// As [`after_revision`](Self::after_revision), but no more entries than it takes to reach `bytes_max`: who reads
    /// much must not keep the writer from the lock.
    pub(super) fn after_revision_within(&self, revision: Revision, bytes_max: usize) -> Option<Vec<Arc<Vec<Change>>>> {
        let state = self.state.lock();
        if revision < state.after {
            return None;
        }
        let first = state.entries.partition_point(|entry| entry.last <= revision);
        let mut bytes = 0;
        let enough = |entry: &&Entry| {
            let more = bytes < bytes_max;
            bytes += entry.bytes;
            more
        };
        Some(state.entries.range(first..).take_while(enough).map(|entry| Arc::clone(&entry.changes)).collect())
    }

    /// With another bound.
    #[cfg(test)]
    pub(super) fn bounded(self, bytes_max: usize) -> Self {
        Self { bytes_max, ..self }
    }
}

fn change_bytes(change: &Change) -> usize {
    let value = |version: &Option<_>| {
        version.as_ref().map_or(0, |version: &Arc<crate::storage::versions::KeyVersion>| version.value.len())
    };
    CHANGE_OVERHEAD_BYTES + change.key.len() + value(&change.after) + value(&change.before)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn entry(revisions: std::ops::RangeInclusive<u64>, key_bytes: usize) -> Arc<Vec<Change>> {
        let change = |revision| Change {
            key: Bytes::from(vec![b'k'; key_bytes]),
            revision: Revision(revision),
            after: None,
            before: None,
        };
        Arc::new(revisions.map(change).collect())
    }

    fn revisions(found: Option<Vec<Arc<Vec<Change>>>>) -> Option<Vec<u64>> {
        Some(found?.iter().flat_map(|changes| changes.iter().map(|change| change.revision.get())).collect())
    }

    #[test]
    fn what_follows_a_revision_is_whole_or_absent() {
        let recent = Recent { bytes_max: 3000, ..Recent::after(Revision(4)) };
        assert_eq!(revisions(recent.after_revision(Revision(4))), Some(vec![]));
        assert_eq!(revisions(recent.after_revision(Revision(3))), None);
        recent.push(&entry(5..=6, 10));
        recent.push(&entry(7..=7, 10));
        recent.push(&Arc::default());
        assert_eq!(revisions(recent.after_revision(Revision(4))), Some(vec![5, 6, 7]));
        assert_eq!(revisions(recent.after_revision(Revision(5))), Some(vec![5, 6, 7]), "from the middle of an entry");
        assert_eq!(revisions(recent.after_revision(Revision(6))), Some(vec![7]));
        assert_eq!(revisions(recent.after_revision(Revision(9))), Some(vec![]));
        for (bytes_max, expected) in [(0, vec![]), (1, vec![5, 6]), (600, vec![5, 6, 7])] {
            assert_eq!(revisions(recent.after_revision_within(Revision(4), bytes_max)), Some(expected));
        }
        assert_eq!(revisions(recent.after_revision_within(Revision(3), 600)), None);
        recent.push(&entry(8..=9, 1200));
        assert_eq!(revisions(recent.after_revision(Revision(6))), None, "pushed out");
        assert_eq!(revisions(recent.after_revision(Revision(7))), Some(vec![8, 9]));
        recent.push(&entry(10..=10, 9000));
        assert_eq!(revisions(recent.after_revision(Revision(9))), Some(vec![10]), "the newest stays");
    }
}
