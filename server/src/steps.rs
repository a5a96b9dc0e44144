//! The steps of what must survive a crash between any two of them, by name, so that a test can have it end there.
//!
//! Outside of tests nothing happens here. A unit test has a step fail, which leaves the disk as a crash would: whoever
//! passes steps must tidy up at the next beginning, never at the failure. With the feature `fault-points` a process of
//! the tests dies there.

use crate::storage::StorageError;

/// Passes a step.
///
/// # Errors
/// Only in tests.
#[cfg_attr(not(any(test, feature = "fault-points")), expect(clippy::unnecessary_wraps, reason = "tests have it fail"))]
pub(crate) fn passed(step: &'static str) -> Result<(), StorageError> {
    #[cfg(feature = "fault-points")]
    crate::faults::die_at(step);
    #[cfg(test)]
    tests::pass(step)?;
    #[cfg(not(any(test, feature = "fault-points")))]
    let _ = step;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::RefCell;

    use super::*;

    thread_local! {
        /// Steps that this thread may still pass, and those it passed.
        static STATE: RefCell<(usize, Vec<&'static str>)> = const { RefCell::new((usize::MAX, Vec::new())) };
    }

    pub(super) fn pass(step: &'static str) -> Result<(), StorageError> {
        STATE.with_borrow_mut(|(left, passed)| {
            if *left == 0 {
                let message = "this test ends here".to_owned();
                return Err(StorageError::Io { action: "pass", path: step.into(), message });
            }
            *left -= 1;
            passed.push(step);
            Ok(())
        })
    }

    /// Runs what passes steps of this thread, and has it fail at the one after `passing` others. Answers the steps it
    /// passed.
    pub(crate) fn interrupted<T>(passing: usize, work: impl FnOnce() -> T) -> (T, Vec<&'static str>) {
        STATE.set((passing, Vec::new()));
        let result = work();
        (result, STATE.replace((usize::MAX, Vec::new())).1)
    }
}
