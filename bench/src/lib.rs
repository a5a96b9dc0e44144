//! What the measuring programs share: callers that load a cluster, and the comparison with etcd.
//!
//! It measures and reports, and judges nothing; no product crate may depend on it.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement that cannot go on is worth nothing: a panic is its error message"
)]

pub mod callers;
pub mod compare;
