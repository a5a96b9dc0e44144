//! The one internal interface: gRPC services and embedded clients both come through this door.
//!
//! Requests are checked here, before anything is proposed or read, so that every way in has the same limits. Reads
//! first earn the right to answer from memory, by the policy asked for, and then never touch consensus:
//!
//! | policy | earned by |
//! | --- | --- |
//! | linearizable | one confirmation by a quorum, begun after the read arrived |
//! | lease | the leader's lease, checked against the clock at this moment, and having applied what any member may show; without a lease, as linearizable |
//! | eventual | nothing |
//!
//! What has earned its right and every write then waits until nothing is due any more: see `expiry`.

mod backup;
mod check;
mod custom;
mod error;
mod expiry;
mod history;
mod leases;
mod local;
mod maintenance;
mod members;
mod pipeline;
mod reads;
mod refusal;
mod renewals;
mod sessions;
mod status;
#[cfg(test)]
mod tests;
mod writes;

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use d_engine_proto::{Revision, limits, v1};
use tokio::task::JoinSet;

pub(crate) use check::refuse_if_marked;
pub use custom::CustomEngine;
pub use error::EngineError;
pub(crate) use pipeline::{Answered, Pipeline};
pub use status::VERSION;

use crate::consensus::{Consensus, LeaderInfo, Poison, StartError};
use crate::metrics::Metrics;
use crate::state_machine::kv::KvStateMachine;
use crate::watch::{Hub, HubSettings};
use backup::Backups;
use check::Checks;
use expiry::Expirer;
use history::{Compactor, History};
use renewals::Renewals;

/// When a call must have its answer.
pub type Deadline = tokio::time::Instant;

/// How reads are served when the request does not say, and whether it may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPolicy {
    /// The policy of a request without one.
    pub default: v1::Consistency,
    /// Whether a request may ask for another.
    pub allow_client_override: bool,
}

impl ReadPolicy {
    /// The policy by which a read is served that asks for one.
    fn choose(self, asked: v1::Consistency) -> Result<v1::Consistency, EngineError> {
        let Self { default, allow_client_override } = self;
        match asked {
            v1::Consistency::Unspecified => Ok(default),
            asked if asked == default || allow_client_override => Ok(asked),
            _ => Err(EngineError::PolicyFixed { default }),
        }
    }
}

/// What an engine does by itself, and what it lets its callers do.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// How reads are served.
    pub read_policy: ReadPolicy,
    /// Whether this node serves watches.
    pub watches_enabled: bool,
    /// Whether leases, and keys with a time to live, may be made through this node.
    pub leases_enabled: bool,
    /// For how long past revisions are kept, in store time; `None`: until they are compacted by a request.
    pub history_retention: Option<Duration>,
    /// How often the leader has the members compare their states; `None`: only by request.
    pub check_interval: Option<Duration>,
    /// Whose size is part of the status. The first is marked if its state is found to be wrong.
    pub data_directories: Vec<PathBuf>,
}

/// A running node, as its services and embedded clients use it. Clones share it.
///
/// It has tasks of its own: one proposes what is due, one renews leases, two keep and compact the history. They end
/// with the node, or when the last clone is dropped.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    consensus: Consensus,
    kv: Arc<KvStateMachine>,
    /// `None`: switched off.
    watches: Option<Hub>,
    config: EngineConfig,
    expirer: Expirer,
    renewals: Renewals,
    history: Arc<History>,
    checks: Checks,
    backups: Backups,
    started: Instant,
    /// Ended when this is dropped.
    _tasks: JoinSet<()>,
}

