//! Fan-out: one writer, and many watchers of the prefix it writes below.
//!
//! The writer is never more than a few puts ahead of what all watchers have, so that the delay of an event is what
//! delivery takes and not how long the load lasted.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use d_engine_client::{Client, WatchEvent, WatchStream};
use futures_util::stream;
use futures_util::{StreamExt, TryStreamExt};
use hdrhistogram::Histogram;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::client::{AnyClient, Call};
use super::etcd::EtcdClient;
use super::etcd::api::{WatchCreateRequest, WatchRequest, watch_client::WatchClient, watch_request::RequestUnion};
use super::report::Sample;
use super::system::Servers;
use super::workload::VALUE_BYTES;
use crate::callers::{cpu_time, latencies, micros};

pub(crate) const WATCHERS: usize = 10_000;
const PREFIX: &str = "watched/";
/// The end of the prefix as an interval.
const PREFIX_END: &str = "watched0";
/// Puts whose events are still under way to some watcher.
const AHEAD_MAX: u64 = 16;
const OPENED_AT_A_TIME: usize = 64;
/// Streams to each etcd member; the watchers are spread over them.
const ETCD_STREAMS: usize = 10;
/// One watcher in so many tells how late its events were.
const TELLING: usize = 100;
/// How long the slowest watcher may take for one event.
const PATIENCE: Duration = Duration::from_secs(60);

/// What all watchers got.
struct Deliveries {
    /// Puts carry the time since then.
    epoch: Instant,
    count: AtomicU64,
    /// Told whenever as many events have come as there are watchers.
    round: Notify,
    delays_us: Mutex<Histogram<u64>>,
}

impl Deliveries {
    /// Counts the events of these values, which one watcher got.
    fn add<'a>(&self, values: impl Iterator<Item = &'a Bytes>, telling: bool) {
        let mut count = 0;
        for value in values {
            count += 1;
            if let Some(sent) = telling.then(|| value.first_chunk()).flatten() {
                let sent = Duration::from_nanos(u64::from_be_bytes(*sent));
                let delay = micros(self.epoch.elapsed().saturating_sub(sent));
                self.delays_us.lock().unwrap_or_else(PoisonError::into_inner).saturating_record(delay);
            }
        }
        let before = self.count.fetch_add(count, Ordering::Relaxed);
        if before / WATCHERS as u64 != (before + count) / WATCHERS as u64 {
            self.round.notify_one();
        }
    }

    /// The next value to be put.
    fn value(&self) -> Bytes {
        let sent = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut value = sent.to_be_bytes().to_vec();
        value.resize(VALUE_BYTES, b'x');
        value.into()
    }

    /// Waits until all watchers have the events of so many puts.
    async fn reach(&self, puts: u64) {
        while self.count.load(Ordering::Relaxed) < puts * WATCHERS as u64 {
            let progress = tokio::time::timeout(PATIENCE, self.round.notified()).await;
            progress.expect("every watcher gets every event");
        }
    }
}

/// Opens the watches and puts for `duration`.
pub(crate) async fn measure(servers: &mut Servers, duration: Duration) -> Sample {
    let client = servers.client().await;
    let deliveries = Arc::new(Deliveries {
        epoch: Instant::now(),
        count: AtomicU64::new(0),
        round: Notify::new(),
        delays_us: Mutex::new(latencies()),
    });
    // Dropped at the end, which ends the watches.
    let _watchers = match &client {
        AnyClient::DEngine(client) => watch_d_engine(client, &deliveries).await,
        AnyClient::Etcd(client) => watch_etcd(client, &deliveries).await,
    };
    let ids = servers.ids();
    let (before, began) = (cpu_time(&ids), Instant::now());
    let mut puts = 0_u64;
    while began.elapsed() < duration {
        deliveries.reach(puts.saturating_sub(AHEAD_MAX)).await;
        let key = Bytes::from(format!("{PREFIX}{}", puts % 100));
        client.insist(Call::Put { key, value: deliveries.value() }).await;
        puts += 1;
    }
    deliveries.reach(puts).await;
    let (spent, took) = (cpu_time(&ids).saturating_sub(before), began.elapsed());
    let count = deliveries.count.load(Ordering::Relaxed) as f64;
    let delays = deliveries.delays_us.lock().unwrap_or_else(PoisonError::into_inner);
    Sample {
        ops_per_s: count / took.as_secs_f64(),
        p50_us: delays.value_at_quantile(0.5) as f64,
        p99_us: delays.value_at_quantile(0.99) as f64,
        rss_mib: servers.resident_mib(),
        cpu_us_per_op: spent.as_secs_f64() * 1e6 / count,
    }
}

async fn watch_d_engine(client: &Client, deliveries: &Arc<Deliveries>) -> JoinSet<()> {
    let open = stream::iter(0..WATCHERS).map(|_| client.watch_prefix(PREFIX).into_future());
    let open: Vec<WatchStream> = open.buffered(OPENED_AT_A_TIME).try_collect().await.expect("watches begin");
    let watchers = open.into_iter().enumerate().map(|(number, mut watch)| {
        let deliveries = Arc::clone(deliveries);
        async move {
            while let Some(Ok(update)) = watch.next().await {
                let values = update.events.iter().filter_map(|event| match event {
                    WatchEvent::Put { kv, .. } => Some(&kv.value),
                    WatchEvent::Delete { .. } => None,
                });
                deliveries.add(values, number.is_multiple_of(TELLING));
            }
        }
    });
    watchers.collect()
}

async fn watch_etcd(client: &EtcdClient, deliveries: &Arc<Deliveries>) -> JoinSet<()> {
    let streams = client.channels().len() * ETCD_STREAMS;
    let created = Arc::new(AtomicUsize::new(0));
    let mut watchers = JoinSet::new();
    for stream in 0..streams {
        let channel = client.channels()[stream % client.channels().len()].clone();
        let share = WATCHERS / streams + usize::from(stream < WATCHERS % streams);
        watchers.spawn(read_etcd(channel, share, Arc::clone(&created), Arc::clone(deliveries)));
    }
    d_engine_tests::wait::until("the watches of etcd", PATIENCE, || {
        let all = created.load(Ordering::Relaxed) == WATCHERS;
        async move { all.then_some(()) }
    })
    .await;
    watchers
}

/// So many watches on one stream.
async fn read_etcd(channel: Channel, watches: usize, created: Arc<AtomicUsize>, deliveries: Arc<Deliveries>) {
    let (requests, queue) = mpsc::channel(watches);
    for _ in 0..watches {
        let create = WatchCreateRequest { key: PREFIX.into(), range_end: PREFIX_END.into() };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        requests.try_send(request).expect("room for all");
    }
    let queue = stream::unfold(queue, |mut queue| async { Some((queue.recv().await?, queue)) });
    let answers = WatchClient::new(channel).watch(queue).await.expect("etcd serves watches");
    let mut answers = answers.into_inner();
    while let Ok(Some(answer)) = answers.message().await {
        if answer.created {
            created.fetch_add(1, Ordering::Relaxed);
        }
        let values = answer.events.iter().filter_map(|event| event.kv.as_ref()).map(|kv| &kv.value);
        deliveries.add(values, answer.watch_id.cast_unsigned().is_multiple_of(TELLING as u64));
    }
    // Kept until here: etcd ends the watches of a stream whose requests have ended.
    drop(requests);
}
