//! Judges what a watch hands out against everything that changed.

use d_engine_proto::{Revision, v1};

use crate::storage::versions::{Change, KeyVersion};

/// The judge of one watch, through all its resumptions: what it lets pass is ordered, unique, whole and complete, and
/// its bookmarks are true.
pub(in crate::watch) struct Validator {
    create: v1::WatchCreate,
    /// What matches up to here was handed out.
    through: Revision,
    /// Events of a revision that is not whole yet.
    begun: Vec<v1::WatchEvent>,
}

impl Validator {
    /// For a watch that delivers from `from` on.
    pub(in crate::watch) fn new(create: v1::WatchCreate, from: Revision) -> Self {
        Self { create, through: Revision(from.get() - 1), begun: Vec::new() }
    }

    /// How to go on after the last whole revision; what was begun comes again.
    pub(in crate::watch) fn resume(&mut self) -> v1::WatchCreate {
        self.begun.clear();
        v1::WatchCreate { from_revision: self.through.next().get(), ..self.create.clone() }
    }

    pub(in crate::watch) fn through(&self) -> Revision {
        self.through
    }

    /// Judges events; the last revision is whole unless `incomplete`.
    pub(in crate::watch) fn events(
        &mut self,
        events: impl IntoIterator<Item = v1::WatchEvent>,
        incomplete: bool,
        truth: &[Change],
    ) {
        self.begun.extend(events);
        let last = Revision(self.begun.last().and_then(|event| event.kv.as_ref()).expect("an event").mod_revision);
        let expected = self.expected(last, truth);
        if incomplete {
            assert!(self.begun.len() < expected.len(), "nothing is missing after {:?}", self.through);
            assert_eq!(self.begun, expected[..self.begun.len()], "after {:?}", self.through);
        } else {
            assert_eq!(self.begun, expected, "after {:?}", self.through);
            self.begun.clear();
            self.through = last;
        }
    }

    /// Judges a bookmark.
    pub(in crate::watch) fn bookmark(&mut self, revision: Revision, truth: &[Change]) {
        assert!(self.begun.is_empty(), "a bookmark within revision {revision}");
        assert!(revision > self.through, "bookmark {revision} says nothing new after {:?}", self.through);
        assert!(truth.last().is_some_and(|last| revision <= last.revision), "a bookmark of the future");
        assert_eq!(self.expected(revision, truth), [], "left out before bookmark {revision}");
        self.through = revision;
    }

    /// The events after `through` up to a revision: by looking at each change, the naive way.
    fn expected(&self, last: Revision, truth: &[Change]) -> Vec<v1::WatchEvent> {
        let v1::WatchCreate { previous, no_puts, no_deletes, keys_only, .. } = self.create;
        let range = self.create.range.as_ref().expect("a range");
        let mut events = Vec::new();
        let first = truth.partition_point(|change| change.revision <= self.through);
        for change in truth[first..].iter().take_while(|change| change.revision <= last) {
            let inside = change.key >= range.start && (range.end.is_empty() || change.key < range.end);
            let is_put = change.after.is_some();
            if !inside || (is_put && no_puts) || (!is_put && no_deletes) {
                continue;
            }
            let mut kv = v1::KeyValue { key: change.key.clone(), ..Default::default() };
            kv.mod_revision = change.revision.get();
            if let Some(after) = &change.after {
                kv = held(after, keys_only);
            }
            let kind = if is_put { v1::watch_event::Kind::Put } else { v1::watch_event::Kind::Delete };
            let before = if previous { change.before.as_ref().map(|before| held(before, keys_only)) } else { None };
            events.push(v1::WatchEvent { kind: kind as i32, kv: Some(kv), previous: before });
        }
        events
    }
}

fn held(version: &KeyVersion, keys_only: bool) -> v1::KeyValue {
    let mut kv = v1::KeyValue {
        key: version.key.clone(),
        value: version.value.clone(),
        create_revision: version.create_revision.get(),
        mod_revision: version.mod_revision.get(),
        version: version.version,
        lease: version.lease.get(),
    };
    if keys_only {
        kv.value.clear();
    }
    kv
}
