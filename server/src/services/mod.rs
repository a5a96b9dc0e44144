//! gRPC: the services of the protocol as thin adapters over [`Engine`], and the server they run in.
//!
//! The only module that names tonic's server types, apart from the service that peers talk to. It decides nothing
//! about keys, values or consensus; it gives every call a deadline, every error its details, and every resource a
//! client can take a bound.

mod cluster;
mod deadline;
mod error;
mod health;
mod kv;
mod lease;
mod listener;
mod maintenance;
mod observe;
mod pipeline;
mod server;
mod session;
#[cfg(test)]
mod tests;
mod watch;

pub use error::ServeError;
pub use listener::{bind, raise_open_files_limit};
pub use server::{serve, serve_peers};

pub(crate) use listener::Listener;

use crate::engine::Engine;

/// A service of the protocol over the engine.
struct Service {
    engine: Engine,
    deadlines: deadline::Deadlines,
}
