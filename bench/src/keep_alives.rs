//! How many leases a cluster keeps alive, and what one keep-alive costs.

use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use d_engine_client::{Client, LeaseId};
use d_engine_proto::v1::LeaseRenewRequest;
use d_engine_proto::v1::lease_client::LeaseClient;
use d_engine_tests::cluster::Cluster;
use futures_util::{StreamExt, TryStreamExt};

use d_engine_tests::processes;

const LEASES: usize = 10_000;
const TTL: Duration = Duration::from_secs(600);
/// Renewals of the stream whose answers are still to come.
const IN_FLIGHT: usize = 1000;

pub(crate) struct KeepAlives {
    per_second: f64,
    server_cpu_us: f64,
}

/// Grants leases and renews them in turn over one stream to the leader, as fast as the answers allow.
pub(crate) async fn measure(duration: Duration) -> KeepAlives {
    let cluster = Cluster::start(3).await;
    let client = Client::builder().endpoints(cluster.addresses()).connect().await.expect("the cluster is ready");
    let grant = |_| async { client.grant_lease(TTL).await.map(|granted| granted.lease) };
    let leases: Vec<LeaseId> =
        futures_util::stream::iter(0..LEASES).map(grant).buffered(64).try_collect().await.expect("a healthy cluster");
    let leader = cluster.node(cluster.leader(&[]).await).address;
    let mut service = LeaseClient::connect(format!("http://{leader}")).await.expect("the leader listens");
    let servers = processes::servers();
    let cpu = || servers.iter().map(|id| processes::cpu_time(*id)).sum::<Duration>();

    let (requests, queue) = tokio::sync::mpsc::channel(IN_FLIGHT);
    let mut next = leases.iter().cycle().map(|lease| LeaseRenewRequest { lease: lease.get() });
    let mut fill = |count: usize| {
        for request in next.by_ref().take(count) {
            requests.try_send(request).expect("one request for each answer");
        }
    };
    fill(IN_FLIGHT);
    let queue = futures_util::stream::unfold(queue, |mut queue| async { Some((queue.recv().await?, queue)) });
    let mut answers = service.keep_alive(queue).await.expect("the leader serves it").into_inner();
    let (cpu_before, began) = (cpu(), Instant::now());
    let mut renewed = 0_u64;
    while began.elapsed() < duration {
        let answer = answers.message().await.expect("the leader stays").expect("endless");
        assert!(answer.ttl_ms > 0, "lease {} is lost", answer.lease);
        renewed += 1;
        fill(1);
    }
    KeepAlives {
        per_second: renewed as f64 / began.elapsed().as_secs_f64(),
        server_cpu_us: cpu().saturating_sub(cpu_before).as_secs_f64() * 1e6 / renewed as f64,
    }
}

pub(crate) fn table(figures: &KeepAlives) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["leases", "in flight", "keep-alives/s", "server CPU µs each, all three nodes"]);
    table.add_row([
        LEASES.to_string(),
        IN_FLIGHT.to_string(),
        format!("{:.0}", figures.per_second),
        format!("{:.2}", figures.server_cpu_us),
    ]);
    table
}
