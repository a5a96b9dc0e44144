//! A client that takes orders, one a line, and says what came of each: see `tests/src/puppet.rs`.
//!
//! ```text
//! put KEY VALUE       put acknowledged REVISION | put OUTCOME KIND      (in the background)
//! lock NAME TTL_MS    locked TOKEN
//! held                held TOKEN true | held TOKEN false
//! write WHAT          write TOKEN WHAT      (without a look whether the lock is held, as a careless holder does)
//! release             released | release KIND
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed order ends the puppet")]

use std::io::BufRead;
use std::time::Duration;

use d_engine_client::{Client, LockGuard, Outcome};
use tokio::sync::mpsc;

/// Longer than any test: what a puppet is told to do it does until it knows what came of it.
const TIMEOUT: Duration = Duration::from_secs(120);

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let client = Client::builder().endpoints(std::env::args().skip(1)).call_timeout(TIMEOUT).build().unwrap();
    let (given, mut orders) = mpsc::channel(64);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if given.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let mut guard = None;
    while let Some(order) = orders.recv().await {
        obey(&client, &mut guard, &order).await;
    }
}

async fn obey(client: &Client, guard: &mut Option<LockGuard>, order: &str) {
    let words: Vec<&str> = order.split(' ').collect();
    match words[..] {
        ["put", key, value] => {
            let put = client.put(key, value);
            tokio::spawn(async move {
                match put.await {
                    Ok(answer) => println!("put acknowledged {}", answer.header.revision),
                    Err(error) if error.outcome() == Outcome::NotApplied => {
                        println!("put not-applied {}", error.kind().name());
                    }
                    Err(error) => println!("put unknown {}", error.kind().name()),
                }
            });
        }
        ["lock", name, ttl_ms] => {
            let ttl = Duration::from_millis(ttl_ms.parse().unwrap());
            let acquired = client.lock(name).ttl(ttl).acquire().await.unwrap();
            println!("locked {}", acquired.token());
            *guard = Some(acquired);
        }
        ["held"] => {
            let guard = guard.as_ref().expect("a lock was taken");
            println!("held {} {}", guard.token(), guard.is_held());
        }
        ["write", what] => println!("write {} {what}", guard.as_ref().expect("a lock was taken").token()),
        ["release"] => match guard.take().expect("a lock was taken").release().await {
            Ok(()) => println!("released"),
            Err(error) => println!("release {}", error.kind().name()),
        },
        _ => panic!("an order nobody understands: {order}"),
    }
}
