//! One engine in this process, alone or with two more in processes of their own.

use std::path::Path;
use std::time::{Duration, Instant};

use d_engine::prelude::EmbeddedEngine;
use d_engine_tests::embedded::Fleet;
use d_engine_tests::process::{Process, bound_to_this_thread};
use d_engine_tests::wait::PATIENCE;

/// How often another group is started until this process leads it; nearly always it is the first.
const ATTEMPTS: u32 = 10;

/// An engine that leads, and the processes of its peers.
pub(super) struct Group {
    engine: EmbeddedEngine,
    fleet: Fleet,
    peers: Vec<Process>,
    time_to_ready: Duration,
}

impl Group {
    /// Starts that many processes, this one included, in empty directories. To be called from a thread that lives as
    /// long as the group.
    pub(super) async fn start(processes: u32) -> Self {
        let mut group = Self::try_start(processes).await;
        for _ in 1..ATTEMPTS {
            if group.engine.is_leader() {
                break;
            }
            group.stop().await;
            group = Self::try_start(processes).await;
        }
        assert!(group.engine.is_leader(), "this process has not become the leader in {ATTEMPTS} attempts");
        group
    }

    async fn try_start(processes: u32) -> Self {
        let mut fleet = Fleet::prepared(processes);
        let began = Instant::now();
        let program = std::env::current_exe().expect("a running program has a path");
        let peers = (2..=processes).map(|id| start_peer(&program, &fleet, id)).collect();
        let engine = fleet.start(1).await;
        engine.wait_ready(PATIENCE).await.expect("a leader");
        Self { engine, fleet, peers, time_to_ready: began.elapsed() }
    }

    pub(super) fn leader(&self) -> &EmbeddedEngine {
        &self.engine
    }

    /// From the start of the first process until the engine in this one was ready.
    pub(super) fn time_to_ready(&self) -> Duration {
        self.time_to_ready
    }

    /// The ids of the other processes.
    pub(super) fn peers(&self) -> impl Iterator<Item = u32> {
        self.peers.iter().map(Process::id)
    }

    pub(super) async fn stop(self) {
        self.fleet.stop().await;
        // What they hold is thrown away.
        drop(self.peers);
    }
}

fn start_peer(program: &Path, fleet: &Fleet, id: u32) -> Process {
    let mut command = bound_to_this_thread(program);
    let config = fleet.config(id);
    command.arg("embedded-peer").arg("--config").arg(&config);
    Process::start(command, &config.with_extension("log"))
}
