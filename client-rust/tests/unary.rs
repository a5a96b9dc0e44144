//! The tests of the client once more, with a unary call for each operation instead of the pipeline.

#![allow(clippy::duplicate_mod)]

#[path = "cache.rs"]
mod cache;
#[path = "exactly_once.rs"]
mod exactly_once;
#[path = "faults.rs"]
mod faults;
#[path = "leases.rs"]
mod leases;
#[path = "recipes.rs"]
mod recipes;
#[path = "watch.rs"]
mod watch;
