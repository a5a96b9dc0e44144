//! What is due ends: by a tick through the log, and before anybody could still meet it.
//!
//! Every entry carries store time, and whatever is due by then expires before its commands are applied. When no entries
//! flow, the [`Expirer`] of the leader proposes one. In between, a key that is due is still in memory, so that reads
//! which promise the present, and writes, wait until it is gone:
//! ```text
//! store time      t ──── read arrives ──── deadline of k ≤ t: pokes the expirer, waits
//! expirer                                  tick, stamped ≥ t ──► committed ──► applied: k is gone ──► read answers
//! ```
//! How long that takes is bounded by the deadline of the call, and what becomes due after the call arrived is not waited
//! for. Nothing here decides what expires: that is the state machine's, on every node alike.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command as Change};
use prost::Message;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::{Deadline, Engine, EngineError, late};
use crate::consensus::{Consensus, StartError};
use crate::limits::{STORE_TIME_LOST_MAX, TICK_PAUSE_MAX, TICK_PAUSE_MIN};
use crate::state_machine::StoreTime;
use crate::state_machine::kv::KvStateMachine;

/// Whether something with the earliest deadline `due` has ended by `now`.
pub(super) fn is_due(due: Option<StoreTime>, now: StoreTime) -> bool {
    due.is_some_and(|due| due <= now)
}

impl Engine {
    /// Waits until nothing is due that is due at this moment of store time. Does nothing on a node that does not lead.
    pub(super) async fn settle_now(&self, deadline: Deadline) -> Result<(), EngineError> {
        match self.due_now() {
            Some(now) => self.settle(now, deadline).await,
            None => Ok(()),
        }
    }

    /// This moment of store time, if something is due at it. `None` on a node that does not lead.
    pub(super) fn due_now(&self) -> Option<StoreTime> {
        let due = self.inner.kv.due()?;
        self.inner.consensus.store_time().filter(|now| due <= *now)
    }

    /// Waits until nothing is due at `now`.
    pub(super) async fn settle(&self, now: StoreTime, deadline: Deadline) -> Result<(), EngineError> {
        let mut due = self.inner.kv.due_changes();
        let mut leader = self.inner.consensus.leader_changes();
        self.inner.expirer.poke();
        let settled = async {
            tokio::select! {
                settled = due.wait_for(|due| !is_due(*due, now)) => settled.map(drop).map_err(|_| "it is stopping"),
                // A successor counts its own time, and may take long to come to this one.
                _ = leader.changed() => Err("the leader changed while an expiry was waited for"),
            }
        };
        match tokio::time::timeout_at(deadline, settled).await {
            Ok(settled) => settled.map_err(|reason| self.unavailable(reason)),
            Err(_) => Err(late("what is due to expire")),
        }
    }
}

/// The handle of the task that proposes ticks.
pub(super) struct Expirer {
    poked: Arc<Notify>,
}

impl Expirer {
    pub(super) fn start(consensus: Consensus, kv: Arc<KvStateMachine>, tasks: &mut JoinSet<()>) -> Self {
        let poked = Arc::new(Notify::new());
        let task = Task {
            reigning: consensus.reigning(),
            due: kv.due_changes(),
            poked: poked.clone(),
            failure: consensus.failure(),
            consensus,
            kv,
        };
        let poison = task.consensus.poison().clone();
        tasks.spawn(poison.guard("the expiry", task.run()));
        Self { poked }
    }

    /// Something is due: do not wait for the timer, which is late by up to a millisecond.
    fn poke(&self) {
        self.poked.notify_one();
    }
}

struct Task {
    consensus: Consensus,
    kv: Arc<KvStateMachine>,
    reigning: watch::Receiver<bool>,
    due: watch::Receiver<Option<StoreTime>>,
    poked: Arc<Notify>,
    failure: watch::Receiver<Option<StartError>>,
}

impl Task {
    async fn run(mut self) {
        let mut failure = self.failure.clone();
        tokio::select! {
            _ = failure.wait_for(Option::is_some) => {}
            () = self.expire() => {}
        }
    }

    /// Ends when nobody publishes any more.
    async fn expire(&mut self) {
        let tick: Bytes = v1::Command::from(Change::Tick(v1::Tick {})).encode_to_vec().into();
        let mut pause = TICK_PAUSE_MIN;
        loop {
            if self.reigning.wait_for(|reigning| *reigning).await.is_err() {
                return;
            }
            let due = *self.due.borrow_and_update();
            let applied = StoreTime(self.kv.current().state().store_time);
            let wait = match self.consensus.store_time() {
                Some(now) => next_tick(due, applied, now),
                // The reign is ending: the next turn waits for another one.
                None => None,
            };
            if wait != Some(Duration::ZERO) {
                self.sleep(wait).await;
                continue;
            }
            match self.consensus.propose(tick.clone()).await {
                Ok(_) => pause = TICK_PAUSE_MIN,
                Err(error) => {
                    tracing::debug!(%error, "a tick was not applied");
                    tokio::select! {
                        () = tokio::time::sleep(pause) => pause = (2 * pause).min(TICK_PAUSE_MAX),
                        // Another reign, another chance.
                        _ = self.reigning.changed() => pause = TICK_PAUSE_MIN,
                    }
                }
            }
        }
    }

    /// Until it is time, or something has changed that the time follows from.
    async fn sleep(&mut self, wait: Option<Duration>) {
        let timer = async {
            match wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = timer => {}
            () = self.poked.notified() => {}
            _ = self.due.changed() => {}
            _ = self.reigning.changed() => {}
        }
    }
}

/// How long until a tick is to be proposed: when something is due, or when more time would be lost with the leader than
/// may be. `None`: nothing ever ends.
fn next_tick(due: Option<StoreTime>, applied: StoreTime, now: StoreTime) -> Option<Duration> {
    let until = |time: Duration| time.saturating_sub(now.0);
    due.map(|due| until(due.0).min(until(applied.0 + STORE_TIME_LOST_MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> StoreTime {
        StoreTime(Duration::from_millis(milliseconds))
    }

    #[test]
    fn a_tick_comes_when_something_is_due_and_not_before() {
        assert_eq!(next_tick(None, at(0), at(1_000_000)), None, "nothing ends, nothing is written");
        assert_eq!(next_tick(Some(at(500)), at(400), at(450)), Some(Duration::from_millis(50)));
        assert_eq!(next_tick(Some(at(500)), at(400), at(500)), Some(Duration::ZERO));
        assert_eq!(next_tick(Some(at(500)), at(400), at(900)), Some(Duration::ZERO));
    }

    #[test]
    fn an_idle_leader_writes_its_time_down_before_too_much_of_it_could_be_lost() {
        let far = Some(at(86_400_000));
        let lost_max = u64::try_from(STORE_TIME_LOST_MAX.as_millis()).unwrap();
        assert_eq!(next_tick(far, at(1000), at(1000)), Some(STORE_TIME_LOST_MAX));
        assert_eq!(next_tick(far, at(1000), at(1000 + lost_max)), Some(Duration::ZERO));
    }

    #[test]
    fn what_is_due_has_come_to_its_deadline() {
        assert!(!is_due(None, at(5)));
        assert!(!is_due(Some(at(6)), at(5)));
        assert!(is_due(Some(at(5)), at(5)));
    }
}
