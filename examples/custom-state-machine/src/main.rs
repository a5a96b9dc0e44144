//! A node with a job queue in place of the key-value store: `cargo run -p d-engine-example-custom-state-machine`.

use std::error::Error;
use std::time::Duration;

use d_engine::prelude::*;
use d_engine_example_custom_state_machine::{Answer, Command, JobQueue, Question};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let storage = RocksDBStorageEngine::new("db/log")?;
    let engine = EmbeddedEngine::start_custom(storage, JobQueue::open("db/queue")?, None).await?;
    engine.wait_ready(Duration::from_secs(5)).await?;

    let client = engine.client();
    let commands =
        [Command::Add { work: "paint the fence".into() }, Command::Take { worker: "tom".into(), for_ms: 60_000 }];
    for command in commands {
        let answer: Answer = serde_json::from_slice(&client.propose(serde_json::to_vec(&command)?).await?)?;
        println!("{command:?}: {answer:?}");
    }
    let answer: Answer = serde_json::from_slice(&client.query(serde_json::to_vec(&Question::Counts)?).await?)?;
    println!("{answer:?}");
    engine.stop().await?;
    Ok(())
}
