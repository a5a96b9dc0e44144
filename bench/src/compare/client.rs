//! What the load asks for, the same of both systems.

use std::time::{Duration, Instant};

use bytes::Bytes;
use d_engine_client::{Client, Compare, Consistency, KeyRange, Op, Txn};

use d_engine_tests::wait;

use super::etcd::EtcdClient;

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(50);

/// One operation of a workload.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    Put {
        key: Bytes,
        value: Bytes,
    },
    /// Of a key that exists.
    Get {
        key: Bytes,
        consistency: Consistency,
    },
    /// A transaction that writes the key, which exists.
    CompareAndPut {
        key: Bytes,
        value: Bytes,
    },
    /// A linearizable read of `limit` keys, of which there are enough.
    Range {
        from: Bytes,
        end: Bytes,
        limit: usize,
    },
}

/// A client of one of the systems, as its users have it.
#[derive(Clone)]
pub(crate) enum AnyClient {
    DEngine(Client),
    Etcd(EtcdClient),
}

impl AnyClient {
    /// Makes a call.
    ///
    /// # Errors
    /// When it fails, or is answered with something else than was to be expected.
    pub(crate) async fn call(&self, call: Call) -> Result<(), String> {
        match self {
            Self::DEngine(client) => call_d_engine(client, call).await,
            Self::Etcd(client) => client.call(call).await,
        }
    }
}

impl AnyClient {
    /// Makes a call again and again until it succeeds: on a busy machine a cluster is without a leader for a moment.
    ///
    /// # Panics
    /// When it does not; the message has the last error.
    pub(crate) async fn insist(&self, call: Call) {
        let began = Instant::now();
        while let Err(error) = self.call(call.clone()).await {
            assert!(began.elapsed() < wait::PATIENCE, "gave up after {:?}: {error}", wait::PATIENCE);
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// An error unless the answer was the expected one.
pub(crate) fn expected(as_expected: bool) -> Result<(), String> {
    if as_expected { Ok(()) } else { Err("another answer than expected".to_owned()) }
}

async fn call_d_engine(client: &Client, call: Call) -> Result<(), String> {
    let as_expected = match call {
        Call::Put { key, value } => client.put(key, value).await.map(|_| true),
        Call::Get { key, consistency } => {
            client.get(key).consistency(consistency).await.map(|answer| answer.kv.is_some())
        }
        Call::CompareAndPut { key, value } => {
            let txn = Txn::new().when(Compare::exists(key.clone())).then(Op::put(key, value));
            client.txn(txn).await.map(|answer| answer.succeeded)
        }
        Call::Range { from, end, limit } => {
            let range = client.range(KeyRange::between(from, end)).limit(limit as u64);
            range.consistency(Consistency::Linearizable).await.map(|page| page.kvs.len() == limit)
        }
    };
    expected(as_expected.map_err(|error| error.to_string())?)
}
