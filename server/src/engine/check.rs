//! Whether all members hold the same state. They should by construction; a defect, a bad disk or bad memory can break
//! that silently, and reads would then depend on who answers them.
//!
//! ```text
//! leader     proposes a check ──► entry i ──────────────► asks all: the hash after i? ──► compares, judges
//! member     applies entry i, keeps that state (a copy costs nothing), hashes it beside its work
//! ```
//! A member whose state is not the cluster's stops, and its data directory is marked, so that no restart serves from it.
//! The cluster's is the state that more than half of the voters hold. Where there is none, as with two voters of which
//! one is wrong, nobody can tell who is right: the leader's counts then, being what callers were told, and the alarm
//! says so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use d_engine_proto::v1::{self, command::Command as Change};
use d_engine_proto::{LogIndex, NodeId};
use parking_lot::Mutex;

use super::{Deadline, Engine, EngineError, Inner, late};
use crate::consensus::{Consensus, StartError, StateHash};
use crate::limits::{CHECK_PATIENCE, CHECK_TIMEOUT};
use crate::metrics::{CheckOutcome, Metrics};
use crate::state_machine::kv::{KvStateMachine, STATE_HASH_KIND};

/// Name of the file that marks a data directory whose state is wrong.
const MARKER: &str = "DIVERGED";

/// What checks share.
pub(super) struct Checks {
    /// One at a time: members keep one hash.
    turn: tokio::sync::Mutex<()>,
    /// What the last check of this node as the leader found, until one finds nothing.
    alarm: Mutex<String>,
    metrics: Arc<Metrics>,
}

impl Checks {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { turn: tokio::sync::Mutex::default(), alarm: Mutex::default(), metrics }
    }

    pub(super) fn alarm(&self) -> String {
        self.alarm.lock().clone()
    }
}

impl Engine {
    /// Compares the states of all members; see the module's description. Works on the leader.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn check(&self, deadline: Deadline) -> Result<v1::CheckResponse, EngineError> {
        let checks = &self.inner.checks;
        let _turn = tokio::time::timeout_at(deadline, checks.turn.lock())
            .await
            .map_err(|_| late("another check of the members' states"))?;
        let (header, _) = self.propose(Change::StateCheck(v1::StateCheck {}), deadline).await?;
        let index = self.inner.kv.current().checked().unwrap_or(LogIndex(0));
        let consensus = &self.inner.consensus;
        let patience = CHECK_PATIENCE.min(deadline.saturating_duration_since(Deadline::now()));
        let hashes = consensus.state_hashes(index, patience).await;
        let voters: Vec<NodeId> = consensus.membership().voters().collect();
        let judgement = Judgement::of(&hashes, &voters, consensus.node_id());
        checks.metrics.state_checked(judgement.outcome(), judgement.wrong.len());
        *checks.alarm.lock() = judgement.alarm(index);
        if let Some(right) = judgement.right {
            for id in &judgement.wrong {
                tracing::error!(member = id.get(), index = index.get(), alarm = checks.alarm(), "the states differ");
                consensus.tell_diverged(*id, right).await;
            }
        }
        Ok(v1::CheckResponse { header, index: index.get(), members: judgement.report(&hashes) })
    }
}

/// Who holds the cluster's state.
#[derive(Debug, PartialEq, Eq)]
struct Judgement {
    /// `None`: not even this node has a hash.
    right: Option<StateHash>,
    /// Whether more than half of the voters hold it.
    by_majority: bool,
    wrong: Vec<NodeId>,
    unknown: Vec<NodeId>,
}

