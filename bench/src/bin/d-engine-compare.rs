//! Measures d-engine beside etcd, and prints one table of ratios: `make bench`, `make bench-quick`.

use clap::Parser;
use d_engine_bench::compare::{self, Arguments};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() {
    compare::run(&Arguments::parse()).await;
}
