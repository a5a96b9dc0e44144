//! Engines embedded in the test's own process, and what an application in another process says of its leadership.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use d_engine::prelude::{EmbeddedClient, EmbeddedEngine};
use tempfile::TempDir;
use tokio::sync::OwnedSemaphorePermit;

use crate::cluster::{GRPC_PORT, TURN, free_loopback};
use crate::wait;

/// Embedded engines of one cluster, all in this process, in directories of their own.
pub struct Fleet {
    engines: Vec<EmbeddedEngine>,
    directory: TempDir,
    ids: u32,
    turn: Option<OwnedSemaphorePermit>,
}

impl Fleet {
    /// One engine without a port.
    pub async fn alone() -> Self {
        Self::of(1).await
    }

    /// That many engines, ready.
    ///
    /// # Panics
    /// When one does not start.
    pub async fn of(ids: u32) -> Self {
        let mut fleet = Self::prepared(ids);
        if ids > 1 {
            fleet.turn = Some(Arc::clone(&TURN).acquire_owned().await.expect("never closed"));
        }
        for id in 1..=ids {
            fleet.start(id).await;
        }
        for engine in &fleet.engines {
            engine.wait_ready(wait::PATIENCE).await.expect("a leader");
        }
        fleet
    }

    /// Configurations for that many engines; none is started yet.
    ///
    /// # Panics
    /// When they cannot be written.
    #[must_use]
    pub fn prepared(ids: u32) -> Self {
        let directory = tempfile::Builder::new().prefix("d-engine-embedded-").tempdir().expect("a directory");
        let host = free_loopback(ids);
        let address = |id: u32| format!("{host}:{}", u32::from(GRPC_PORT) + id);
        let members: Vec<String> =
            (1..=ids).map(|id| format!("{{ id = {id}, address = \"{}\" }}", address(id))).collect();
        for id in 1..=ids {
            let mut text = format!("[cluster]\nnode_id = {id}\n");
            if ids > 1 {
                let members = members.join(", ");
                text += &format!("initial_cluster = [{members}]\napplication_address = \"app-{id}:80\"\n");
            }
            let data = directory.path().join(format!("data-{id}"));
            text += &format!("db_root_dir = {data:?}\n");
            if ids > 1 {
                // Long, so that nobody loses it because the machine is busy.
                text += "[raft.read_consistency]\nlease_duration_ms = 1000\n";
            }
            std::fs::write(directory.path().join(format!("n{id}.toml")), text).expect("a configuration");
        }
        Self { engines: Vec::new(), directory, ids, turn: None }
    }

    /// Starts an engine; does not wait until it is ready.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start(&mut self, id: u32) -> EmbeddedEngine {
        let engine = EmbeddedEngine::start_with(self.config(id)).await.expect("the engine starts");
        self.engines.push(engine.clone());
        engine
    }

    /// The configuration of an engine, named without `.toml`.
    #[must_use]
    pub fn config(&self, id: u32) -> PathBuf {
        assert!((1..=self.ids).contains(&id), "no engine {id}");
        self.directory.path().join(format!("n{id}"))
    }

    /// The engine that leads, once there is one that all name.
    ///
    /// # Panics
    /// When there is none.
    pub async fn leader(&self) -> EmbeddedEngine {
        wait::until("one leader", wait::PATIENCE, || async {
            let first = self.engines.first()?.leader_info()?;
            let agreed = self.engines.iter().all(|engine| engine.leader_info() == Some(first));
            let leader = self.engines.iter().find(|engine| engine.node_id() == first.leader_id)?;
            (agreed && leader.is_leader()).then(|| leader.clone())
        })
        .await
    }

    /// An engine that does not lead.
    ///
    /// # Panics
    /// When all do.
    pub async fn follower(&self) -> EmbeddedEngine {
        let leader = self.leader().await.node_id();
        self.engines.iter().find(|engine| engine.node_id() != leader).expect("a follower").clone()
    }

    /// The engines that were started.
    #[must_use]
    pub fn engines(&self) -> &[EmbeddedEngine] {
        &self.engines
    }

    /// Stops all engines.
    ///
    /// # Panics
    /// When one does not end well.
    pub async fn stop(self) {
        for engine in &self.engines {
            engine.stop().await.expect("it ends well");
        }
        drop(self.turn);
    }
}

