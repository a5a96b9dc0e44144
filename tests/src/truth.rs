//! What happened to the store, revision by revision: the measure for watches, caches and calls.
//!
//! It is put together from changes that somebody reported, and believes nobody: every revision after the base must be
//! there, since a command that changes anything raises the revision by exactly one, and each change must follow from
//! the one before. What is left out, repeated or invented breaks one of the two. Pure; knows nothing of clusters.

use std::collections::BTreeMap;

use bytes::Bytes;
use d_engine_client::{KeyRange, KeyValue, WatchEvent};
use d_engine_proto::v1;

/// What a key holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// The value; empty where values are left out.
    pub value: Bytes,
    /// Revision that created the key.
    pub create_revision: u64,
    /// Revision that last changed it.
    pub mod_revision: u64,
    /// Changes since creation.
    pub version: u64,
    /// Its lease; 0: none.
    pub lease: u64,
}

impl From<KeyValue> for Held {
    fn from(kv: KeyValue) -> Self {
        Self {
            value: kv.value,
            create_revision: kv.create_revision.get(),
            mod_revision: kv.mod_revision.get(),
            version: kv.version,
            lease: kv.lease.map_or(0, |lease| lease.get()),
        }
    }
}

impl From<v1::KeyValue> for Held {
    fn from(kv: v1::KeyValue) -> Self {
        KeyValue::from(kv).into()
    }
}

/// The content of a store.
pub type State = BTreeMap<Bytes, Held>;

/// As a state.
pub fn state(kvs: impl IntoIterator<Item = KeyValue>) -> State {
    kvs.into_iter().map(|kv| (kv.key.clone(), kv.into())).collect()
}

/// What one revision did to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The revision.
    pub revision: u64,
    /// The key.
    pub key: Bytes,
    /// What it holds since; `None`: it was deleted.
    pub after: Option<Held>,
    /// What it held before, if it existed and that was told.
    pub before: Option<Held>,
}

impl From<WatchEvent> for Change {
    fn from(event: WatchEvent) -> Self {
        let revision = event.revision().get();
        match event {
            WatchEvent::Put { kv, previous } => {
                Self { revision, key: kv.key.clone(), after: Some(kv.into()), before: previous.map(Held::from) }
            }
            WatchEvent::Delete { key, previous, .. } => {
                Self { revision, key, after: None, before: previous.map(Held::from) }
            }
        }
    }
}

impl TryFrom<v1::WatchEvent> for Change {
    type Error = String;

    fn try_from(event: v1::WatchEvent) -> Result<Self, String> {
        let kind = event.kind();
        let kv = event.kv.ok_or("an event without a key")?;
        let (revision, key) = (kv.mod_revision, kv.key.clone());
        let after = match kind {
            v1::watch_event::Kind::Put => Some(Held::from(kv)),
            v1::watch_event::Kind::Delete => None,
            v1::watch_event::Kind::Unspecified => return Err(format!("an event of no kind at revision {revision}")),
        };
        Ok(Self { revision, key, after, before: event.previous.map(Held::from) })
    }
}

/// Which changes somebody asked for, and how much of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The keys.
    pub range: KeyRange,
    /// Without puts.
    pub no_puts: bool,
    /// Without deletions.
    pub no_deletes: bool,
    /// Without values.
    pub keys_only: bool,
    /// With what the keys held before.
    pub previous: bool,
}

impl View {
    /// All changes of these keys, without what they held before.
    #[must_use]
    pub fn of(range: KeyRange) -> Self {
        Self { range, ..Self::default() }
    }

    /// The change as this view shows it; `None` if it does not.
    #[must_use]
    pub fn shows(&self, change: &Change) -> Option<Change> {
        let left_out = if change.after.is_some() { self.no_puts } else { self.no_deletes };
        if left_out || !contains(&self.range, &change.key) {
            return None;
        }
        let mut shown = change.clone();
        if !self.previous {
            shown.before = None;
        }
        if self.keys_only {
            for held in [&mut shown.after, &mut shown.before].into_iter().flatten() {
                held.value = Bytes::new();
            }
        }
        Some(shown)
    }
}

/// Whether the interval has the key.
#[must_use]
pub fn contains(range: &KeyRange, key: &Bytes) -> bool {
    key >= range.start() && (range.end().is_empty() || key < range.end())
}

