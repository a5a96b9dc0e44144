//! What a keep-alive costs: many leases, renewed in turn over one stream to the leader as fast as the answers allow.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use d_engine_proto::v1::LeaseRenewRequest;
use d_engine_proto::v1::lease_client::LeaseClient as DEngineLeases;
use d_engine_tests::wait;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::sync::mpsc;

use super::client::AnyClient;
use super::etcd::api::{LeaseGrantRequest, LeaseKeepAliveRequest};
use super::report::Sample;
use super::system::Servers;
use crate::callers::{cpu_time, latencies, micros};

pub(crate) const LEASES: usize = 10_000;
const TTL: Duration = Duration::from_secs(600);
const GRANTS_IN_FLIGHT: usize = 64;
/// Renewals of the stream whose answers are still to come.
const IN_FLIGHT: usize = 1000;

/// Grants the leases and renews them for `duration`.
pub(crate) async fn measure(servers: &mut Servers, duration: Duration) -> Sample {
    let client = servers.client().await;
    let leases: Vec<u64> = stream::iter(0..LEASES).map(|_| grant(&client)).buffered(GRANTS_IN_FLIGHT).collect().await;
    let (requests, queue) = mpsc::channel(IN_FLIGHT);
    let mut next = leases.into_iter().cycle();
    let mut renew = || {
        requests.try_send(next.next().expect("endless")).expect("one request for each answer");
        Instant::now()
    };
    let mut in_flight: VecDeque<Instant> = (0..IN_FLIGHT).map(|_| renew()).collect();
    // After the first requests: etcd opens the stream with its first answer.
    let mut answers = renewals(servers, &client, queue).await;
    let ids = servers.ids();
    let mut times = latencies();
    let (before, began) = (cpu_time(&ids), Instant::now());
    while began.elapsed() < duration {
        let answer = tokio::time::timeout(wait::PATIENCE, answers.next()).await.expect("the leader answers");
        assert_eq!(answer, Some(true), "a lease is lost, or the leader");
        let sent = in_flight.pop_front().expect("one for each answer");
        times.saturating_record(micros(sent.elapsed()));
        in_flight.push_back(renew());
    }
    let (spent, took) = (cpu_time(&ids).saturating_sub(before), began.elapsed());
    Sample {
        ops_per_s: times.len() as f64 / took.as_secs_f64(),
        p50_us: times.value_at_quantile(0.5) as f64,
        p99_us: times.value_at_quantile(0.99) as f64,
        rss_mib: servers.resident_mib(),
        cpu_us_per_op: spent.as_secs_f64() * 1e6 / times.len() as f64,
    }
}

async fn grant(client: &AnyClient) -> u64 {
    match client {
        AnyClient::DEngine(client) => client.grant_lease(TTL).await.expect("a healthy cluster").lease.get(),
        AnyClient::Etcd(client) => {
            let request = LeaseGrantRequest { ttl: TTL.as_secs().cast_signed(), id: 0 };
            client.leases().lease_grant(request).await.expect("a healthy cluster").into_inner().id.cast_unsigned()
        }
    }
}

/// Sends what comes from the queue, and says of each renewal whether the lease lives.
async fn renewals(servers: &Servers, client: &AnyClient, queue: mpsc::Receiver<u64>) -> BoxStream<'static, bool> {
    let queue = stream::unfold(queue, |mut queue| async { Some((queue.recv().await?, queue)) });
    match (servers, client) {
        (Servers::DEngine(cluster), AnyClient::DEngine(_)) => {
            let leader = cluster.node(cluster.leader(&[]).await).address;
            let mut service = DEngineLeases::connect(format!("http://{leader}")).await.expect("the leader listens");
            let answers = service.keep_alive(queue.map(|lease| LeaseRenewRequest { lease })).await;
            answers
                .expect("the leader serves it")
                .into_inner()
                .map(|answer| answer.is_ok_and(|answer| answer.ttl_ms > 0))
                .boxed()
        }
        (_, AnyClient::Etcd(client)) => {
            let requests = queue.map(|lease| LeaseKeepAliveRequest { id: lease.cast_signed() });
            let answers = client.leases().lease_keep_alive(requests).await.expect("the leader serves it").into_inner();
            answers.map(|answer| answer.is_ok_and(|answer| answer.ttl > 0)).boxed()
        }
        _ => panic!("a client of the other system"),
    }
}
