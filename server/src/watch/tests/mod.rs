//! Watches on a real state machine, judged against the list of everything that changed.

mod compaction;
mod fixture;
mod random;
mod refusals;
mod slow;
mod validator;

use std::future::Future;
use std::time::Duration;

/// A generator whose seed the test's output shows, or that the environment gives to see a failure again.
pub(super) fn seeded() -> fastrand::Rng {
    let seed = std::env::var("D_ENGINE_TEST_SEED").ok().map(|seed| seed.parse().expect("a number"));
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("D_ENGINE_TEST_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), future).await.expect("in time")
}
