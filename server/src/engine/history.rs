//! How old a revision is: samples of store time and revision, and the compaction that follows from them.
//!
//! Every node takes samples for itself, from what it applies, so that a leader change loses none. They are memory
//! only: a node that starts knows the age of what it has applied by then, and of what follows.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::Revision;
use d_engine_proto::v1::{self, command::Command as Change, compact_request::Target};
use parking_lot::Mutex;
use prost::Message;
use tokio::task::JoinSet;

use crate::consensus::{Consensus, Poison};
use crate::limits::{COMPACTION_PAUSE_MIN, COMPACTIONS_PER_RETENTION, HISTORY_SAMPLE_PAUSE, HISTORY_SAMPLES_MAX};
use crate::state_machine::StoreTime;
use crate::state_machine::kv::KvStateMachine;

/// Which revision was current when.
pub(super) struct History {
    samples: Mutex<Samples>,
}

/// Times and revisions ascend, both.
#[derive(Default)]
struct Samples(VecDeque<Sample>);

/// At this store time this revision was current.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    time: StoreTime,
    revision: Revision,
}

impl History {
    pub(super) fn start(kv: Arc<KvStateMachine>, poison: &Poison, tasks: &mut JoinSet<()>) -> Arc<Self> {
        let history = Arc::new(Self { samples: Mutex::default() });
        // In this order: no revision is between what is sampled and what is followed.
        let mut revisions = kv.revisions();
        history.take(&kv);
        let sampler = history.clone();
        tasks.spawn(poison.guard("the sampling of history", async move {
            while revisions.changed().await.is_ok() {
                sampler.take(&kv);
                tokio::time::sleep(HISTORY_SAMPLE_PAUSE).await;
            }
        }));
        history
    }

    fn take(&self, kv: &KvStateMachine) {
        let store = kv.current();
        let sample = Sample { time: StoreTime(store.state().store_time), revision: store.revision() };
        let mut samples = self.samples.lock();
        samples.forget_before(store.compacted());
        samples.add(sample);
    }

    /// The revision that was current `age` before `now`, or an older one; `None` if nobody remembers.
    pub(super) fn revision_before(&self, now: StoreTime, age: Duration) -> Option<Revision> {
        self.samples.lock().current_at(StoreTime(now.0.checked_sub(age)?))
    }
}

impl Samples {
    fn add(&mut self, sample: Sample) {
        if self.0.back().is_some_and(|last| last.revision >= sample.revision) {
            return;
        }
        if self.0.len() >= HISTORY_SAMPLES_MAX {
            // Every second one goes: the older they are, the more often that happened to their neighbours.
            let mut keep = false;
            self.0.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.0.push_back(sample);
    }

    /// Drops what is of no use once `compacted` is the oldest revision.
    fn forget_before(&mut self, compacted: Revision) {
        while self.0.get(1).is_some_and(|second| second.revision <= compacted) {
            self.0.pop_front();
        }
    }

    fn current_at(&self, time: StoreTime) -> Option<Revision> {
        let after = self.0.partition_point(|sample| sample.time <= time);
        self.0.get(after.checked_sub(1)?).map(|sample| sample.revision)
    }
}

/// Compacts by age, while this node leads.
pub(super) struct Compactor {
    pub(super) consensus: Consensus,
    pub(super) kv: Arc<KvStateMachine>,
    pub(super) history: Arc<History>,
    pub(super) retention: Duration,
}

impl Compactor {
    /// Ends with the node.
    pub(super) async fn run(self) {
        let mut failure = self.consensus.failure();
        tokio::select! {
            _ = failure.wait_for(Option::is_some) => {}
            () = self.compact() => {}
        }
    }

    async fn compact(&self) {
        let pause = (self.retention / COMPACTIONS_PER_RETENTION).max(COMPACTION_PAUSE_MIN);
        loop {
            tokio::time::sleep(pause).await;
            let Some(now) = self.consensus.store_time() else { continue };
            let kept = self.history.revision_before(now, self.retention);
            let Some(kept) = kept.filter(|kept| *kept > self.kv.current().compacted()) else { continue };
            let target = Some(Target::Revision(kept.get()));
            let command = v1::Command::from(Change::Compact(v1::CompactRequest { target }));
            match self.consensus.propose(Bytes::from(command.encode_to_vec())).await {
                Ok(_) => tracing::debug!(oldest = kept.get(), "compacted by age"),
                Err(error) => tracing::debug!(%error, "a compaction by age was not applied"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seconds: u64, revision: u64) -> Sample {
        Sample { time: StoreTime(Duration::from_secs(seconds)), revision: Revision(revision) }
    }

    fn current_at(samples: &Samples, seconds: u64) -> Option<u64> {
        samples.current_at(StoreTime(Duration::from_secs(seconds))).map(Revision::get)
    }

    #[test]
    fn a_moment_has_the_revision_that_was_current_then_or_an_older_one() {
        let mut samples = Samples::default();
        for (seconds, revision) in [(10, 5), (12, 5), (20, 9), (30, 12)] {
            samples.add(sample(seconds, revision));
        }
        assert_eq!(current_at(&samples, 9), None, "before anybody looked");
        assert_eq!(current_at(&samples, 10), Some(5));
        assert_eq!(current_at(&samples, 19), Some(5));
        assert_eq!(current_at(&samples, 20), Some(9));
        assert_eq!(current_at(&samples, 1_000), Some(12), "the last one stays current");
    }

    #[test]
    fn samples_are_bounded_and_never_make_anything_younger() {
        let mut samples = Samples::default();
        let count = 20 * HISTORY_SAMPLES_MAX as u64;
        for second in 1..=count {
            samples.add(sample(second, second));
            assert!(samples.0.len() <= HISTORY_SAMPLES_MAX);
        }
        for second in (1..=count).step_by(97) {
            let found = current_at(&samples, second).unwrap();
            assert!(found <= second, "second {second} has revision {found}");
        }
        assert_eq!(current_at(&samples, count), Some(count));
        let recent = current_at(&samples, count - 600).unwrap();
        assert!(count - 600 - recent < 64, "what is recent is known best: {recent}");
    }

    #[test]
    fn what_is_compacted_is_forgotten() {
        let mut samples = Samples::default();
        for revision in 1..=10 {
            samples.add(sample(revision, revision));
        }
        samples.forget_before(Revision(7));
        assert_eq!(samples.0.front(), Some(&sample(7, 7)));
        samples.forget_before(Revision(20));
        assert_eq!(samples.0.len(), 1, "the current one stays");
    }
}
