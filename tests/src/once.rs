//! Judges whether every put was applied as often as its caller was told: an acknowledged one once and at the revision
//! of its answer, one that failed for certain never, one in doubt once or never, and none twice. Pure.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;

use crate::truth::Truth;

/// What the caller of a put was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was applied, as this revision.
    Acknowledged(u64),
    /// It was not, and will not be.
    NotApplied,
    /// Nobody knows.
    Unknown,
}

/// A put of a value that no other put has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put {
    /// The key.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
    /// What the caller was told.
    pub fate: Fate,
}

/// How the puts went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Acknowledged.
    pub acknowledged: usize,
    /// Certainly not applied.
    pub not_applied: usize,
    /// In doubt, and applied.
    pub unknown_applied: usize,
    /// In doubt, and not applied.
    pub unknown_not_applied: usize,
}

impl Tally {
    /// All that are in doubt.
    #[must_use]
    pub fn unknown(&self) -> usize {
        self.unknown_applied + self.unknown_not_applied
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { acknowledged, not_applied, unknown_applied, unknown_not_applied } = self;
        write!(
            f,
            "{acknowledged} acknowledged, {not_applied} not applied, {} unknown ({unknown_applied} were applied)",
            unknown_applied + unknown_not_applied
        )
    }
}

/// Judges the puts against the history and against the `versions` that their keys have come to, which nobody else wrote
/// or deleted.
///
/// # Errors
/// The first put, or key, that is wrong.
pub fn judge(puts: &[Put], truth: &Truth, versions: &BTreeMap<Bytes, u64>) -> Result<Tally, String> {
    let mut applied: BTreeMap<(&Bytes, &Bytes), Vec<u64>> = BTreeMap::new();
    for change in truth.changes().iter().filter(|change| versions.contains_key(&change.key)) {
        let after = change.after.as_ref().ok_or_else(|| format!("revision {} deleted a key", change.revision))?;
        applied.entry((&change.key, &after.value)).or_default().push(change.revision);
    }
    let mut tally = Tally::default();
    let mut counted: BTreeMap<&Bytes, u64> = BTreeMap::new();
    for put in puts {
        let at = applied.remove(&(&put.key, &put.value)).unwrap_or_default();
        let wrong = |what: &str| Err(format!("{:?} = {:?}, {:?}: {what}: {at:?}", put.key, put.value, put.fate));
        if at.len() > 1 {
            return wrong("it was applied twice");
        }
        match (put.fate, at.first()) {
            (Fate::Acknowledged(revision), Some(at)) if revision == *at => tally.acknowledged += 1,
            (Fate::Acknowledged(_), _) => return wrong("it was applied elsewhere, or not at all"),
            (Fate::NotApplied, None) => tally.not_applied += 1,
            (Fate::NotApplied, Some(_)) => return wrong("it was applied"),
            (Fate::Unknown, Some(_)) => tally.unknown_applied += 1,
            (Fate::Unknown, None) => tally.unknown_not_applied += 1,
        }
        *counted.entry(&put.key).or_default() += at.len() as u64;
    }
    if let Some(((key, value), at)) = applied.first_key_value() {
        return Err(format!("nobody put {key:?} = {value:?}, written at {at:?}"));
    }
    for (key, version) in versions {
        let counted = counted.get(key).copied().unwrap_or_default();
        if counted != *version {
            return Err(format!("{key:?} has version {version} after {counted} puts"));
        }
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::truth::tests::put as change;
    use crate::truth::{Change, State};

    fn put(key: &'static str, value: &'static str, fate: Fate) -> Put {
        Put { key: key.into(), value: value.into(), fate }
    }

    fn history(written: &[(&'static str, &'static str)]) -> Vec<Change> {
        let mut changes = Vec::new();
        for (revision, (key, value)) in (1..).zip(written) {
            changes.push(change(&changes, revision, key, value));
        }
        changes
    }

    fn verdict(puts: &[Put], written: &[(&'static str, &'static str)]) -> Result<Tally, String> {
        let truth = Truth::new(0, State::new(), history(written)).unwrap();
        let versions = truth.state_at(truth.last()).into_iter().map(|(key, held)| (key, held.version)).collect();
        judge(puts, &truth, &versions)
    }

    #[test]
    fn puts_applied_as_they_were_answered_pass() {
        let puts = [
            put("a", "1", Fate::Acknowledged(1)),
            put("a", "2", Fate::Unknown),
            put("a", "3", Fate::Unknown),
            put("b", "4", Fate::NotApplied),
            put("b", "5", Fate::Acknowledged(3)),
        ];
        let tally = verdict(&puts, &[("a", "1"), ("a", "2"), ("b", "5")]).unwrap();
        let expected = Tally { acknowledged: 2, not_applied: 1, unknown_applied: 1, unknown_not_applied: 1 };
        assert_eq!(tally, expected);
    }

    #[test]
    fn a_put_applied_twice_is_caught() {
        for fate in [Fate::Acknowledged(1), Fate::Unknown, Fate::NotApplied] {
            let wrong = verdict(&[put("a", "1", fate)], &[("a", "1"), ("a", "1")]).unwrap_err();
            assert!(wrong.contains("twice"), "{wrong}");
        }
    }

    #[test]
    fn a_put_that_was_answered_wrongly_is_caught() {
        let written = [("a", "1"), ("a", "2")];
        let second = put("a", "2", Fate::Acknowledged(2));
        for fate in [Fate::NotApplied, Fate::Acknowledged(2), Fate::Acknowledged(7)] {
            verdict(&[put("a", "1", fate), second.clone()], &written).unwrap_err();
        }
        let lost = put("a", "3", Fate::Acknowledged(3));
        verdict(&[put("a", "1", Fate::Unknown), second.clone(), lost], &written).unwrap_err();
        verdict(&[second], &written).unwrap_err();
    }

    #[test]
    fn a_version_that_does_not_add_up_is_caught() {
        let truth = Truth::new(0, State::new(), history(&[("a", "1")])).unwrap();
        let versions = BTreeMap::from([(Bytes::from("a"), 2)]);
        let wrong = judge(&[put("a", "1", Fate::Acknowledged(1))], &truth, &versions).unwrap_err();
        assert!(wrong.contains("version 2"), "{wrong}");
    }
}
