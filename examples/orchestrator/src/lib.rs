//! Work that is done by one process at a time: whoever leads the cluster. Leading tells who should work; the fencing
//! token tells the outside world whose work still counts.
//!
//! [`ledger`] is that outside world: something that other systems rely on and that has no part in the cluster.

pub mod ledger;

pub use ledger::{Entry, Ledger, LedgerError, Token};
