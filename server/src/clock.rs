//! The only clock of the server: monotonic, and counting time the machine was suspended.
//!
//! A lease measured by a clock that stands still during suspend outlives its promise, so every lease, deadline of a
//! lease and store time comes from here. Wall clocks play no part in any decision.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A moment, as elapsed time since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(Duration);

impl Moment {
    /// Now. `CLOCK_BOOTTIME` on Linux; elsewhere the closest the system has.
    #[must_use]
    pub fn now() -> Self {
        #[cfg(target_os = "linux")]
        let clock = ClockId::Boottime;
        #[cfg(not(target_os = "linux"))]
        let clock = ClockId::Monotonic;
        let time = clock_gettime(clock);
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
        Self(Duration::new(seconds, nanoseconds))
    }

    /// Time from `earlier` to this moment; zero if it is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for Moment {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

impl std::ops::Sub<Duration> for Moment {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(duration))
    }
}
/// The wall clock, as the time since 1970: to date what people keep, such as a backup. Nothing may follow from it.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this module is where clocks are read")]
pub fn unix_time() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}
