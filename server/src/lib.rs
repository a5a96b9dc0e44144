//! The d-engine server: Raft consensus, storage, the key-value state machine and the gRPC services.
//!
//! Dependencies point one way: `services` → [`engine`] → `consensus` and [`state_machine`] → [`storage`].
//! What is absent is the architecture: only `consensus` names openraft, only `storage` names RocksDB, only
//! `services` names tonic's server types, and the state machine reads no clock and awaits nothing.

pub mod clock;
pub mod config;
pub mod consensus;
pub mod engine;
#[cfg(feature = "fault-points")]
pub mod faults;
pub mod limits;
pub mod metrics;
pub mod monitoring;
pub mod node;
pub mod services;
pub mod state_machine;
mod steps;
pub mod storage;
pub mod tls;
pub mod trace;
pub mod watch;