impl Judgement {
    fn of(hashes: &BTreeMap<NodeId, Option<StateHash>>, voters: &[NodeId], leader: NodeId) -> Self {
        let holders = |hash: StateHash| voters.iter().filter(|id| hashes.get(id) == Some(&Some(hash))).count();
        let majority = hashes.values().flatten().find(|hash| 2 * holders(**hash) > voters.len());
        let right = majority.or(hashes.get(&leader).and_then(Option::as_ref)).copied();
        let differs = |hash: &StateHash| right.is_some_and(|right| hash.kind == right.kind && *hash != right);
        let wrong = hashes.iter().filter(|(_, hash)| hash.as_ref().is_some_and(differs));
        let is_known = |hash: &StateHash| right.is_some_and(|right| hash.kind == right.kind);
        let unknown = hashes.iter().filter(|(_, hash)| !hash.as_ref().is_some_and(is_known));
        Self {
            right,
            by_majority: majority.is_some(),
            wrong: wrong.map(|(id, _)| *id).collect(),
            unknown: unknown.map(|(id, _)| *id).collect(),
        }
    }

    fn outcome(&self) -> CheckOutcome {
        match (self.wrong.is_empty(), self.unknown.is_empty()) {
            (false, _) => CheckOutcome::Different,
            (true, false) => CheckOutcome::Incomplete,
            (true, true) => CheckOutcome::Same,
        }
    }

    /// What an operator is to know; empty if there is nothing.
    fn alarm(&self, index: LogIndex) -> String {
        if self.wrong.is_empty() {
            return String::new();
        }
        let wrong: Vec<_> = self.wrong.iter().map(ToString::to_string).collect();
        let doubt = match self.by_majority {
            true => "",
            false => ", but no majority of the voters says who is right: compare with a backup before you go on",
        };
        format!(
            "after log entry {index} the state of node {} was not the cluster's{doubt}; it stops: remove the member, \
             empty its data directory and add it again",
            wrong.join(", ")
        )
    }

    fn report(&self, hashes: &BTreeMap<NodeId, Option<StateHash>>) -> Vec<v1::MemberCheck> {
        let report = |(id, hash): (&NodeId, &Option<StateHash>)| {
            let finding = if self.wrong.contains(id) {
                v1::CheckFinding::Different
            } else if self.unknown.contains(id) {
                v1::CheckFinding::Unknown
            } else {
                v1::CheckFinding::Same
            };
            v1::MemberCheck { node_id: id.get(), finding: finding as i32, hash: hash.map_or(0, |hash| hash.hash) }
        };
        hashes.iter().map(report).collect()
    }
}

/// Checks again and again, while this node leads. Ends with the engine.
pub(super) async fn check_periodically(engine: Weak<Inner>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let Some(inner) = engine.upgrade() else { return };
        let engine = Engine { inner };
        if engine.is_leader()
            && let Err(error) = engine.check(Deadline::now() + CHECK_TIMEOUT).await
        {
            tracing::debug!(%error, "the members' states were not compared");
        }
    }
}

/// Hashes the states that are to be compared, the latest one if several wait.
pub(super) async fn hash_states(kv: Arc<KvStateMachine>, consensus: Consensus) {
    loop {
        let (index, store) = kv.next_check().await;
        let hash = tokio::task::spawn_blocking(move || store.hash()).await;
        match hash {
            Ok(hash) => consensus.publish_state_hash(StateHash { index, kind: STATE_HASH_KIND, hash }),
            Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
            // The runtime ends.
            Err(_) => return,
        }
    }
}

/// Stops this node once its state is found to be wrong.
pub(super) async fn stop_if_wrong(consensus: Consensus, directory: Option<PathBuf>) {
    let mut accused = consensus.accused();
    let Ok(right) = accused.wait_for(Option::is_some).await.map(|right| *right) else { return };
    let (Some(right), Some(own)) = (right, consensus.state_hash()) else { return };
    let failure = StartError::Diverged { index: own.index, ours: own.hash, right: right.hash };
    if let Some(directory) = directory {
        let text = failure.to_string();
        let marked = tokio::task::spawn_blocking(move || mark(&directory, &text)).await;
        if !matches!(marked, Ok(Ok(()))) {
            tracing::error!("the data directory cannot be marked: do not start this node again");
        }
    }
    consensus.poison().fail(failure);
}

