//! The smallest program with an engine in its own process: `cargo run -p d-engine-example-quick-start-embedded`.

use std::error::Error;
use std::time::Duration;

use d_engine::prelude::*;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // One node, no configuration, no port; its data in ./db.
    let engine = EmbeddedEngine::start().await?;
    let leader = engine.wait_ready(Duration::from_secs(5)).await?;
    println!("node {} leads in term {}", leader.leader_id, leader.term);

    let client = engine.client();
    let mut changes = client.watch(b"greeting").await?;
    client.put(b"greeting", b"hello").await?;
    if let Some(value) = client.get(b"greeting").await? {
        println!("greeting is {}", String::from_utf8_lossy(&value));
    }
    match changes.recv().await {
        Some(WatchEvent::Put(key, value)) => {
            println!("changed: {} = {}", String::from_utf8_lossy(&key), String::from_utf8_lossy(&value));
        }
        Some(WatchEvent::Delete(key)) => println!("deleted: {}", String::from_utf8_lossy(&key)),
        None => println!("the watch ended: {:?}", changes.end_reason()),
    }

    engine.stop().await?;
    Ok(())
}
