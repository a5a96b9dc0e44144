//! One node, asked directly: no routing, no retry, no discovery. For tests that must know who answers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use d_engine_client::KeyRange;
use d_engine_proto::v1::{
    self, Consistency, GetRequest, GetResponse, PutRequest, PutResponse, RangeRequest, ReadOptions, StatusRequest,
    StatusResponse, cluster_client::ClusterClient, kv_client::KvClient, lease_client::LeaseClient,
    session_client::SessionClient, watch_client::WatchClient,
};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// A connection to one node. Every call has a deadline.
#[derive(Clone, Debug)]
pub struct DirectNode {
    channel: Channel,
    deadline: Duration,
    starts: Arc<AtomicU64>,
}

impl DirectNode {
    /// Connects with the first call; each call may take as long as `deadline`. `starts` counts the starts of its process.
    #[must_use]
    pub fn new(address: SocketAddr, deadline: Duration, starts: Arc<AtomicU64>) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a socket address makes a URL");
        Self { channel: endpoint.connect_timeout(deadline).connect_lazy(), deadline, starts }
    }

    /// Which of the node's processes is the latest. What two of them answer does not compare: the later one may not have
    /// applied yet what the earlier one had.
    #[must_use]
    pub fn life(&self) -> u64 {
        self.starts.load(Ordering::SeqCst)
    }

    /// Writes one key.
    ///
    /// # Errors
    /// The status, as it came.
    pub async fn put(&self, key: &str, value: &str) -> Result<PutResponse, Status> {
        let request = PutRequest {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Bytes::copy_from_slice(value.as_bytes()),
            ..PutRequest::default()
        };
        Ok(KvClient::new(self.channel.clone()).put(self.timed(request)).await?.into_inner())
    }

    /// Reads one key.
    ///
    /// # Errors
    /// The status, as it came.
    pub async fn get(&self, key: &str, consistency: Consistency, min_revision: u64) -> Result<GetResponse, Status> {
        let request = GetRequest {
            key: Bytes::copy_from_slice(key.as_bytes()),
            read: Some(ReadOptions { consistency: consistency as i32, min_revision, revision: 0 }),
        };
        Ok(KvClient::new(self.channel.clone()).get(self.timed(request)).await?.into_inner())
    }

    /// Every key below `prefix` with its value, eventually consistent but no older than `min_revision`.
    ///
    /// # Errors
    /// The status, as it came.
    pub async fn prefix(&self, prefix: &str, min_revision: u64) -> Result<BTreeMap<Bytes, Bytes>, Status> {
        self.range(&KeyRange::prefix(prefix), min_revision, 0).await
    }

    /// Every key with its value as of `revision`.
    ///
    /// # Errors
    /// The status, as it came.
    pub async fn at(&self, revision: u64) -> Result<BTreeMap<Bytes, Bytes>, Status> {
        self.range(&KeyRange::all(), revision, revision).await
    }

    async fn range(
        &self,
        range: &KeyRange,
        min_revision: u64,
        revision: u64,
    ) -> Result<BTreeMap<Bytes, Bytes>, Status> {
        let mut request = RangeRequest {
            range: Some(v1::KeyRange { start: range.start().clone(), end: range.end().clone() }),
            read: Some(ReadOptions { consistency: Consistency::Eventual as i32, min_revision, revision }),
            ..RangeRequest::default()
        };
        let mut found = BTreeMap::new();
        loop {
            let page = KvClient::new(self.channel.clone()).range(self.timed(request.clone())).await?.into_inner();
            found.extend(page.kvs.into_iter().map(|kv| (kv.key, kv.value)));
            if !page.more {
                return Ok(found);
            }
            if let (Some(range), Some(read)) = (&mut request.range, &mut request.read) {
                range.start = page.next;
                read.revision = page.header.unwrap_or_default().revision;
            }
        }
    }

    /// The state of the node.
    ///
    /// # Errors
    /// The status, as it came.
    pub async fn status(&self) -> Result<StatusResponse, Status> {
        Ok(ClusterClient::new(self.channel.clone()).status(self.timed(StatusRequest {})).await?.into_inner())
    }

    /// The stubs of the store, for requests that the methods above do not make.
    #[must_use]
    pub fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone())
    }

    /// The stubs of leases.
    #[must_use]
    pub fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel.clone())
    }

    /// The stubs of sessions.
    #[must_use]
    pub fn session(&self) -> SessionClient<Channel> {
        SessionClient::new(self.channel.clone())
    }

    /// The stubs of watches.
    #[must_use]
    pub fn watch(&self) -> WatchClient<Channel> {
        WatchClient::new(self.channel.clone())
    }

    /// A request with the deadline of this connection.
    pub fn timed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.deadline);
        request
    }
}
