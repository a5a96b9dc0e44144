//! The queue on one node that restarts, and on three of which one is lost.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step ends the test")]

use std::path::Path;
use std::sync::Arc;

use d_engine::prelude::*;
use d_engine::proto::v1;
use d_engine_example_custom_state_machine::{Answer, Command, JobQueue, Question};
use d_engine_tests::embedded::Fleet;
use d_engine_tests::process::{Process, bound_to_this_thread};
use d_engine_tests::wait::{self, PATIENCE};

async fn start(fleet: &Fleet, id: u32) -> EmbeddedEngine {
    let config = fleet.config(id);
    let directory = config.with_extension("");
    let storage = Arc::new(RocksDBStorageEngine::new(directory.join("log")).unwrap());
    let queue = Arc::new(JobQueue::open(directory.join("queue")).unwrap());
    EmbeddedEngine::start_custom(storage, queue, config.to_str()).await.unwrap()
}

async fn tell(client: &EmbeddedClient, command: &Command) -> Result<Answer, LocalClientError> {
    let answer = client.propose(serde_json::to_vec(command).unwrap()).await?;
    Ok(serde_json::from_slice(&answer).unwrap())
}

async fn counts(client: &EmbeddedClient) -> Result<Answer, LocalClientError> {
    let answer = client.query(serde_json::to_vec(&Question::Counts).unwrap()).await?;
    Ok(serde_json::from_slice(&answer).unwrap())
}

fn add(work: &str) -> Command {
    Command::Add { work: work.into() }
}

fn take(worker: &str, for_ms: u64) -> Command {
    Command::Take { worker: worker.into(), for_ms }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_survives_restarts_and_time_goes_on_where_it_stood() {
    let fleet = Fleet::prepared(1);
    for round in 1..=3 {
        let engine = start(&fleet, 1).await;
        engine.wait_ready(PATIENCE).await.unwrap();
        let client = engine.client();
        assert_eq!(tell(&client, &add("work")).await.unwrap(), Answer::Added(round));
        engine.stop().await.unwrap();
    }
    let engine = start(&fleet, 1).await;
    engine.wait_ready(PATIENCE).await.unwrap();
    let client = engine.client();
    let work = "work".to_owned();
    assert_eq!(tell(&client, &take("slow", 50)).await.unwrap(), Answer::Taken { id: 1, work: work.clone() });
    wait::until("a job to be given to the next", PATIENCE, || async {
        match tell(&client, &take("quick", 60_000)).await.unwrap() {
            Answer::Taken { id: 1, .. } => Some(()),
            Answer::Taken { .. } | Answer::Nothing => None,
            other => panic!("{other:?}"),
        }
    })
    .await;
    let finish = Command::Finish { id: 1, worker: "slow".into() };
    assert_eq!(tell(&client, &finish).await.unwrap(), Answer::NotYours);
    engine.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_answered_and_keys_are_not_supported() {
    let fleet = Fleet::prepared(1);
    let engine = start(&fleet, 1).await;
    engine.wait_ready(PATIENCE).await.unwrap();
    let client = engine.client();
    let answer = client.propose("nonsense").await.unwrap();
    assert!(matches!(serde_json::from_slice(&answer).unwrap(), Answer::Malformed(_)));
    assert_eq!(counts(&client).await.unwrap(), Answer::Counts { waiting: 0, taken: 0 });
    for error in [
        client.put("k", "v").await.unwrap_err(),
        client.get_eventual("k").await.unwrap_err(),
        client.watch("k").await.map(drop).unwrap_err(),
        client.engine().map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, LocalClientError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("propose"), "{error}");
    }
    engine.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_have_one_queue_and_go_on_without_one() {
    let fleet = Fleet::prepared(3);
    let mut engines = Vec::new();
    for id in 1..=3 {
        engines.push(start(&fleet, id).await);
    }
    let mut expected = 0;
    for _ in 0..2 {
        let leader =
            wait::until("a leader", PATIENCE, || async { engines.iter().position(|engine| engine.is_leader()) }).await;
        let client = engines[leader].client();
        wait::until("it to serve", PATIENCE, || async { counts(&client).await.ok() }).await;
        for _ in 0..10 {
            expected += 1;
            assert_eq!(tell(&client, &add("work")).await.unwrap(), Answer::Added(expected));
        }
        for engine in &engines {
            engine.wait_ready(PATIENCE).await.unwrap();
            let waiting = usize::try_from(expected).unwrap();
            assert_eq!(counts(&engine.client()).await.unwrap(), Answer::Counts { waiting, taken: 0 });
            if !engine.is_leader() {
                assert!(tell(&engine.client(), &add("work")).await.unwrap_err().is_not_leader());
            }
        }
        engines.remove(leader).stop().await.unwrap();
        if engines.len() == 1 {
            break;
        }
    }
    // One of three is no majority: it says so, and does not answer from what it has.
    let last = &engines[0];
    wait::until("the last one to notice", PATIENCE, || async { (!last.is_leader()).then_some(()) }).await;
    assert_eq!(tell(&last.client(), &add("work")).await.unwrap_err().outcome(), v1::Outcome::NotApplied);
    assert!(counts(&last.client()).await.is_err());
    for engine in engines {
        engine.stop().await.unwrap();
    }
}

#[tokio::test]
async fn the_program_runs() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = bound_to_this_thread(Path::new(env!("CARGO_BIN_EXE_d-engine-example-custom-state-machine")));
    command.current_dir(&directory);
    let mut program = Process::start(command, &directory.path().join("output"));
    assert!(program.exit(PATIENCE).await.success(), "{}", program.output());
    let output = program.output();
    assert!(output.ends_with("Counts { waiting: 0, taken: 1 }\n"), "{output}");
}
