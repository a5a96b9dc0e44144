//! What the load asks for, the same of both systems.

use bytes::Bytes;
use d_engine_client::{Client, Compare, Consistency, KeyRange, Op, Txn};

use super::etcd::EtcdClient;

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
    /// Makes a call, and says whether it succeeded with the answer that was to be expected.
    pub(crate) async fn call(&self, call: Call) -> bool {
        match self {
            Self::DEngine(client) => call_d_engine(client, call).await,
            Self::Etcd(client) => client.call(call).await,
        }
    }
}

async fn call_d_engine(client: &Client, call: Call) -> bool {
    match call {
        Call::Put { key, value } => client.put(key, value).await.is_ok(),
        Call::Get { key, consistency } => {
            client.get(key).consistency(consistency).await.is_ok_and(|answer| answer.kv.is_some())
        }
        Call::CompareAndPut { key, value } => {
            let txn = Txn::new().when(Compare::exists(key.clone())).then(Op::put(key, value));
            client.txn(txn).await.is_ok_and(|answer| answer.succeeded)
        }
        Call::Range { from, end, limit } => {
            let range = client.range(KeyRange::between(from, end)).limit(limit as u64);
            range.consistency(Consistency::Linearizable).await.is_ok_and(|page| page.kvs.len() == limit)
        }
    }
}
