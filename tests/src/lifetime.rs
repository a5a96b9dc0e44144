//! Judges how long a key under a lease was there: never gone early, never back once gone, never there once due.
//!
//! Everything is measured on the test's own monotonic clock, to the disadvantage of the test: a promise counts from when
//! its request was *sent*, a finding from when its read *ended* if the key is gone, from when it *began* if it is there.
//!
//! ```text
//!   sent        answered                sent + TTL          due
//!    |-- grant ----|                        |                |
//!    |  the key must be found by what ends  |   either way   |  no read that begins here finds it
//! ```

use std::time::Duration;

/// A linearizable or lease read of the key, on any node, that was answered. Times since any common moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// When it was sent.
    pub begun: Duration,
    /// When it was answered.
    pub ended: Duration,
    /// Whether the key was there.
    pub there: bool,
    /// Who was asked what, for people.
    pub how: String,
}

/// A key and the promises about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lifetime {
    /// The key, for people.
    pub key: String,
    /// The last acknowledged promise that it stays: time of sending plus time to live.
    pub promised_until: Duration,
    /// From when on it must be gone, if the test can tell.
    pub due: Option<Duration>,
    /// Every read since it was put, in any order.
    pub looks: Vec<Look>,
}

impl Lifetime {
    /// When it was first seen to be gone: the end of that read.
    #[must_use]
    pub fn gone(&self) -> Option<Duration> {
        self.looks.iter().filter(|look| !look.there).map(|look| look.ended).min()
    }

    /// When the last read that found it began.
    #[must_use]
    pub fn last_seen(&self) -> Option<Duration> {
        self.looks.iter().filter(|look| look.there).map(|look| look.begun).max()
    }

    /// Judges every read.
    ///
    /// # Errors
    /// The first promise that was broken.
    pub fn judge(&self) -> Result<(), String> {
        let Self { key, promised_until, due, looks } = self;
        if let Some(early) = looks.iter().find(|look| !look.there && look.ended < *promised_until) {
            return Err(format!("{key} was promised until {promised_until:?} and is gone: {early:?}"));
        }
        let gone = self.gone();
        if let Some(back) = looks.iter().find(|look| look.there && gone.is_some_and(|gone| look.begun > gone)) {
            return Err(format!("{key} was gone at {gone:?} and is back: {back:?}"));
        }
        if let Some(late) = looks.iter().find(|look| look.there && due.is_some_and(|due| look.begun > due)) {
            return Err(format!("{key} was due at {due:?} and is still there: {late:?}"));
        }
        Ok(())
    }
}

/// The time between `from` and `to` in which store time may have stood still, or its passing may have been forgotten:
/// whatever lies between two acknowledged writes that are more than `steady` apart. Each write carried the store time
/// into the log, so that no change of leader can lose what lies before it.
#[must_use]
pub fn standstill(writes: &[Duration], from: Duration, to: Duration, steady: Duration) -> Duration {
    let within = writes.iter().copied().filter(|write| *write > from && *write < to);
    let ends = within.chain([to]);
    let (total, _) = ends.fold((Duration::ZERO, from), |(total, last), next| {
        let gap = next.saturating_sub(last);
        (if gap > steady { total + gap } else { total }, next)
    });
    total
}

/// From when on a key must be gone whose last promise was answered at `answered`: its time to live later, plus the time
/// that stood still until then, plus a margin. `None` if that lies beyond the last write, where nobody can tell.
#[must_use]
pub fn due(
    writes: &[Duration],
    answered: Duration,
    ttl: Duration,
    steady: Duration,
    margin: Duration,
) -> Option<Duration> {
    let last = writes.iter().max().copied()?;
    let mut due = answered + ttl + margin;
    loop {
        if due > last {
            return None;
        }
        let later = answered + ttl + margin + standstill(writes, answered, due, steady);
        if later <= due {
            return Some(due);
        }
        due = later;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn look(begun: u64, ended: u64, there: bool) -> Look {
        Look { begun: s(begun), ended: s(ended), there, how: "planted".to_owned() }
    }

    fn verdict(looks: Vec<Look>) -> Result<(), String> {
        Lifetime { key: "k".to_owned(), promised_until: s(10), due: Some(s(12)), looks }.judge()
    }

    #[test]
    fn a_right_lifetime_passes() {
        verdict(vec![look(1, 2, true), look(8, 11, false), look(10, 11, true), look(12, 13, false)]).unwrap();
        verdict(vec![look(12, 14, true), look(13, 15, false)]).unwrap();
    }

    #[test]
    fn an_early_end_is_caught() {
        assert!(verdict(vec![look(1, 9, false)]).unwrap_err().contains("promised"));
    }

    #[test]
    fn a_return_is_caught() {
        assert!(verdict(vec![look(10, 11, false), look(12, 13, true)]).unwrap_err().contains("is back"));
    }

    #[test]
    fn an_overdue_key_is_caught() {
        assert!(verdict(vec![look(13, 14, true)]).unwrap_err().contains("still there"));
    }

    #[test]
    fn time_between_writes_that_follow_each_other_closely_is_no_standstill() {
        let writes = [1, 2, 3, 7, 8, 9].map(s);
        assert_eq!(standstill(&writes, s(1), s(9), s(1)), s(4));
        assert_eq!(standstill(&writes, s(1), s(20), s(1)), s(4) + s(11));
        assert_eq!(standstill(&[], s(3), s(9), s(1)), s(6));
    }

    #[test]
    fn what_stood_still_is_added_to_when_a_key_is_due() {
        let steady: Vec<_> = (0..40).map(s).collect();
        assert_eq!(due(&steady, s(5), s(3), s(1), s(2)), Some(s(10)));
        let broken: Vec<_> = (0..8).chain(20..40).map(s).collect();
        assert_eq!(due(&broken, s(5), s(3), s(1), s(2)), Some(s(10) + s(13)));
        assert_eq!(due(&broken, s(38), s(3), s(1), s(2)), None);
    }
}
