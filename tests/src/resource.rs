//! What a lock guards, and whether the lock did: a resource that remembers the greatest fencing token it was shown, and
//! the tenures of all who held the lock. Pure.

use std::fmt;
use std::time::Duration;

use d_engine_client::FencingToken;

/// A resource that accepts no token smaller than one it has seen.
#[derive(Clone, Debug, Default)]
pub struct Resource {
    accepted: Vec<(FencingToken, String)>,
    refused: usize,
}

/// The token was overtaken by a greater one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fenced {
    /// The greatest token the resource has seen.
    pub by: FencingToken,
}

impl Resource {
    /// Writes under a token.
    ///
    /// # Errors
    /// `Fenced`, if a greater one was shown before; nothing is written then.
    pub fn write(&mut self, token: FencingToken, what: impl Into<String>) -> Result<(), Fenced> {
        match self.accepted.last() {
            Some((greatest, _)) if *greatest > token => {
                self.refused += 1;
                Err(Fenced { by: *greatest })
            }
            _ => {
                self.accepted.push((token, what.into()));
                Ok(())
            }
        }
    }

    /// Everything that was written, in order.
    #[must_use]
    pub fn accepted(&self) -> &[(FencingToken, String)] {
        &self.accepted
    }

    /// How often somebody was refused.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.refused
    }
}

/// The time in which somebody believed to hold the lock, with reason: from the moment that acquiring it returned to the
/// last moment at which a look at the guard said that it is held. On the clock of the machine, which all share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenure {
    /// Who, for people.
    pub holder: String,
    /// Its token.
    pub token: FencingToken,
    /// When it was acquired.
    pub acquired: Duration,
    /// When it was last said to be held.
    pub held: Duration,
}

impl fmt::Display for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {:?} to {:?} with token {}", self.holder, self.acquired, self.held, self.token)
    }
}

/// Whether at most one held the lock at each moment, and later holders had greater tokens.
///
/// # Errors
/// Two tenures that cannot both be.
pub fn judge(tenures: &[Tenure]) -> Result<(), String> {
    let mut ordered: Vec<&Tenure> = tenures.iter().collect();
    ordered.sort_by_key(|tenure| tenure.acquired);
    for pair in ordered.windows(2) {
        let (one, next) = (pair[0], pair[1]);
        if next.acquired <= one.held {
            return Err(format!("two hold the lock: {one}, and {next}"));
        }
        if next.token <= one.token {
            return Err(format!("a later holder has no greater token: {one}, then {next}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use d_engine_client::{Epoch, Revision};

    use super::*;

    fn token(revision: u64) -> FencingToken {
        FencingToken { epoch: Epoch(0), revision: Revision(revision) }
    }

    fn tenure(revision: u64, acquired: u64, held: u64) -> Tenure {
        let (acquired, held) = (Duration::from_secs(acquired), Duration::from_secs(held));
        Tenure { holder: "planted".to_owned(), token: token(revision), acquired, held }
    }

    #[test]
    fn the_resource_refuses_who_was_overtaken() {
        let mut resource = Resource::default();
        resource.write(token(3), "a").unwrap();
        resource.write(token(3), "b").unwrap();
        resource.write(token(5), "c").unwrap();
        assert_eq!(resource.write(token(3), "d"), Err(Fenced { by: token(5) }));
        resource.write(token(5), "e").unwrap();
        let written: Vec<_> = resource.accepted().iter().map(|(_, what)| &**what).collect();
        assert_eq!((written, resource.refused()), (vec!["a", "b", "c", "e"], 1));
    }

    #[test]
    fn tenures_one_after_the_other_pass() {
        judge(&[tenure(4, 5, 6), tenure(1, 0, 2), tenure(9, 7, 7)]).unwrap();
    }

    #[test]
    fn two_holders_at_once_are_caught() {
        assert!(judge(&[tenure(1, 0, 5), tenure(2, 4, 6)]).unwrap_err().contains("two hold"));
        assert!(judge(&[tenure(1, 0, 9), tenure(2, 4, 6)]).unwrap_err().contains("two hold"));
    }

    #[test]
    fn tokens_that_do_not_grow_are_caught() {
        assert!(judge(&[tenure(2, 0, 1), tenure(2, 4, 6)]).unwrap_err().contains("no greater"));
        assert!(judge(&[tenure(3, 0, 1), tenure(2, 4, 6)]).unwrap_err().contains("no greater"));
    }
}
