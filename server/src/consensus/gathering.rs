//! The answers to many proposals of one caller, gathered until it takes them: those of one log entry wake it once.
//!
//! Knows nothing of commands. It also keeps what the proposer asks before it puts a command into an entry: whether
//! anybody still waits for the answer, and whether the command was withdrawn.

use std::collections::BTreeSet;
use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

use super::proposer::Answer;

/// Names a proposal to whoever made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// What the caller calls it.
    pub id: u64,
    /// Ascends from proposal to proposal of one [`Gathering`].
    pub serial: u64,
}

/// Where the answers to a caller's proposals come together. Once it is dropped, what waits in the queue is not proposed
/// any more.
#[derive(Debug, Default)]
pub struct Gathering(Arc<Shared>);

impl Gathering {
    /// Takes the answers that are there, appending them to `answers`; or sees to it that the task is woken by the next.
    pub fn poll_take(&self, context: &mut Context<'_>, answers: &mut Vec<(Ticket, Answer)>) -> Poll<()> {
        let mut state = self.0.state.lock();
        if state.answers.is_empty() {
            match &mut state.waker {
                Some(waker) => waker.clone_from(context.waker()),
                waker => *waker = Some(context.waker().clone()),
            }
            return Poll::Pending;
        }
        // Whoever takes many gets them without a copy.
        if answers.is_empty() {
            mem::swap(answers, &mut state.answers);
        } else {
            answers.append(&mut state.answers);
        }
        Poll::Ready(())
    }

    /// Gives memory back that no answer is in.
    pub fn shrink(&self) {
        self.0.state.lock().answers.shrink_to_fit();
    }

    /// Takes a proposal back, unless a log entry may hold it already. If it succeeds the command is never proposed, and
    /// has no answer.
    #[must_use]
    pub fn withdraw(&self, serial: u64) -> bool {
        let mut state = self.0.state.lock();
        // Also false for one that was refused, whose answer waits to be taken.
        let waits = state.taken.is_none_or(|taken| serial > taken);
        if waits {
            state.withdrawn.insert(serial);
        }
        waits
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        let (answers, waker) = (mem::take(&mut state.answers), state.waker.take());
        drop(state);
        drop((answers, waker));
    }
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    answers: Vec<(Ticket, Answer)>,
    waker: Option<Waker>,
    /// The last proposal that left the queue: the proposals of one caller leave it in the order of their serials.
    taken: Option<u64>,
    /// Each greater than `taken`, as soon as another one leaves.
    withdrawn: BTreeSet<u64>,
    closed: bool,
}

impl Shared {
    /// Appends answers, and wakes who waits for them.
    pub(super) fn answer(&self, answers: impl Iterator<Item = (Ticket, Answer)>) {
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        state.answers.extend(answers);
        let waker = if state.answers.is_empty() { None } else { state.waker.take() };
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Looks at proposals that leave the queue. Nothing can be withdrawn meanwhile.
    pub(super) fn leaving(&self) -> Leaving<'_> {
        Leaving(self.state.lock())
    }
}

/// See [`Shared::leaving`].
pub(super) struct Leaving<'a>(parking_lot::MutexGuard<'a, State>);

impl Leaving<'_> {
    /// Whether nobody waits for any answer.
    pub(super) fn closed(&self) -> bool {
        self.0.closed
    }

    /// Lets a proposal leave the queue. Returns whether it is still wanted.
    pub(super) fn take(&mut self, serial: u64) -> bool {
        let state = &mut *self.0;
        state.taken = Some(serial);
        let mut wanted = true;
        while let Some(withdrawn) = state.withdrawn.first().copied().filter(|withdrawn| *withdrawn <= serial) {
            wanted &= withdrawn != serial;
            state.withdrawn.pop_first();
        }
        wanted
    }
}
