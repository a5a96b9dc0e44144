//! Fail-over under load: from SIGKILL of the leader to the first put acknowledged that began after it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use d_engine_tests::wait;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::client::{AnyClient, Call};
use super::report::Sample;
use super::system::Servers;
use super::workload::{KEYS, VALUE_BYTES, key};
use crate::callers::{latencies, micros};

pub(crate) const CALLERS: usize = 64;
/// How long an etcd member may take for a put before another one is asked: a put that reached a member without a leader
/// is answered only after many seconds, and a user who knows does not wait for it.
const ETCD_PATIENCE: Duration = Duration::from_millis(200);
/// How long there is load before a kill.
const LOADED_FOR: Duration = Duration::from_millis(500);

/// What the callers know of the kill, and tell.
struct Kill {
    epoch: Instant,
    /// Microseconds since the epoch; none while there was no kill.
    at_us: AtomicU64,
    acknowledged: mpsc::Sender<Instant>,
    puts: AtomicU64,
}

/// Kills the leader so many times, under load, and starts it again. The times are the latencies of the sample.
pub(crate) async fn measure(servers: &mut Servers, kills: u32) -> Sample {
    let client = servers.client().await;
    let mut times = latencies();
    let (acknowledged, mut first) = mpsc::channel(1);
    let kill = Arc::new(Kill {
        epoch: Instant::now(),
        at_us: AtomicU64::new(u64::MAX),
        acknowledged,
        puts: AtomicU64::new(0),
    });
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        callers.spawn(put_forever(client.clone(), Arc::clone(&kill)));
    }
    for _ in 0..kills {
        tokio::time::sleep(LOADED_FOR).await;
        servers.kill_leader().await;
        let killed = Instant::now();
        kill.at_us.store(micros(kill.epoch.elapsed()), Ordering::Relaxed);
        let answered = tokio::time::timeout(wait::PATIENCE, after(killed, &mut first)).await.expect("a new leader");
        kill.at_us.store(u64::MAX, Ordering::Relaxed);
        times.saturating_record(micros(answered - killed));
        servers.start_all().await;
    }
    Sample {
        ops_per_s: kill.puts.load(Ordering::Relaxed) as f64 / kill.epoch.elapsed().as_secs_f64(),
        p50_us: times.value_at_quantile(0.5) as f64,
        p99_us: times.value_at_quantile(0.99) as f64,
        rss_mib: servers.resident_mib(),
        cpu_us_per_op: 0.0,
    }
}

/// The first acknowledgement after the kill; what late callers said of an earlier one does not count.
async fn after(killed: Instant, acknowledged: &mut mpsc::Receiver<Instant>) -> Instant {
    loop {
        let at = acknowledged.recv().await.expect("callers go on");
        if at > killed {
            return at;
        }
    }
}

async fn put_forever(client: AnyClient, kill: Arc<Kill>) {
    let value = bytes::Bytes::from(vec![b'x'; VALUE_BYTES]);
    loop {
        let began = micros(kill.epoch.elapsed());
        let (key, value) = (key(fastrand::u64(..KEYS)), value.clone());
        let succeeded = match &client {
            AnyClient::DEngine(_) => client.call(Call::Put { key, value }).await.is_ok(),
            AnyClient::Etcd(client) => client.put_anywhere(key, value, ETCD_PATIENCE).await,
        };
        if !succeeded {
            // A dead member refuses at once; the runtime must get to the others.
            tokio::task::yield_now().await;
            continue;
        }
        kill.puts.fetch_add(1, Ordering::Relaxed);
        if began > kill.at_us.load(Ordering::Relaxed) {
            // Full: another caller was first.
            let _ = kill.acknowledged.try_send(Instant::now());
        }
    }
}
