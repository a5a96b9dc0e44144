//! Test support on real processes: clusters of `d-engine` servers, faults done to them, and what judges the outcome.
//!
//! Everything here serves a test and therefore ends it with a panic that says what was expected. It must never be
//! depended on by a product crate.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "test support: a failed step ends the test with a message"
)]

pub mod seed;
pub mod wait;

pub mod cluster;
pub mod data_set;
pub mod direct;
pub mod embedded;
pub mod faulty;
pub mod history;
pub mod http;
pub mod nemesis;
pub mod network;
pub mod process;
pub mod proxy;
pub mod puppet;
pub mod steady;
pub mod transcript;
pub mod transports;
pub mod workload;

pub mod lifetime;
pub mod once;
pub mod resource;
pub mod truth;
pub mod watched;
pub mod watchers;

pub mod licences;
pub mod tidy;