/// Waits until the client's node shows `value` under `key`.
pub async fn shows(client: &EmbeddedClient, key: &str, value: &str) {
    let what = format!("{key} to hold {value}");
    wait::until(&what, wait::PATIENCE, || async {
        let found = client.get_eventual(key).await.ok()??;
        (found == value).then_some(())
    })
    .await;
}

/// For how long an application in a process of its own believed to lead in a term, by the monotonic clock that all
/// processes of a machine share: it was sure to believe so by `first`, and again at some time after `last`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// What it believed: one of [`IS_LEADER`](Self::IS_LEADER), [`NOTIFIER`](Self::NOTIFIER), [`LEASE`](Self::LEASE).
    pub by: String,
    /// The term.
    pub term: u64,
    /// When the first look that said so had ended.
    pub first: Duration,
    /// When the last look that said so began.
    pub last: Duration,
}

impl Claim {
    /// `is_leader()`.
    pub const IS_LEADER: &str = "is_leader";
    /// What the notifier holds. A process that was paused finds it as it was, for a moment.
    pub const NOTIFIER: &str = "notifier";
    /// A read under the lease that was answered.
    pub const LEASE: &str = "lease";

    /// As a line of the application's output.
    #[must_use]
    pub fn line(&self) -> String {
        format!("claim {} {} {} {}", self.by, self.term, self.first.as_nanos(), self.last.as_nanos())
    }

    /// The claims in an application's output.
    pub fn all(output: &str) -> impl Iterator<Item = Self> + '_ {
        output.lines().filter_map(|line| {
            let (by, numbers) = line.strip_prefix("claim ")?.split_once(' ')?;
            let mut numbers = numbers.split(' ').map_while(|number| number.parse::<u64>().ok());
            let term = numbers.next()?;
            let [first, last] = [numbers.next()?, numbers.next()?].map(Duration::from_nanos);
            Some(Self { by: by.to_owned(), term, first, last })
        })
    }

    /// Whether this claim went on after one of a later term had begun: two believed to lead.
    #[must_use]
    pub fn outlives(&self, successor: &Self) -> bool {
        self.term < successor.term && self.last > successor.first
    }

    /// Makes sure that no two of these believed to lead at a time, and that the lead has changed `changes` times at least.
    ///
    /// # Panics
    /// When it is not so.
    pub fn check(claims: &[Self], changes: usize) {
        let terms: BTreeSet<u64> = claims.iter().map(|claim| claim.term).collect();
        assert!(terms.len() > changes, "hardly anybody led: {claims:?}");
        for claim in claims {
            for other in claims {
                assert!(!claim.outlives(other), "two believed to lead: {claim:?} and {other:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_after_its_successor_is_found_and_one_before_is_not() {
        let claim = |term, first, last| {
            let [first, last] = [first, last].map(Duration::from_nanos);
            Claim { by: Claim::LEASE.to_owned(), term, first, last }
        };
        let text = [claim(3, 10, 20).line(), "something else".to_owned(), claim(5, 30, 40).line()].join("\n");
        let claims: Vec<_> = Claim::all(&text).collect();
        assert_eq!(claims, [claim(3, 10, 20), claim(5, 30, 40)]);
        assert!(!claims[0].outlives(&claims[1]) && !claims[1].outlives(&claims[0]));
        assert!(claim(3, 10, 31).outlives(&claims[1]));
        assert!(!claim(5, 10, 35).outlives(&claims[1]), "a term has one leader");
    }
}
