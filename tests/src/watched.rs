//! Judges what a watch delivered, against what happened: ordered, unique, whole revisions, complete, bookmarks true.
//!
//! All of that is one comparison, made after each delivery: what was delivered is exactly what the watch's view shows
//! of the revisions up to the one the delivery claims. The rest here names what is wrong. Pure.

use crate::truth::{Change, Truth, View};

/// What one answer or update of a watch brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Everything up to this revision is claimed to be delivered.
    pub through: u64,
    /// The changes; none in a bookmark.
    pub changes: Vec<Change>,
}

/// A watch and what came of it.
#[derive(Clone, Debug)]
pub struct Watched {
    /// Who watched, for people.
    pub name: String,
    /// What was asked for.
    pub view: View,
    /// The first revision that the watch promised to deliver.
    pub from: u64,
    /// What came, in order, over all resumptions.
    pub deliveries: Vec<Delivery>,
    /// How often it was resumed.
    pub resumed: usize,
}

/// What a right watch amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Changes delivered.
    pub changes: usize,
    /// Deliveries without a change.
    pub bookmarks: usize,
    /// Resumptions.
    pub resumed: usize,
}

impl Watched {
    /// A watch that has delivered nothing yet.
    #[must_use]
    pub fn new(name: impl Into<String>, view: View, from: u64) -> Self {
        Self { name: name.into(), view, from, deliveries: Vec::new(), resumed: 0 }
    }

    /// Everything up to this revision was delivered.
    #[must_use]
    pub fn cursor(&self) -> u64 {
        self.deliveries.last().map_or(self.from.saturating_sub(1), |delivery| delivery.through)
    }

    /// Judges it against the history, as far as the watch came.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn judge(&self, truth: &Truth) -> Result<Amount, String> {
        let mut amount = Amount { resumed: self.resumed, ..Amount::default() };
        let mut cursor = self.from.saturating_sub(1);
        if cursor < truth.first() && !self.deliveries.is_empty() {
            return Err(format!("{}: begins at {} before the history after {}", self.name, self.from, truth.first()));
        }
        for delivery in &self.deliveries {
            self.one(truth, cursor, delivery).map_err(|wrong| {
                format!("{}: delivery of {}..={}: {wrong}", self.name, cursor + 1, delivery.through)
            })?;
            cursor = delivery.through;
            amount.changes += delivery.changes.len();
            amount.bookmarks += usize::from(delivery.changes.is_empty());
        }
        Ok(amount)
    }

    fn one(&self, truth: &Truth, cursor: u64, delivery: &Delivery) -> Result<(), String> {
        if delivery.through <= cursor {
            return Err("it goes back, or says nothing".to_owned());
        }
        if delivery.through > truth.last() {
            return Err(format!("there is no such revision: the last one is {}", truth.last()));
        }
        if !delivery.changes.is_sorted_by_key(|change| change.revision) {
            return Err("its changes are out of order".to_owned());
        }
        let outside = |change: &&Change| change.revision <= cursor || change.revision > delivery.through;
        if let Some(change) = delivery.changes.iter().find(outside) {
            let what = if change.revision <= cursor { "again, or too early," } else { "beyond itself" };
            return Err(format!("it brings {what} revision {} of {:?}", change.revision, change.key));
        }
        let mut delivered = delivery.changes.clone();
        delivered.sort_by(|one, other| (one.revision, &one.key).cmp(&(other.revision, &other.key)));
        let expected = truth.between(&self.view, cursor, delivery.through);
        let id = |change: &Change| (change.revision, change.key.clone());
        if let Some(pair) = delivered.windows(2).find(|pair| id(&pair[0]) == id(&pair[1])) {
            return Err(format!("revision {} of {:?} comes twice", pair[0].revision, pair[0].key));
        }
        if let Some(lost) = expected.iter().find(|wanted| !delivered.iter().any(|found| id(found) == id(wanted))) {
            return Err(format!("revision {} of {:?} is lost", lost.revision, lost.key));
        }
        if let Some(alien) = delivered.iter().find(|found| !expected.iter().any(|wanted| id(wanted) == id(found))) {
            return Err(format!("revision {} of {:?} never was, or was not asked for", alien.revision, alien.key));
        }
        match delivered.iter().zip(&expected).find(|(found, wanted)| found != wanted) {
            Some((found, wanted)) => Err(format!("it brings {found:?}, which was {wanted:?}")),
            None => Ok(()),
        }
    }
}

