//! How long a key lives.

use std::time::Duration;

/// How long a key lives: a [`Duration`], or a number of whole seconds. What is below a millisecond counts as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeToLive(pub Duration);

impl TimeToLive {
    /// As it travels, where 0 would stand for no end.
    pub fn as_ms(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX).max(1)
    }
}

impl From<Duration> for TimeToLive {
    fn from(time: Duration) -> Self {
        Self(time)
    }
}

impl From<u64> for TimeToLive {
    fn from(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}
