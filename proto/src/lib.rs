//! d-engine's protocol: the messages and stubs generated from `d_engine/v1/*.proto`, and the vocabulary that
//! server, client and every language binding share: error codes, limits, defaults, number types.
//!
//! Nothing here decides or does anything. It never depends on another crate of the workspace.
//!
//! Everything generated is checked in, so that a user of the crate needs no protobuf compiler; `make generate`
//! rewrites it and a test fails when it is stale.

mod change;
mod error;
mod numbers;
mod time_to_live;
mod trace;
mod vocabulary;

pub use change::WatchEvent;
pub use error::{DetailedStatus, RetryWhere};
pub use numbers::{Epoch, LeaseId, LogIndex, NodeId, Revision, SessionId, Term};
pub use time_to_live::TimeToLive;
pub use trace::TRACEPARENT;
pub use vocabulary::{ErrorCode, defaults, limits};

/// Messages and stubs of package `d_engine.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    include!("generated/d_engine.v1.rs");
}

impl From<v1::command::Command> for v1::Command {
    fn from(command: v1::command::Command) -> Self {
        Self { command: Some(command), ..Self::default() }
    }
}

/// The encoded `FileDescriptorSet` of every file, as gRPC reflection serves it.
#[cfg(feature = "server")]
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptors.bin");

/// Version of the peer protocol (`peer.proto`); members with different ones refuse each other.
pub const PEER_PROTOCOL_VERSION: u32 = 2;
