//! Three processes of which one works; it is paused in the middle of a step, and killed.
#![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use d_engine_example_orchestrator::{Entry, Ledger, Token};
use d_engine_tests::embedded::Fleet;
use d_engine_tests::process::{Process, bound_to_this_thread};
use d_engine_tests::wait::{self, PATIENCE};

struct Workers {
    fleet: Fleet,
    ledger: Ledger,
    processes: BTreeMap<u32, Process>,
}

impl Workers {
    fn start() -> Self {
        let fleet = Fleet::prepared(3);
        let ledger = Ledger::at(fleet.config(1).with_file_name("ledger"));
        let mut workers = Self { fleet, ledger, processes: BTreeMap::new() };
        for id in 1..=3 {
            workers.run(id);
        }
        workers
    }

    fn run(&mut self, id: u32) {
        let config = self.fleet.config(id);
        let mut command = bound_to_this_thread(Path::new(env!("CARGO_BIN_EXE_d-engine-example-orchestrator")));
        command.arg("--config-path").arg(&config).arg("--ledger").arg(config.with_file_name("ledger"));
        self.processes.insert(id, Process::start(command, &config.with_extension("log")));
    }

    /// The last entry, once somebody works by a token after this one.
    async fn works_after(&self, token: Option<Token>) -> Entry {
        wait::until("somebody to work", PATIENCE, || async {
            self.ledger.entries().unwrap().last().copied().filter(|last| Some(last.token) > token)
        })
        .await
    }

    /// Nothing was entered by a token that was superseded, and every token is one node's.
    fn check(&self) {
        let entries = self.ledger.entries().unwrap();
        assert!(entries.is_sorted_by_key(|entry| entry.token), "a superseded leader changed the ledger: {entries:?}");
        let mut owners = BTreeMap::new();
        for Entry { token, node } in entries {
            assert_eq!(*owners.entry((token.epoch, token.revision)).or_insert(node), node);
        }
    }
}

#[tokio::test]
async fn a_paused_leader_is_refused_by_its_token() {
    let workers = Workers::start();
    let mut refusals = 0;
    let mut token = None;
    for _ in 0..20 {
        let leader = workers.works_after(token).await;
        let process = &workers.processes[&leader.node];
        let said = |what: &str| process.output().matches(what).count();
        let (refused, ended) = (said("refused"), said("leads no more"));
        process.pause();
        let successor = workers.works_after(Some(leader.token)).await;
        assert_ne!(successor.node, leader.node);
        process.resume();
        // The step that was under way ends: refused, unless there was none at that moment.
        wait::until("the paused leader to notice", PATIENCE, || async {
            (said("refused") + said("leads no more") > refused + ended).then_some(())
        })
        .await;
        refusals += said("refused") - refused;
        token = Some(leader.token);
        workers.check();
        if refusals >= 2 {
            break;
        }
    }
    assert!(refusals > 0, "no step was under way when its process was paused: nothing was shown");
    workers.check();
}

#[tokio::test]
async fn another_one_works_when_the_leader_is_killed() {
    let mut workers = Workers::start();
    for _ in 0..2 {
        let leader = workers.works_after(None).await;
        workers.processes.get_mut(&leader.node).unwrap().kill();
        let killed = Instant::now();
        let successor = workers.works_after(Some(leader.token)).await;
        println!("work goes on {:?} after the leader was killed", killed.elapsed());
        assert_ne!(successor.node, leader.node);
        workers.run(leader.node);
        workers.check();
    }
    for process in workers.processes.values_mut() {
        assert!(process.stop(PATIENCE).await.success(), "{}", process.output());
    }
}
