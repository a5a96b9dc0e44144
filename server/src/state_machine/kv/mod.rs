//! The key-value state machine: revisioned keys, transactions, and reads of the present and the past.
//!
//! [`Store`] is the present, in memory, and pure: it takes an entry and returns answers and changes. Leases and sessions
//! are part of it and expire by the store time of entries. [`KvStateMachine`] publishes it to readers and hands what
//! changed to the history in [`storage`](crate::storage::versions). Nothing here reads a clock, awaits or knows of Raft,
//! gRPC or RocksDB; linearizability is the business of whoever calls.

mod command;
mod epoch;
mod error;
mod hash;
mod invariants;
mod keys;
mod leases;
mod machine;
mod page;
mod past;
mod read;
mod recent;
mod room;
mod rules;
mod sessions;
mod step;
mod store;
#[cfg(test)]
mod tests;

pub use epoch::REVISION_GAP;
pub use error::{KeyText, KvError, ReadError};
pub use hash::STATE_HASH_KIND;
pub use leases::LeaseView;
pub use machine::{KvStateMachine, ReadPoint};
pub use past::{PastRevision, PastStore};
pub(crate) use rules::validate_key;
pub use rules::{
    is_read_only, validate, validate_compact, validate_get, validate_get_many, validate_lease_list,
    validate_lease_renew, validate_lease_time_to_live, validate_range, validate_txn,
};
pub use store::Store;
