//! What clients keep in memory that do nothing: themselves, and their connections on the server.

use comfy_table::{Table, presets};
use d_engine_client::Client;
use d_engine_tests::cluster::Cluster;

use d_engine_tests::processes;

/// Bytes for each.
pub(crate) struct Idle {
    clients: usize,
    bytes_per_client: f64,
    server_bytes_per_connection: f64,
}

/// Builds so many clients of one node, lets each read once, and looks at what they and the server keep.
pub(crate) async fn measure(number: usize) -> Idle {
    let cluster = Cluster::start(1).await;
    let servers = processes::servers();
    let resident = |ids: &[u32]| ids.iter().map(|id| processes::resident_bytes(*id)).sum::<u64>() as f64;
    let own = [std::process::id()];
    let connect = async || {
        let client = Client::builder().endpoints(cluster.addresses()).connect().await.expect("the node is ready");
        client.get("nothing").await.expect("a healthy node");
        client
    };
    // What the first clients bring about once is not theirs.
    for _ in 0..10 {
        connect().await.close();
    }
    let before = (resident(&own), resident(&servers));
    let mut clients = Vec::with_capacity(number);
    for _ in 0..number {
        clients.push(connect().await);
    }
    let each = |after: f64, before: f64| (after - before).max(0.0) / number as f64;
    let (bytes_per_client, server_bytes_per_connection) =
        (each(resident(&own), before.0), each(resident(&servers), before.1));
    Idle { clients: clients.len(), bytes_per_client, server_bytes_per_connection }
}

pub(crate) fn table(idle: &Idle) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["idle clients of one node", "bytes per client", "server bytes per connection"]);
    table.add_row([
        idle.clients.to_string(),
        format!("{:.0}", idle.bytes_per_client),
        format!("{:.0}", idle.server_bytes_per_connection),
    ]);
    table
}
