//! A node as `d-engine server --config PATH` runs it, with fault points that are armed by orders on standard input: see
//! `tests/src/faulty.rs`, which gives them, and `server/src/faults.rs`, which says what they mean.
//!
//! ```text
//! arm POINT/OPERATION TIMES ACTION     armed            (0 times: disarmed)
//!                                      reached POINT/OPERATION     whenever a call reaches a point
//! ```
//! It ends when nobody can give it orders any more, so that none outlives its test. It must never be shipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the node")]

use std::io::BufRead;
use std::path::PathBuf;

use clap::Parser;
use d_engine_server::config::RaftNodeConfig;
use d_engine_server::faults;
use d_engine_server::node::Node;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
struct Options {
    /// Always `server`, so that it can stand in for `d-engine`
    command: String,
    /// Configuration file in TOML
    #[arg(long)]
    config: PathBuf,
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let options = Options::parse();
    assert_eq!(options.command, "server");
    tracing_subscriber::fmt()
        .with_env_filter("info,openraft=error")
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let config = RaftNodeConfig::new().unwrap().with_override_config(&options.config).unwrap().validate().unwrap();
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    // Before the node: it may die while it starts.
    std::thread::spawn(|| {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            obey(&line);
        }
        std::process::exit(0);
    });
    let node = Node::start(config).await.expect("the node starts");
    faults::prepare(node.engine().clone(), |point| println!("reached {point}"));
    node.run(async move {
        terminate.recv().await;
    })
    .await
    .expect("the node ends well");
    // The thread that reads orders must not keep it.
    std::process::exit(0);
}

fn obey(line: &str) {
    let words: Vec<&str> = line.splitn(4, ' ').collect();
    match words[..] {
        ["arm", point, times, action] => faults::arm(point, times.parse().unwrap(), action).unwrap(),
        _ => panic!("an order nobody understands: {line}"),
    }
    println!("armed");
}
