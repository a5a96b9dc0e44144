//! The number that makes a lock safe: what it guards refuses whoever shows a smaller one than it has seen.

use std::fmt;
use std::str::FromStr;

use d_engine_proto::{Epoch, Revision};

/// Which holder of a lock, or leader of an election, came later.
///
/// Nobody can be certain to hold a lock at the very moment its request arrives somewhere: a process may be paused in
/// between for as long as it takes others to get the lock. So the holder sends its token along, and the resource keeps
/// the greatest it has seen and refuses smaller ones. Tokens of one name grow from holder to holder, also over a restore
/// of the cluster.
///
/// Written as `epoch.revision`; to be compared as numbers, never as text.
///
/// ```
/// use d_engine_client::{Epoch, FencingToken, Revision};
///
/// let earlier = FencingToken { epoch: Epoch(1), revision: Revision(9) };
/// let later: FencingToken = "1.10".parse().unwrap();
/// assert!(earlier < later);
/// assert_eq!(earlier.to_string(), "1.9");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FencingToken {
    // The derived order compares the fields in this order.
    /// How often the cluster was restored from a snapshot.
    pub epoch: Epoch,
    /// Revision at which the holder joined the queue.
    pub revision: Revision,
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.revision)
    }
}

/// The text is not a fencing token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidFencingToken(String);

impl fmt::Display for InvalidFencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a fencing token: expected epoch.revision, such as 1.42", self.0)
    }
}

impl std::error::Error for InvalidFencingToken {}

impl FromStr for FencingToken {
    type Err = InvalidFencingToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The parser of numbers accepts a sign, which nobody writes here.
        let number =
            |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten();
        let parsed = text.split_once('.').and_then(|(epoch, revision)| {
            Some(Self { epoch: Epoch(number(epoch)?), revision: Revision(number(revision)?) })
        });
        parsed.ok_or_else(|| InvalidFencingToken(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_epoch_outranks_any_revision() {
        let token = |epoch, revision| FencingToken { epoch: Epoch(epoch), revision: Revision(revision) };
        let ascending = [token(0, 0), token(0, 9), token(0, 10), token(1, 1), token(1, u64::MAX), token(2, 0)];
        assert!(ascending.is_sorted_by(|earlier, later| earlier < later));
        for token in ascending {
            assert_eq!(token.to_string().parse(), Ok(token));
        }
    }

    #[test]
    fn what_is_no_token_is_refused() {
        for text in ["", "1", "1.", ".1", "1.2.3", "-1.2", "1.+2", " 1.2", "1.99999999999999999999", "a.b"] {
            assert_eq!(text.parse::<FencingToken>(), Err(InvalidFencingToken(text.to_owned())), "{text:?}");
        }
    }
}
