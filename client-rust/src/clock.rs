//! The clock by which the client judges leases and sessions: monotonic, and counting time the machine was suspended.
//!
//! A process that was stopped, or a laptop that slept, must see its lease as lost the moment it resumes. The clock of
//! timers does not promise that, so timers only wake; what holds is read here. Wall clocks play no part.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A moment, as elapsed time since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Moment(Duration);

impl Moment {
    /// Now. `CLOCK_BOOTTIME` on Linux; elsewhere the closest the system has.
    pub(crate) fn now() -> Self {
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
    pub(crate) fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for Moment {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}
