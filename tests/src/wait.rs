//! Waiting for a condition instead of for a time: the only place of the tests that lets time pass.

use std::time::{Duration, Instant};

/// How long the tests wait for what should happen soon. Far longer than any machine needs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks `condition` again and again until it answers with a value, which is returned.
///
/// # Panics
/// When `patience` is over; the message names `what` was awaited.
pub async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    patience: Duration,
    mut condition: impl FnMut() -> F,
) -> T {
    let start = Instant::now();
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    loop {
        pace.tick().await;
        if let Some(value) = condition().await {
            return value;
        }
        assert!(start.elapsed() < patience, "gave up after {patience:?} waiting for {what}");
    }
}

/// Lets `time` pass, where passing time is the fault itself: a process that stays stopped, a link that stays cut.
pub async fn pass(time: Duration) {
    tokio::time::sleep(time).await; // tidy: the one exemption
}