/// See the module's description.
#[derive(Clone, Debug)]
pub struct Truth {
    base: State,
    base_revision: u64,
    /// Invariant: ascending by revision, then key; every revision from the base on has at least one, and each follows
    /// from those before.
    changes: Vec<Change>,
}

impl Truth {
    /// The history after `base_revision`, at which the store held `base`, as `changes` tell it, in their order.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(base_revision: u64, base: State, changes: Vec<Change>) -> Result<Self, String> {
        let mut state = base.clone();
        let mut ordered: Vec<Change> = Vec::with_capacity(changes.len());
        let mut through = base_revision;
        for mut change in changes {
            let Change { revision, key, .. } = &change;
            if *revision != through && *revision != through + 1 || *revision == base_revision {
                return Err(format!("revision {revision} follows {through}"));
            }
            through = *revision;
            let before = state.get(key).cloned();
            if before.as_ref().is_some_and(|before| before.mod_revision == *revision) {
                return Err(format!("revision {revision} changed {key:?} twice"));
            }
            if change.before.is_some() && change.before != before {
                return Err(format!("revision {revision} found {key:?} at {:?}, which held {before:?}", change.before));
            }
            follows(&change, before.as_ref())?;
            match &change.after {
                Some(after) => state.insert(key.clone(), after.clone()),
                None => state.remove(key),
            };
            change.before = before;
            ordered.push(change);
        }
        ordered.sort_by(|one, other| (one.revision, &one.key).cmp(&(other.revision, &other.key)));
        Ok(Self { base, base_revision, changes: ordered })
    }

    /// The last revision.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.changes.last().map_or(self.base_revision, |change| change.revision)
    }

    /// The revision it begins after.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.base_revision
    }

    /// Every change, by revision and key.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// What the store held at `revision`.
    #[must_use]
    pub fn state_at(&self, revision: u64) -> State {
        let mut state = self.base.clone();
        for change in self.changes.iter().take_while(|change| change.revision <= revision) {
            match &change.after {
                Some(after) => state.insert(change.key.clone(), after.clone()),
                None => state.remove(&change.key),
            };
        }
        state
    }

    /// What `view` shows of the revisions after `after` up to `through`.
    #[must_use]
    pub fn between(&self, view: &View, after: u64, through: u64) -> Vec<Change> {
        let from = self.changes.partition_point(|change| change.revision <= after);
        let to = self.changes.partition_point(|change| change.revision <= through);
        self.changes[from..to.max(from)].iter().filter_map(|change| view.shows(change)).collect()
    }

    /// Compares what was found at `revision` in an interval with what must have been there.
    ///
    /// # Errors
    /// The first difference.
    pub fn check_state(&self, revision: u64, range: &KeyRange, found: &State) -> Result<(), String> {
        let mut expected = self.state_at(revision);
        expected.retain(|key, _| contains(range, key));
        if expected == *found {
            return Ok(());
        }
        let keys: std::collections::BTreeSet<_> = expected.keys().chain(found.keys()).collect();
        let key = keys.into_iter().find(|key| expected.get(*key) != found.get(*key));
        let (wanted, got) = key.map_or((None, None), |key| (expected.get(key), found.get(key)));
        Err(format!("at revision {revision} the key {key:?} held {wanted:?}, and {got:?} was found"))
    }
}

