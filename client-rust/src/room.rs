//! How much a client has in flight: calls, and the bytes of their requests. Both are bounded, so that callers who are
//! faster than the cluster wait instead of filling the memory.
//!
//! The background work of the client takes no room: calls that hold some wait for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{AcquireError, Semaphore, SemaphorePermit, TryAcquireError};

use crate::client::Shared;
use crate::error::{Error, ErrorKind, Outcome};
use crate::until::Until;

/// The room of one client.
#[derive(Debug)]
pub(crate) struct Room {
    calls: Semaphore,
    calls_max: u32,
    bytes: Semaphore,
    bytes_max: u32,
    /// No further call gets in.
    shut: AtomicBool,
}

/// What one call takes, until dropped.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    _call: SemaphorePermit<'a>,
    _bytes: SemaphorePermit<'a>,
}

impl Room {
    pub(crate) fn new(calls_max: u32, bytes_max: u32) -> Self {
        let permits = |max: u32| Semaphore::new(usize::try_from(max).unwrap_or(Semaphore::MAX_PERMITS));
        Self {
            calls: permits(calls_max),
            calls_max,
            bytes: permits(bytes_max),
            bytes_max,
            shut: AtomicBool::new(false),
        }
    }

    /// Lets no further call in; those that wait for room get none.
    pub(crate) fn shut(&self) {
        self.shut.store(true, Ordering::Release);
        self.calls.close();
        self.bytes.close();
    }

    /// Lets no further call in, and waits for those in flight, for `patience` at most. True if all have ended.
    pub(crate) async fn empty(&self, patience: Duration) -> bool {
        self.shut.store(true, Ordering::Release);
        let all = tokio::time::timeout(patience, self.calls.acquire_many(self.calls_max)).await;
        self.shut();
        // Also when somebody else did this at the same time: whoever comes second finds the room closed.
        matches!(all, Ok(Ok(_)))
            || self.calls.available_permits() == usize::try_from(self.calls_max).unwrap_or_default()
    }
}

/// Takes permits, at once if there are enough.
async fn take<'a>(
    shared: &Shared,
    semaphore: &'a Semaphore,
    permits: u32,
    until: &Until<'_>,
    operation: &'static str,
    full: impl FnOnce() -> String,
) -> Result<SemaphorePermit<'a>, Error> {
    match semaphore.try_acquire_many(permits) {
        Ok(permit) => return Ok(permit),
        Err(TryAcquireError::Closed) => return Err(Error::closed(operation)),
        Err(TryAcquireError::NoPermits) => {}
    }
    let late = || Error::new(operation, ErrorKind::ResourceExhausted, Outcome::NotApplied, full());
    match shared.wait(until, semaphore.acquire_many(permits)).await {
        Ok(permit) => permit.map_err(|AcquireError { .. }| Error::closed(operation)),
        Err(ended) => Err(ended.error(operation, late)),
    }
}

impl Shared {
    /// Waits until there is room for one more call with a request of `bytes`.
    pub(crate) async fn place(
        &self,
        operation: &'static str,
        bytes: usize,
        until: &Until<'_>,
    ) -> Result<Place<'_>, Error> {
        let room = &self.room;
        if room.shut.load(Ordering::Acquire) {
            return Err(Error::closed(operation));
        }
        let calls_full =
            || format!("calls_in_flight_max: {} calls are in flight, and none ended in time", room.calls_max);
        let call = take(self, &room.calls, 1, until, operation, calls_full).await?;
        // A request larger than all of the room has it alone.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(room.bytes_max);
        let bytes_full = || {
            let max = room.bytes_max;
            format!("bytes_in_flight_max: requests of {max} bytes are in flight, and too few of them ended in time")
        };
        let bytes = take(self, &room.bytes, bytes, until, operation, bytes_full).await?;
        Ok(Place { _call: call, _bytes: bytes })
    }
}