/// Puts the answers of a watch on the wire together to deliveries: one that ends within a revision leaves the rest of
/// it for the next.
#[derive(Clone, Debug, Default)]
pub struct Assembler {
    partial: Vec<Change>,
}

impl Assembler {
    /// Takes an answer with events; gives what it completes.
    ///
    /// # Errors
    /// When the answer is malformed.
    pub fn events(&mut self, answer: d_engine_proto::v1::WatchEvents) -> Result<Option<Delivery>, String> {
        if answer.events.is_empty() {
            return Err("an answer without events".to_owned());
        }
        let mut changes = std::mem::take(&mut self.partial);
        for event in answer.events {
            changes.push(Change::try_from(event)?);
        }
        if answer.incomplete {
            let open = changes.last().map(|change| change.revision);
            let begin = changes.iter().position(|change| Some(change.revision) == open).unwrap_or_default();
            self.partial = changes.split_off(begin);
        }
        Ok(changes.last().map(|change| change.revision).map(|through| Delivery { through, changes }))
    }

    /// Takes a bookmark.
    ///
    /// # Errors
    /// When it comes within a revision.
    pub fn bookmark(&mut self, revision: u64) -> Result<Delivery, String> {
        match self.partial.first() {
            None => Ok(Delivery { through: revision, changes: Vec::new() }),
            Some(open) => Err(format!("a bookmark at {revision} within revision {}", open.revision)),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use d_engine_client::KeyRange;

    use super::*;
    use crate::truth::State;
    use crate::truth::tests::sample;

    fn truth() -> Truth {
        Truth::new(0, State::new(), sample()).unwrap()
    }

    /// What a right watch delivers of `view`, cut after each of `cuts`.
    fn right(view: View, cuts: &[u64]) -> Watched {
        let mut watched = Watched::new("planted", view, 1);
        for cut in cuts {
            let changes = truth().between(&watched.view, watched.cursor(), *cut);
            watched.deliveries.push(Delivery { through: *cut, changes });
        }
        watched
    }

    fn whole() -> Watched {
        right(View { previous: true, ..View::of(KeyRange::all()) }, &[1, 2, 3, 4, 5, 6, 7])
    }

    #[track_caller]
    fn is_caught(watched: &Watched, because: &str) {
        let wrong = watched.judge(&truth()).expect_err("a wrong watch passed");
        assert!(wrong.contains(because), "{wrong}");
    }

    #[test]
    fn a_right_watch_passes_however_it_is_cut_and_filtered() {
        assert_eq!(whole().judge(&truth()), Ok(Amount { changes: 9, bookmarks: 0, resumed: 0 }));
        for cuts in [&[7][..], &[2, 7], &[1, 3, 6, 7], &[3]] {
            for view in [
                View::of(KeyRange::prefix("a/")),
                View { no_puts: true, ..View::of(KeyRange::all()) },
                View { keys_only: true, previous: true, ..View::of(KeyRange::prefix("b/")) },
            ] {
                right(view, cuts).judge(&truth()).unwrap();
            }
        }
        assert_eq!(right(View::of(KeyRange::prefix("c/")), &[2, 5]).judge(&truth()).unwrap().bookmarks, 2);
    }

    #[test]
    fn a_lost_change_is_caught() {
        for index in 0..7 {
            let mut watched = whole();
            watched.deliveries[index].changes.remove(0);
            is_caught(&watched, "is lost");
        }
        let mut skipped = whole();
        skipped.deliveries.remove(3);
        is_caught(&skipped, "is lost");
    }

    #[test]
    fn a_false_bookmark_is_caught() {
        let mut watched = whole();
        watched.deliveries.insert(2, Delivery { through: 3, changes: Vec::new() });
        is_caught(&watched, "is lost");
        let mut ahead = whole();
        ahead.deliveries.push(Delivery { through: 9, changes: Vec::new() });
        is_caught(&ahead, "no such revision");
        let mut back = whole();
        back.deliveries.push(Delivery { through: 6, changes: Vec::new() });
        is_caught(&back, "goes back");
    }

    #[test]
    fn a_repeated_change_is_caught() {
        let mut again = whole();
        let change = again.deliveries[1].changes[0].clone();
        again.deliveries[2].changes.insert(0, change);
        is_caught(&again, "again");
        let mut twice = whole();
        let change = twice.deliveries[1].changes[0].clone();
        twice.deliveries[1].changes.push(change);
        is_caught(&twice, "comes twice");
    }

    #[test]
    fn a_revision_in_two_halves_is_caught() {
        let mut watched = whole();
        let second = watched.deliveries[2].changes.pop().unwrap();
        watched.deliveries.insert(3, Delivery { through: 3, changes: vec![second] });
        is_caught(&watched, "is lost");
    }

    #[test]
    fn disorder_is_caught() {
        let mut watched = right(View { previous: true, ..View::of(KeyRange::all()) }, &[7]);
        watched.deliveries[0].changes.swap(0, 1);
        is_caught(&watched, "out of order");
    }

    #[test]
    fn a_change_that_never_was_is_caught() {
        let mut other = whole();
        other.deliveries[0].changes[0].after.as_mut().unwrap().value = Bytes::from_static(b"other");
        is_caught(&other, "which was");
        let mut lease = whole();
        lease.deliveries[0].changes[0].after.as_mut().unwrap().lease = 7;
        is_caught(&lease, "which was");
        let mut unasked = whole();
        unasked.view.no_deletes = true;
        is_caught(&unasked, "not asked for");
        let mut kind = whole();
        kind.deliveries[3].changes[0].after = kind.deliveries[3].changes[0].before.clone();
        is_caught(&kind, "which was");
        let mut previous = whole();
        previous.deliveries[2].changes[0].before = None;
        is_caught(&previous, "which was");
    }

    #[test]
    fn a_watch_that_begins_late_is_caught() {
        let mut late = whole();
        late.deliveries.remove(0);
        is_caught(&late, "is lost");
        late.from = 2;
        late.judge(&truth()).unwrap();
    }

    #[test]
    fn answers_within_a_revision_wait_for_its_end() {
        use d_engine_proto::v1;
        let event = |revision, key: &'static str| v1::WatchEvent {
            kind: v1::watch_event::Kind::Put.into(),
            kv: Some(v1::KeyValue { key: key.into(), mod_revision: revision, ..v1::KeyValue::default() }),
            previous: None,
        };
        let answer = |events: Vec<v1::WatchEvent>, incomplete| v1::WatchEvents { events, incomplete };
        let mut assembler = Assembler::default();
        let first = assembler.events(answer(vec![event(4, "a"), event(5, "a")], true)).unwrap().unwrap();
        assert_eq!((first.through, first.changes.len()), (4, 1));
        assert!(assembler.bookmark(5).is_err());
        assert_eq!(assembler.events(answer(vec![event(5, "b")], true)).unwrap(), None);
        let rest = assembler.events(answer(vec![event(5, "c"), event(6, "a")], false)).unwrap().unwrap();
        assert_eq!((rest.through, rest.changes.len()), (6, 4));
        assert_eq!(assembler.bookmark(9).unwrap().through, 9);
        assert!(assembler.events(answer(Vec::new(), false)).is_err());
    }
}
