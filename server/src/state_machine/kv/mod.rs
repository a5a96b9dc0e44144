//! The key-value state machine: revisioned keys, transactions, and reads of the present and the past.
//!
//! [`Store`] is the present, in memory, and pure: it takes an entry and returns answers and changes. [`KvStateMachine`]
//! publishes it to readers and hands the changes to the history in [`storage`](crate::storage::versions). Nothing here
//! reads a clock, awaits or knows of Raft, gRPC or RocksDB; linearizability is the business of whoever calls.

mod command;
mod error;
mod keys;
mod machine;
mod page;
mod past;
mod read;
mod recent;
mod room;
mod rules;
mod store;
#[cfg(test)]
mod tests;

pub use error::{KeyText, KvError, ReadError};
pub use machine::{KvStateMachine, ReadPoint};
pub use past::{PastRevision, PastStore};
pub use rules::{is_read_only, validate, validate_get, validate_get_many, validate_range, validate_txn};
pub use store::Store;
