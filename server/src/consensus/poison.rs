//! What makes going on impossible: the first reason is kept, and whoever looks finds it.
//!
//! A task or thread that the node relies on runs under a guard. Should it panic, what it did for everybody is done no
//! more, although the rest would go on answering: that is made the node's failure, which ends it. The call of one
//! client has no guard; its panic ends the connection it came by, and nothing else.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::FutureExt;
use tokio::sync::watch;

use super::handle::StartError;

tokio::task_local! {
    /// Of the node that the current task belongs to, for tasks that openraft starts: it has no way to hand it on.
    static OF_THIS_TASK: Poison;
}

/// The failure of one node, while there is none. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Poison {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Whether there is a failure, for those who look all the time: every read of an embedded client.
    failed: AtomicBool,
    failure: watch::Sender<Option<StartError>>,
}

impl Poison {
    /// Makes `reason` the node's failure, unless it has failed before. What ends because of it ends also when the node
    /// was told to stop, which is no failure otherwise.
    pub fn fail(&self, reason: StartError) {
        self.shared.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                if !matches!(reason, StartError::Stopped) {
                    tracing::error!(%reason, "the node cannot go on");
                    self.shared.failed.store(true, Ordering::Release);
                }
                *failure = Some(reason);
            }
            first
        });
    }

    /// Follows the failure.
    #[must_use]
    pub fn failure(&self) -> watch::Receiver<Option<StartError>> {
        self.shared.failure.subscribe()
    }

    /// Whether there is a failure. Takes no lock.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::Acquire)
    }

    /// Runs `future`; its panic is the node's failure, under the name `task`.
    pub fn guard<F: Future>(&self, task: &'static str, future: F) -> impl Future<Output = F::Output> + use<F> {
        let poison = self.clone();
        async move {
            let mut future = pin!(future);
            let polls = poll_fn(|context| {
                pass(task);
                future.as_mut().poll(context)
            });
            // Nothing of what it leaves behind is used any more.
            match AssertUnwindSafe(polls).catch_unwind().await {
                Ok(output) => output,
                Err(panic) => {
                    poison.fail(StartError::Panicked { task });
                    resume_unwind(panic)
                }
            }
        }
    }

    /// As [`guard`](Self::guard), for the thread that holds the result.
    pub(super) fn guard_thread(&self, task: &'static str) -> ThreadGuard {
        ThreadGuard { poison: self.clone(), task }
    }

    /// Runs `future`, and guards every task of openraft that it starts, and those that these start.
    pub(super) fn guard_openraft<F: Future>(self, future: F) -> impl Future<Output = F::Output> {
        OF_THIS_TASK.scope(self, future)
    }

    /// The node's that runs the current task, if that was started by [`guard_openraft`](Self::guard_openraft).
    pub(super) fn of_this_task() -> Option<Self> {
        OF_THIS_TASK.try_with(Self::clone).ok()
    }
}

/// Turns the panic of a thread into the node's failure.
pub(super) struct ThreadGuard {
    poison: Poison,
    task: &'static str,
}

impl ThreadGuard {
    /// To be called at every turn of the thread: a test may have it panic here.
    pub(super) fn pass(&self) {
        pass(self.task);
    }
}

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.poison.fail(StartError::Panicked { task: self.task });
        }
    }
}

#[cfg_attr(not(feature = "fault-points"), expect(unused_variables, reason = "only a test has it panic"))]
fn pass(task: &'static str) {
    #[cfg(feature = "fault-points")]
    crate::faults::in_task(task);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_panic_is_the_failure_and_a_task_that_ends_well_is_none() {
        let poison = Poison::default();
        tokio::spawn(poison.guard("well", async {})).await.unwrap();
        assert!(poison.failure().borrow().is_none());
        for task in ["first", "second"] {
            tokio::spawn(poison.guard(task, async { panic!("as this test wants it") })).await.unwrap_err();
        }
        let failure = poison.failure().borrow().clone();
        assert!(matches!(failure, Some(StartError::Panicked { task: "first" })), "{failure:?}");
    }

    #[test]
    fn the_panic_of_a_thread_is_a_failure() {
        let poison = Poison::default();
        let guard = poison.guard_thread("thread");
        std::thread::spawn(move || {
            let _guard = guard;
            panic!("as this test wants it");
        })
        .join()
        .unwrap_err();
        let failure = poison.failure().borrow().clone();
        assert!(matches!(failure, Some(StartError::Panicked { task: "thread" })), "{failure:?}");
    }
}
