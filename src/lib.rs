//! d-engine: a strongly consistent, revisioned key-value store, replicated by Raft, for programs that coordinate.
//!
//! This crate only re-exports. Pick by feature:
//!
//! | feature | gives | default |
//! | --- | --- | --- |
//! | `server` | [`server`]: the engine, to run a node inside your process | yes |
//! | `rocksdb` | storage on RocksDB | yes |
//! | `client` | [`client`]: the smart client, alone without any server code | no |
//!
#![cfg_attr(
    feature = "client",
    doc = r#"
```no_run
use d_engine::prelude::*;

# async fn example() -> Result<(), d_engine::client::Error> {
let client = Client::builder().endpoints(["127.0.0.1:9081"]).connect().await?;
client.put("services/api", "10.0.0.1:8080").await?;
let found = client.get("services/api").await?;
# Ok(())
# }
```
"#
)]

#[cfg(feature = "client")]
pub use d_engine_client as client;
#[cfg(feature = "server")]
pub use d_engine_server as server;

/// What most programs need.
pub mod prelude {
    #[cfg(feature = "client")]
    pub use d_engine_client::{Client, Error, ErrorKind};
    #[cfg(feature = "server")]
    pub use d_engine_server::{config::RaftNodeConfig, consensus::LeaderInfo, engine::Engine, node::Node};
}
