//! Many keys: what they take in memory, and how long a restart with them takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use d_engine_client::Consistency;
use d_engine_tests::wait;
use tokio::task::JoinSet;

use super::client::Call;
use super::report::Sample;
use super::system::Servers;
use super::workload::{VALUE_BYTES, key};
use crate::callers::micros;

pub(crate) const WRITERS: usize = 1000;

/// Puts each of so many keys once. The rate and the memory are those of the sample.
pub(crate) async fn fill(servers: &mut Servers, keys: u64) -> Sample {
    let client = servers.client().await;
    let began = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let value = Bytes::from(vec![b'x'; VALUE_BYTES]);
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let (client, next, value) = (client.clone(), Arc::clone(&next), value.clone());
        writers.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= keys {
                    return;
                }
                let put = Call::Put { key: key(number), value: value.clone() };
                client.insist(put).await;
            }
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer.expect("a writer does not panic");
    }
    Sample {
        ops_per_s: keys as f64 / began.elapsed().as_secs_f64(),
        rss_mib: servers.resident_mib(),
        ..Sample::default()
    }
}

/// Stops all servers and starts them again: from the start to the first linearizable read of a key.
pub(crate) async fn restart(servers: &mut Servers) -> Sample {
    servers.stop_all().await;
    let began = Instant::now();
    servers.start_all().await;
    let client = servers.client().await;
    wait::until("a linearizable read", wait::PATIENCE, || async {
        let get = Call::Get { key: key(0), consistency: Consistency::Linearizable };
        client.call(get).await.ok()
    })
    .await;
    let took = micros(began.elapsed()) as f64;
    Sample { p50_us: took, p99_us: took, rss_mib: servers.resident_mib(), ..Sample::default() }
}
