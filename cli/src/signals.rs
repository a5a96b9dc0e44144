//! Signals that ask the program to end, for commands that hold something while they run.
//!
//! A signal that was ignored when the program started, as `nohup` arranges, stays ignored.

use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// The number of SIGINT, which Ctrl-C sends to all who share the terminal.
pub(crate) const INTERRUPT: u8 = 2;

/// What asks for an end, with the number that exit codes are made of.
const KINDS: [(SignalKind, u8); 3] =
    [(SignalKind::hangup(), 1), (SignalKind::interrupt(), INTERRUPT), (SignalKind::terminate(), 15)];

/// From here on these signals no longer end the program by themselves.
#[derive(Debug)]
pub(crate) struct EndSignals(Vec<(Signal, u8)>);

impl EndSignals {
    /// Listens. Within a runtime.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let ignored = ignored();
        let listened = KINDS.into_iter().filter(|(_, number)| ignored & (1 << (number - 1)) == 0);
        let listened = listened.map(|(kind, number)| Ok((signal(kind)?, number)));
        let listened: std::io::Result<Vec<_>> = listened.collect();
        Ok(Self(listened.map_err(Failure::io("cannot listen for signals"))?))
    }

    /// The number of the next one. Dropping the future loses none.
    pub(crate) async fn next(&mut self) -> u8 {
        std::future::poll_fn(|context| {
            let mut arrived = self.0.iter_mut().filter_map(|(signal, number)| {
                // Ready without a signal there is none to come any more.
                matches!(signal.poll_recv(context), Poll::Ready(Some(()))).then_some(*number)
            });
            arrived.next().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// The signals that are ignored, as bits from that of signal 1 on. None where the system does not tell.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}
