//! Until when a call may last. Knows nothing of what it waits for.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::client::Shared;
use crate::error::Error;
use crate::retry::Failure;

/// The deadline of a call, and what may cancel it before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Until<'a> {
    pub(crate) deadline: Instant,
    cancel: Option<&'a CancellationToken>,
}

/// Why waiting came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Deadline,
    /// The client was closed.
    Closed,
    Cancelled,
}

impl<'a> Until<'a> {
    pub(crate) fn new(deadline: Instant, cancel: Option<&'a CancellationToken>) -> Self {
        Self { deadline, cancel }
    }

    /// The same, but not after `deadline`.
    pub(crate) fn sooner(self, deadline: Instant) -> Self {
        Self { deadline: self.deadline.min(deadline), ..self }
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.is_some_and(CancellationToken::is_cancelled)
    }

    /// Ends when the call is cancelled; never, if nothing can cancel it.
    pub(crate) async fn cancelled(&self) {
        match self.cancel {
            Some(cancel) => cancel.cancelled().await,
            None => std::future::pending().await,
        }
    }
}

impl From<Instant> for Until<'_> {
    fn from(deadline: Instant) -> Self {
        Self::new(deadline, None)
    }
}

impl Ended {
    /// What that makes of an attempt that took `after` until now.
    pub(crate) fn failure(self, sent: bool, after: Duration) -> Failure {
        match self {
            Self::Deadline => Failure::Silent { sent, after },
            Self::Closed => Failure::Closed { sent },
            Self::Cancelled => Failure::Cancelled { sent },
        }
    }

    /// The error of a call that waited to be sent; `late` is that of one whose time is up.
    pub(crate) fn error(self, operation: &'static str, late: impl FnOnce() -> Error) -> Error {
        match self {
            Self::Deadline => late(),
            Self::Closed => Error::closed(operation),
            Self::Cancelled => Error::cancelled(operation),
        }
    }
}

impl Shared {
    /// Waits for `work`, but no longer than the call may last.
    pub(crate) async fn wait<T>(&self, until: &Until<'_>, work: impl Future<Output = T>) -> Result<T, Ended> {
        tokio::select! {
            biased;
            result = work => Ok(result),
            () = self.closed.cancelled() => Err(Ended::Closed),
            () = until.cancelled() => Err(Ended::Cancelled),
            () = tokio::time::sleep_until(until.deadline) => Err(Ended::Deadline),
        }
    }
}
