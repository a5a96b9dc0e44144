//! Callers that go on while something is done to the cluster, and what they felt of it: every call with its moment, so
//! that it is counted to what went on at that time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use d_engine_client::{Client, Consistency};
use tokio::task::JoinHandle;

use crate::fill;

/// What a caller repeats, each time with a key of its choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Calls {
    Puts,
    /// A put and a linearizable get in turn.
    PutsAndGets,
}

/// A call that has ended.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    began: Instant,
    ended: Instant,
    failed: bool,
}

/// Something that went on between two moments.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) name: &'static str,
    pub(crate) from: Instant,
    pub(crate) to: Instant,
}

/// Callers at work, each with one call in flight.
pub(crate) struct Steady {
    callers: Vec<JoinHandle<Vec<Call>>>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
}

impl Steady {
    /// Sets callers to work on the first `keys` keys of [`fill`], with values of so many bytes.
    pub(crate) fn start(client: &Client, callers: usize, calls: Calls, keys: u64, value_bytes: usize) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let call = |_| {
            let (client, stop, done) = (client.clone(), stop.clone(), done.clone());
            tokio::spawn(async move {
                let value = vec![b'x'; value_bytes];
                let mut ended = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let key = fill::key(fastrand::u64(..keys));
                    let reads = calls == Calls::PutsAndGets && ended.len() % 2 == 1;
                    let began = Instant::now();
                    let error = match reads {
                        false => client.put(key, value.clone()).await.err(),
                        true => client.get(key).consistency(Consistency::Linearizable).await.err(),
                    };
                    ended.push(Call { began, ended: Instant::now(), failed: error.is_some() });
                    done.fetch_add(1, Ordering::Relaxed);
                    if let Some(error) = error {
                        eprintln!("{}: {error}", if reads { "get" } else { "put" });
                    }
                }
                ended
            })
        };
        Self { callers: (0..callers).map(call).collect(), stop: stop.clone(), done: done.clone() }
    }

    /// Calls that have ended so far.
    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends the work. Every call that was begun is in the answer.
    pub(crate) async fn finish(self) -> Vec<Call> {
        self.stop.store(true, Ordering::Relaxed);
        let mut calls = Vec::new();
        for caller in self.callers {
            calls.extend(caller.await.expect("a caller does not panic"));
        }
        calls
    }

    /// Drops the work, and every call that is under way.
    pub(crate) fn abandon(self) {
        for caller in self.callers {
            caller.abort();
        }
    }
}

/// A row for each name among the windows, in their order. A call belongs to every window in which it was under way; where
/// windows overlap, to the one that comes last. Calls outside of all windows are left out.
pub(crate) fn table(title: &str, calls: &[Call], windows: &[Window]) -> Table {
    let stretches = stretches(windows);
    let mut names: Vec<&str> = Vec::new();
    for window in windows {
        if !names.contains(&window.name) {
            names.push(window.name);
        }
    }
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([title, "seconds", "calls", "per second", "p50 ms", "p99 ms", "worst ms", "failed"]);
    for name in names {
        let own: Vec<_> = stretches.iter().filter(|stretch| stretch.name == name).collect();
        let seconds: f64 = own.iter().map(|stretch| (stretch.to - stretch.from).as_secs_f64()).sum();
        let within = |call: &&Call| own.iter().any(|stretch| call.began < stretch.to && call.ended > stretch.from);
        let mut took: Vec<Duration> = Vec::new();
        let (mut ended, mut failed) = (0_u64, 0_u64);
        for call in calls.iter().filter(within) {
            took.push(call.ended - call.began);
            failed += u64::from(call.failed);
            ended += u64::from(own.iter().any(|stretch| (stretch.from..stretch.to).contains(&call.ended)));
        }
        took.sort_unstable();
        table.add_row([
            name.to_owned(),
            format!("{seconds:.1}"),
            took.len().to_string(),
            format!("{:.0}", ended as f64 / seconds),
            milliseconds(percentile(&took, 50)),
            milliseconds(percentile(&took, 99)),
            milliseconds(took.last().copied()),
            failed.to_string(),
        ]);
    }
    table
}

/// The value that so many of a hundred, of what is sorted, do not exceed.
pub(crate) fn percentile<T: Copy>(sorted: &[T], percent: usize) -> Option<T> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

fn milliseconds(time: Option<Duration>) -> String {
    time.map_or(String::new(), |time| format!("{:.1}", time.as_secs_f64() * 1e3))
}

/// The windows without overlaps: of two that cover a moment, the one that comes last has it.
fn stretches(windows: &[Window]) -> Vec<Window> {
    let mut moments: Vec<Instant> = windows.iter().flat_map(|window| [window.from, window.to]).collect();
    moments.sort_unstable();
    moments.dedup();
    let covering = |pair: &[Instant]| {
        let window = windows.iter().rev().find(|window| window.from <= pair[0] && pair[1] <= window.to)?;
        Some(Window { name: window.name, from: pair[0], to: pair[1] })
    };
    moments.windows(2).filter_map(covering).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_windows_that_overlap_the_last_one_has_the_moment() {
        let zero = Instant::now();
        let at = |second| zero + Duration::from_secs(second);
        let windows = [("calm", 0, 10), ("built", 4, 6), ("sent", 5, 12)].map(|(name, from, to)| Window {
            name,
            from: at(from),
            to: at(to),
        });
        let found: Vec<_> = stretches(&windows).iter().map(|part| (part.name, part.from, part.to)).collect();
        let expected = [("calm", 0, 4), ("built", 4, 5), ("sent", 5, 6), ("sent", 6, 10), ("sent", 10, 12)];
        assert_eq!(found, expected.map(|(name, from, to)| (name, at(from), at(to))));
    }

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let sorted: Vec<u32> = (1..=200).collect();
        assert_eq!([50, 99, 100].map(|percent| percentile(&sorted, percent)), [Some(100), Some(198), Some(200)]);
        assert_eq!(percentile(&sorted[..1], 1), Some(1));
        assert_eq!(percentile::<u32>(&[], 50), None);
    }
}