/// Whether a change can follow what its key held.
fn follows(change: &Change, before: Option<&Held>) -> Result<(), String> {
    let Change { revision, key, after, .. } = change;
    match (after, before) {
        (None, None) => Err(format!("revision {revision} deleted {key:?}, which did not exist")),
        (None, Some(_)) => Ok(()),
        (Some(after), _) => {
            let create_revision = before.map_or(*revision, |before| before.create_revision);
            let version = before.map_or(1, |before| before.version + 1);
            if (after.create_revision, after.mod_revision, after.version) == (create_revision, *revision, version) {
                return Ok(());
            }
            Err(format!("revision {revision} left {key:?} at {after:?} after {before:?}"))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A put as it follows from the changes before.
    pub(crate) fn put(changes: &[Change], revision: u64, key: &'static str, value: &'static str) -> Change {
        let key = Bytes::from_static(key.as_bytes());
        let before = changes.iter().rev().find(|change| change.key == key).and_then(|change| change.after.clone());
        let after = Held {
            value: Bytes::from_static(value.as_bytes()),
            create_revision: before.as_ref().map_or(revision, |before| before.create_revision),
            mod_revision: revision,
            version: before.as_ref().map_or(1, |before| before.version + 1),
            lease: 0,
        };
        Change { revision, key, after: Some(after), before }
    }

    pub(crate) fn delete(changes: &[Change], revision: u64, key: &'static str) -> Change {
        Change { after: None, ..put(changes, revision, key, "") }
    }

    /// Puts and deletions of a few keys, one and several in a revision.
    pub(crate) fn sample() -> Vec<Change> {
        let mut changes = Vec::new();
        for (revision, key, value) in [
            (1, "a/1", Some("one")),
            (2, "b/1", Some("two")),
            (3, "a/1", Some("three")),
            (3, "a/2", Some("four")),
            (4, "a/1", None),
            (5, "b/1", Some("five")),
            (6, "a/1", Some("six")),
            (7, "a/1", None),
            (7, "a/2", None),
        ] {
            changes.push(match value {
                Some(value) => put(&changes, revision, key, value),
                None => delete(&changes, revision, key),
            });
        }
        changes
    }

    #[track_caller]
    fn is_refused(changes: Vec<Change>, because: &str) {
        let error = Truth::new(0, State::new(), changes).expect_err("a wrong history was believed");
        assert!(error.contains(because), "{error}");
    }

    #[test]
    fn a_right_history_is_believed_and_gives_every_state_back() {
        let truth = Truth::new(0, State::new(), sample()).unwrap();
        assert_eq!(truth.last(), 7);
        let keys = |revision| truth.state_at(revision).into_keys().collect::<Vec<_>>();
        assert_eq!(keys(3), ["a/1", "a/2", "b/1"]);
        assert_eq!(keys(4), ["a/2", "b/1"]);
        assert_eq!(keys(7), ["b/1"]);
        let later = Truth::new(3, truth.state_at(3), sample().split_off(4)).unwrap();
        assert_eq!(later.state_at(6), truth.state_at(6));
        assert_eq!(later.between(&View::of(KeyRange::prefix("a/")), 5, 7).len(), 3);
        truth.check_state(5, &KeyRange::all(), &truth.state_at(5)).unwrap();
        assert!(truth.check_state(5, &KeyRange::all(), &truth.state_at(6)).is_err());
    }

    #[test]
    fn a_wrong_history_is_not_believed() {
        let mut lost = sample();
        lost.remove(4);
        is_refused(lost, "revision 5 follows 3");

        let mut twice = sample();
        twice.insert(2, twice[1].clone());
        is_refused(twice, "changed b\"b/1\" twice");

        let mut swapped = sample();
        swapped.swap(4, 5);
        is_refused(swapped, "revision 5 follows 3");

        let mut half = sample();
        half.remove(3);
        is_refused(half, "revision 7 found");

        let mut version = sample();
        version[2].after.as_mut().unwrap().version = 3;
        is_refused(version, "revision 3 left");

        let mut previous = sample();
        previous[2].before.as_mut().unwrap().value = Bytes::from_static(b"other");
        is_refused(previous, "revision 3 found");

        let mut ghost = sample();
        ghost.push(delete(&[], 8, "a/1"));
        is_refused(ghost, "did not exist");
    }

    #[test]
    fn a_view_shows_what_was_asked_for() {
        let changes = sample();
        let truth = Truth::new(0, State::new(), changes.clone()).unwrap();
        let view = View { no_puts: true, previous: true, ..View::of(KeyRange::prefix("a/")) };
        let shown = truth.between(&view, 0, 9);
        assert_eq!(shown.iter().map(|change| change.revision).collect::<Vec<_>>(), [4, 7, 7]);
        assert_eq!(shown[0].before.as_ref().unwrap().value, "three");
        let view = View { no_deletes: true, keys_only: true, ..View::of(KeyRange::all()) };
        let shown = truth.between(&view, 2, 5);
        assert_eq!(shown.len(), 3);
        assert!(shown.iter().all(|change| change.before.is_none() && change.after.as_ref().unwrap().value.is_empty()));
    }
}
