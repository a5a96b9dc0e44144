//! The engine inside an application's own process: started, asked and stopped by calls, without gRPC in between.
//!
//! ```text
//! EmbeddedEngine ── owns ──▶ Node ──▶ Engine, or the application's state machine
//!       │                                ▲
//!       └── client() ──▶ EmbeddedClient ─┘   (until the engine stops)
//! ```
//!
//! An [`EmbeddedEngine`] is a node with its life; an [`EmbeddedClient`] asks it. The client never forwards a write to
//! another node and never repeats one: a follower says who leads, and the application decides. It owns no data and makes
//! no decision that `engine` does not make for gRPC clients too.

mod client;
mod engine;
mod error;
mod watch;

pub use client::{EmbeddedClient, LocalKvClient};
pub use d_engine_proto::{TimeToLive, WatchEvent};
pub use engine::EmbeddedEngine;
pub use error::{EmbeddedError, LocalClientError};
pub use watch::{EventReceiver, SnapshotWatch, WatchReceiver, WatchRequest};
