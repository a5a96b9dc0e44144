//! d-engine: a strongly consistent, revisioned key-value store, replicated by Raft, for programs that coordinate.
//!
//! This crate re-exports the engine and its client, and has the one interface that both share: [`ClientApi`]. Pick by
//! feature:
//!
//! | feature | gives | default |
//! | --- | --- | --- |
//! | `server` | [`server`]: the engine, to run a node inside your process | yes |
//! | `rocksdb` | storage on RocksDB | yes |
//! | `client` | [`client`]: the smart client, alone without any server code | no |
//!
#![cfg_attr(
    feature = "server",
    doc = r#"
```
use d_engine::prelude::*;
use std::time::Duration;

# #[tokio::main(flavor = "current_thread")]
# async fn main() -> Result<(), Box<dyn std::error::Error>> {
# let directory = tempfile::tempdir()?;
# let file = directory.path().join("node.toml");
# std::fs::write(&file, format!("[cluster]\ndb_root_dir = {:?}", directory.path().join("db")))?;
# let engine = EmbeddedEngine::start_with(&file).await?;
# /*
let engine = EmbeddedEngine::start().await?;
# */
engine.wait_ready(Duration::from_secs(5)).await?;

let client = engine.client();
let mut changes = client.watch("services/api").await?;
client.put("services/api", "10.0.0.1:8080").await?;
assert_eq!(client.get("services/api").await?.as_deref(), Some(&b"10.0.0.1:8080"[..]));
match changes.recv().await {
    Some(WatchEvent::Put(key, value)) => println!("{key:?} is {value:?}"),
    Some(WatchEvent::Delete(key)) => println!("{key:?} is gone"),
    None => println!("the watch ended: {:?}", changes.end_reason()),
}
engine.stop().await?;
# Ok(()) }
```
"#
)]
#![cfg_attr(
    feature = "client",
    doc = r#"
And the same from another process:
```
use d_engine::prelude::*;

# #[tokio::main(flavor = "current_thread")]
# async fn main() -> Result<(), d_engine::client::Error> {
# let Ok(endpoints) = std::env::var("D_ENGINE_ENDPOINTS") else { return Ok(()) };
# let endpoints = endpoints.split(',');
# /*
let endpoints = ["127.0.0.1:9081"];
# */
let client = Client::builder().endpoints(endpoints).connect().await?;
client.put("services/api", "10.0.0.1:8080").await?;
let found = client.get("services/api").await?.into_value();
# assert!(found.is_some());
# Ok(()) }
```
"#
)]

#[cfg(feature = "client")]
pub use d_engine_client as client;
#[cfg(feature = "server")]
pub use d_engine_server as server;

mod client_api;

pub use client_api::{ClientApi, ClientApiError, ClientWatch};
#[cfg(feature = "client")]
pub use client_api::{GrpcClient, GrpcWatch};
/// The messages that [`server::engine::Engine`] takes and gives, and the number types of both modes.
pub use d_engine_proto as proto;
pub use d_engine_proto::{TimeToLive, WatchEvent};

/// What most programs need.
pub mod prelude {
    #[cfg(feature = "client")]
    pub use d_engine_client::{Client, Error, ErrorKind};
    #[cfg(feature = "server")]
    pub use d_engine_server::{
        config::RaftNodeConfig,
        consensus::LeaderInfo,
        embedded::{
            EmbeddedClient, EmbeddedEngine, EmbeddedError, EventReceiver, LocalClientError, LocalKvClient,
            SnapshotWatch, WatchReceiver, WatchRequest,
        },
        engine::Engine,
        node::{Node, NodeBuilder, NodeError},
        state_machine::{AppliedState, CommittedEntry, EntryContent, RocksDBStateMachine, StateMachine, StoreTime},
        storage::{RocksDBStorageEngine, StorageEngine, StorageError},
    };

    #[cfg(feature = "client")]
    pub use crate::GrpcClient;
    pub use crate::{ClientApi, ClientApiError, ClientWatch, TimeToLive, WatchEvent};
}
