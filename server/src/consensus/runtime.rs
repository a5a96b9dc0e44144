//! The runtime openraft runs on: tokio's, but with the server's clock.
//!
//! openraft measures its leases with the runtime's `Instant`. Tokio's stands still while the machine is suspended,
//! so a suspended leader would wake up believing in a lease that its followers saw expire.

use std::future::Future;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::time::Duration;

use openraft::OptionalSend;
use openraft_rt::AsyncRuntime;
use openraft_rt_tokio::TokioRuntime;

use super::poison::Poison;
use crate::clock::Moment;

/// Tokio with [`Moment`] as its clock.
#[derive(Debug)]
pub(super) struct Runtime(TokioRuntime);

/// A [`Moment`], as openraft wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RaftInstant(pub(super) Moment);

impl RaftInstant {
    /// Tokio's instant that is as far from its now as this one from ours.
    fn to_tokio(self) -> tokio::time::Instant {
        tokio::time::Instant::now() + self.0.since(Moment::now())
    }
}

impl openraft::Instant for RaftInstant {
    fn now() -> Self {
        Self(Moment::now())
    }
}

impl Add<Duration> for RaftInstant {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0 + duration)
    }
}

impl AddAssign<Duration> for RaftInstant {
    fn add_assign(&mut self, duration: Duration) {
        self.0 = self.0 + duration;
    }
}

impl Sub<Duration> for RaftInstant {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0 - duration)
    }
}

impl Sub for RaftInstant {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.0.since(earlier.0)
    }
}

impl SubAssign<Duration> for RaftInstant {
    fn sub_assign(&mut self, duration: Duration) {
        self.0 = self.0 - duration;
    }
}

impl AsyncRuntime for Runtime {
    type JoinError = <TokioRuntime as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <TokioRuntime as AsyncRuntime>::Sleep;
    type Instant = RaftInstant;
    type TimeoutError = <TokioRuntime as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = <TokioRuntime as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = <TokioRuntime as AsyncRuntime>::ThreadLocalRng;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = <TokioRuntime as AsyncRuntime>::Watch;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        match Poison::of_this_task() {
            Some(poison) => {
                let guarded = poison.guard("a task of openraft", future);
                TokioRuntime::spawn(poison.guard_openraft(guarded))
            }
            None => TokioRuntime::spawn(future),
        }
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        TokioRuntime::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        tokio::time::sleep_until(deadline.to_tokio())
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: Self::Instant, future: F) -> Self::Timeout<R, F> {
        tokio::time::timeout_at(deadline.to_tokio(), future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        TokioRuntime::is_panic(join_error)
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        TokioRuntime::thread_rng()
    }

    fn new(threads: usize) -> Self {
        Self(TokioRuntime::new(threads))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }
}
