//! Renewals of leases, gathered: those of all streams and calls that wait share a command.
//!
//! They are taken by opportunity, as the proposer takes commands: an idle node proposes one at once, a busy one
//! gathers what arrives while earlier commands are in flight.

use std::sync::{Arc, Weak};

use d_engine_proto::LeaseId;
use d_engine_proto::v1::{self, command::Command as Change, command_reply::Reply};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use super::{Deadline, Engine, EngineError, Inner};
use crate::consensus::Poison;
use crate::limits::{CALL_TIMEOUT_DEFAULT, RENEWALS_IN_FLIGHT_MAX, RENEWALS_PER_COMMAND_MAX, RENEWALS_WAITING_MAX};
use crate::metrics::Metrics;

/// As the node's failure names it.
const NAME: &str = "the renewal of leases";

type Answer = Result<v1::LeaseRenewResponse, EngineError>;

/// The queue of renewals.
pub(super) struct Renewals {
    queue: mpsc::Sender<Renewal>,
}

struct Renewal {
    lease: LeaseId,
    answer: oneshot::Sender<Answer>,
}

impl Renewals {
    pub(super) fn start(engine: Weak<Inner>, metrics: Arc<Metrics>, poison: &Poison, tasks: &mut JoinSet<()>) -> Self {
        let (queue, waiting) = mpsc::channel(RENEWALS_WAITING_MAX);
        tasks.spawn(poison.guard(NAME, gather(engine, metrics, waiting)));
        Self { queue }
    }
}

impl Engine {
    /// Renews a lease; one that does not exist is answered with a time to live of 0. Repeating it is harmless.
    pub(super) async fn renew(&self, lease: LeaseId, deadline: Deadline) -> Answer {
        let (answer, answered) = oneshot::channel();
        let renewed = async {
            // Where there is no room it waits, and with it the stream it came from.
            let queued = self.inner.renewals.queue.send(Renewal { lease, answer }).await;
            queued.map_err(|_| self.unavailable("it is stopping"))?;
            answered.await.unwrap_or(Err(EngineError::Stopped))
        };
        match tokio::time::timeout_at(deadline, renewed).await {
            Ok(answer) => answer,
            Err(_) => Err(EngineError::DeadlineExceeded {
                waiting_for: "the renewal to be committed",
                outcome: v1::Outcome::Unknown,
            }),
        }
    }

    async fn renew_all(&self, leases: Vec<u64>) -> Result<(Option<v1::ResponseHeader>, Vec<u64>), EngineError> {
        let change = Change::LeaseRenewals(v1::LeaseRenewals { leases });
        match self.propose(change, Deadline::now() + CALL_TIMEOUT_DEFAULT).await? {
            (header, Reply::LeaseRenewed(renewed)) => Ok((header, renewed.ttl_ms)),
            _ => Err(EngineError::Stopped),
        }
    }
}

/// Ends when the engine is gone.
async fn gather(engine: Weak<Inner>, metrics: Arc<Metrics>, mut waiting: mpsc::Receiver<Renewal>) {
    let in_flight = Arc::new(Semaphore::new(RENEWALS_IN_FLIGHT_MAX));
    loop {
        // First the slot, then the renewals: what arrives while every slot is taken joins them.
        let Ok(slot) = in_flight.clone().acquire_owned().await else { return };
        let mut renewals = Vec::new();
        if waiting.recv_many(&mut renewals, RENEWALS_PER_COMMAND_MAX).await == 0 {
            return;
        }
        renewals.retain(|renewal| !renewal.answer.is_closed());
        let Some(inner) = engine.upgrade() else { return };
        if renewals.is_empty() {
            continue;
        }
        metrics.leases_renewed(renewals.len());
        // Bounded by the slots.
        let poison = inner.consensus.poison().clone();
        tokio::spawn(poison.guard(NAME, async move {
            let leases = renewals.iter().map(|renewal| renewal.lease.get()).collect();
            let renewed = Engine { inner }.renew_all(leases).await;
            drop(slot);
            answer(renewals, renewed);
        }));
    }
}

fn answer(renewals: Vec<Renewal>, renewed: Result<(Option<v1::ResponseHeader>, Vec<u64>), EngineError>) {
    match renewed {
        Ok((header, ttls)) => {
            // One time to live per lease: the state machine's contract.
            for (Renewal { lease, answer }, ttl_ms) in renewals.into_iter().zip(ttls) {
                // Nobody may be waiting any more; so below.
                let _ = answer.send(Ok(v1::LeaseRenewResponse { header, lease: lease.get(), ttl_ms }));
            }
        }
        Err(error) => {
            for Renewal { answer, .. } in renewals {
                let _ = answer.send(Err(error.clone()));
            }
        }
    }
}