fn mark(directory: &Path, text: &str) -> std::io::Result<()> {
    let path = directory.join(MARKER);
    std::fs::write(&path, format!("{text}\n"))?;
    std::fs::File::open(&path)?.sync_all()?;
    std::fs::File::open(directory)?.sync_all()
}

/// Refuses a data directory that was found to hold a wrong state.
///
/// # Errors
/// [`StartError::MarkedDiverged`].
pub(crate) fn refuse_if_marked(directory: &Path) -> Result<(), StartError> {
    match std::fs::read_to_string(directory.join(MARKER)) {
        Ok(text) => Err(StartError::MarkedDiverged { found: text.trim_end().to_owned() }),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEADER: NodeId = NodeId(1);

    fn judge(hashes: &[(u32, Option<u64>)], voters: &[u32]) -> (Option<u64>, bool, Vec<u32>) {
        let of = |hash| StateHash { index: LogIndex(9), kind: 1, hash };
        let hashes = hashes.iter().map(|(id, hash)| (NodeId(*id), hash.map(of))).collect();
        let voters: Vec<_> = voters.iter().copied().map(NodeId).collect();
        let judgement = Judgement::of(&hashes, &voters, LEADER);
        let wrong = judgement.wrong.iter().map(|id| id.get()).collect();
        (judgement.right.map(|right| right.hash), judgement.by_majority, wrong)
    }

    #[test]
    fn the_majority_of_all_voters_is_right_and_else_the_leader() {
        let all = [1, 2, 3];
        assert_eq!(judge(&[(1, Some(7)), (2, Some(7)), (3, Some(7))], &all), (Some(7), true, vec![]));
        assert_eq!(judge(&[(1, Some(7)), (2, Some(8)), (3, Some(7))], &all), (Some(7), true, vec![2]));
        assert_eq!(judge(&[(1, Some(7)), (2, Some(8)), (3, Some(8))], &all), (Some(8), true, vec![1]), "the leader");
        assert_eq!(judge(&[(1, Some(7)), (2, Some(8)), (3, None)], &all), (Some(7), false, vec![2]), "one is down");
        assert_eq!(judge(&[(1, Some(7)), (2, Some(8))], &[1, 2]), (Some(7), false, vec![2]), "a pair");
        assert_eq!(judge(&[(1, Some(7)), (2, Some(8)), (3, Some(9))], &all), (Some(7), false, vec![2, 3]));
        // Learners are judged, and do not judge.
        let learners = [(1, Some(7)), (4, Some(8)), (5, Some(8))];
        assert_eq!(judge(&learners, &[1]), (Some(7), true, vec![4, 5]));
        assert_eq!(judge(&[(1, None), (2, Some(8)), (3, None)], &all), (None, false, vec![]), "nothing to compare");
    }

    #[test]
    fn hashes_of_another_kind_accuse_nobody() {
        let hash = |kind, hash| Some(StateHash { index: LogIndex(9), kind, hash });
        let hashes = [(NodeId(1), hash(1, 7)), (NodeId(2), hash(2, 8)), (NodeId(3), hash(1, 7))].into();
        let judgement = Judgement::of(&hashes, &[1, 2, 3].map(NodeId), LEADER);
        assert_eq!((judgement.outcome(), judgement.unknown), (CheckOutcome::Incomplete, vec![NodeId(2)]));
    }

    #[test]
    fn a_marked_directory_is_refused_with_what_was_found() {
        let directory = tempfile::tempdir().unwrap();
        refuse_if_marked(directory.path()).unwrap();
        mark(directory.path(), "found wrong").unwrap();
        let refused = refuse_if_marked(directory.path()).unwrap_err();
        assert!(refused.to_string().contains("found wrong"), "{refused}");
    }
}