impl Engine {
    /// Joins a consensus node and its state machine. Must be called within a tokio runtime.
    #[must_use]
    pub fn new(consensus: Consensus, kv: Arc<KvStateMachine>, config: EngineConfig, metrics: Arc<Metrics>) -> Self {
        let inner = |engine: &Weak<Inner>| {
            let poison = consensus.poison();
            let mut tasks = JoinSet::new();
            let watches =
                config.watches_enabled.then(|| Hub::start(kv.clone(), HubSettings::default(), metrics.clone(), poison));
            let expirer = Expirer::start(consensus.clone(), kv.clone(), &mut tasks);
            let renewals = Renewals::start(engine.clone(), metrics.clone(), poison, &mut tasks);
            let history = History::start(kv.clone(), poison, &mut tasks);
            if let Some(retention) = config.history_retention {
                let (consensus, kv, history) = (consensus.clone(), kv.clone(), history.clone());
                tasks.spawn(poison.guard("the compaction", Compactor { consensus, kv, history, retention }.run()));
            }
            tasks.spawn(poison.guard("the hashing of states", check::hash_states(kv.clone(), consensus.clone())));
            let directory = config.data_directories.first().cloned();
            tasks.spawn(poison.guard("the watch over the state", check::stop_if_wrong(consensus.clone(), directory)));
            if let Some(interval) = config.check_interval {
                let checking = check::check_periodically(engine.clone(), interval);
                tasks.spawn(poison.guard("the comparison of states", checking));
            }
            let (checks, backups) =
                (Checks::new(metrics.clone()), Backups::new(metrics, config.data_directories.first()));
            tasks.spawn(watch_writing(Arc::downgrade(&kv), poison.clone()));
            Inner {
                consensus,
                kv,
                watches,
                config,
                expirer,
                renewals,
                history,
                checks,
                backups,
                started: Instant::now(),
                _tasks: tasks,
            }
        };
        Self { inner: Arc::new_cyclic(inner) }
    }

    /// The watches of this node, unless they are switched off.
    #[must_use]
    pub fn watches(&self) -> Option<&Hub> {
        self.inner.watches.as_ref()
    }

    /// The consensus node below.
    #[must_use]
    pub fn consensus(&self) -> &Consensus {
        &self.inner.consensus
    }

    /// Whether this node leads and its lease is valid at this very moment.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.inner.consensus.is_leader()
    }

    /// The leader, while one is known.
    #[must_use]
    pub fn leader(&self) -> Option<LeaderInfo> {
        self.inner.consensus.leader()
    }

    pub(crate) fn header(&self, revision: Revision) -> Option<v1::ResponseHeader> {
        let consensus = &self.inner.consensus;
        Some(v1::ResponseHeader {
            cluster_id: consensus.cluster_id().unwrap_or(0),
            epoch: self.inner.kv.current().state().epoch.get(),
            revision: revision.get(),
            node_id: consensus.node_id().get(),
            term: consensus.term().get(),
        })
    }

    fn leader_hint(&self) -> Option<v1::LeaderHint> {
        refusal::leader_hint(&self.inner.consensus)
    }

    pub(crate) fn not_leader(&self) -> EngineError {
        refusal::not_leader(&self.inner.consensus)
    }

    fn not_leading(&self) -> EngineError {
        refusal::not_leading(&self.inner.consensus)
    }

    pub(crate) fn unavailable(&self, reason: impl Into<String>) -> EngineError {
        refusal::unavailable(&self.inner.consensus, reason)
    }
}

/// What can no longer be written behind is found out by the next entry at the latest; a node without any is told here.
async fn watch_writing(kv: Weak<KvStateMachine>, poison: Poison) {
    // A snapshot that is installed brings a history of its own, and the old one ends.
    while let Some(mut failure) = kv.upgrade().map(|kv| kv.failure()) {
        if let Ok(failure) = failure.wait_for(Option::is_some).await
            && let Some(failure) = failure.clone()
        {
            poison.fail(StartError::Storage(Arc::new(failure)));
            return;
        }
    }
}

fn check_size(bytes: usize) -> Result<(), EngineError> {
    let max = limits::REQUEST_BYTES_MAX;
    if bytes as u64 > max { Err(EngineError::TooLarge { bytes, max }) } else { Ok(()) }
}

/// What a call waits for that has not begun.
const TURN: &str = "its turn";

fn late(waiting_for: &'static str) -> EngineError {
    EngineError::DeadlineExceeded { waiting_for, outcome: v1::Outcome::NotApplied }
}
