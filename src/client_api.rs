//! One interface for application code that does not care whether its engine is in the same process.
//!
//! It has what both clients can do in the same words. What only one of them can, such as the transactions of the gRPC
//! client, is called on that one.

#[cfg(feature = "server")]
mod embedded;
#[cfg(feature = "client")]
mod grpc;

use std::error::Error;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use d_engine_proto::{TimeToLive, WatchEvent};
#[cfg(feature = "client")]
pub use grpc::{GrpcClient, GrpcWatch};

/// What the `EmbeddedClient` (feature `server`) and the gRPC `Client` (feature `client`) both do, so that application code can be generic over the mode.
///
/// They differ where the modes do: the gRPC client finds the leader and repeats what may be repeated, the embedded one
/// asks the node in its own process and nobody else.
#[cfg_attr(
    feature = "server",
    doc = r#"
```
use d_engine::prelude::*;

/// Counts how often it was called; the same code in both modes.
async fn count<C: ClientApi>(client: &C) -> Result<u64, C::Error> {
    loop {
        let before = client.get("calls").await?;
        let calls = before.as_deref().map_or(0, |text| String::from_utf8_lossy(text).parse().unwrap_or(0));
        if client.compare_and_swap("calls", before, (calls + 1).to_string()).await? {
            return Ok(calls + 1);
        }
    }
}

# #[tokio::main(flavor = "current_thread")]
# async fn main() -> Result<(), Box<dyn std::error::Error>> {
# let directory = tempfile::tempdir()?;
# let file = directory.path().join("node.toml");
# std::fs::write(&file, format!("[cluster]\ndb_root_dir = {:?}", directory.path().join("db")))?;
let engine = EmbeddedEngine::start_with(&file).await?;
engine.wait_ready(std::time::Duration::from_secs(5)).await?;
assert_eq!(count(&engine.client()).await?, 1);
assert_eq!(count(&engine.client()).await?, 2);
engine.stop().await?;
# Ok(()) }
```
"#
)]
pub trait ClientApi: Send + Sync {
    /// Why a call failed.
    type Error: ClientApiError;
    /// What a watch gives.
    type Watch: ClientWatch<Error = Self::Error>;

    /// Writes a key.
    ///
    /// # Errors
    /// [`ClientApiError::may_have_been_applied`] tells whether the write can have taken effect. So with every write.
    fn put(
        &self,
        key: impl AsRef<[u8]> + Send,
        value: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Writes a key that is deleted when its time to live has passed, unless it is written before.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    fn put_with_ttl(
        &self,
        key: impl AsRef<[u8]> + Send,
        value: impl AsRef<[u8]> + Send,
        ttl: impl Into<TimeToLive> + Send,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Reads a key by the default policy: the server's, or the one this client was built with.
    ///
    /// # Errors
    /// A read can always be repeated.
    fn get(&self, key: impl AsRef<[u8]> + Send) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send;

    /// Reads the latest committed value, confirmed by a quorum.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    fn get_linearizable(
        &self,
        key: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send;

    /// Reads the latest committed value from the leader's memory, within its lease.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    fn get_lease(
        &self,
        key: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send;

    /// Reads what some node has applied: committed, and perhaps not the latest.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    fn get_eventual(
        &self,
        key: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send;

    /// Reads several keys at one revision by the default policy: a value for each key, in the order of the keys.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    fn get_multi<K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = K> + Send,
    ) -> impl Future<Output = Result<Vec<Option<Bytes>>, Self::Error>> + Send;

    /// Every key that begins with `prefix`, with its value, in byte order and of one revision.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    fn scan_prefix(
        &self,
        prefix: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Vec<(Bytes, Bytes)>, Self::Error>> + Send;

    /// Deletes a key. One that does not exist is no error.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    fn delete(&self, key: impl AsRef<[u8]> + Send) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Writes a key if it holds `expected`; `None`: if it does not exist. Returns whether it was written.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    fn compare_and_swap(
        &self,
        key: impl AsRef<[u8]> + Send,
        expected: Option<impl AsRef<[u8]> + Send>,
        value: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<bool, Self::Error>> + Send;

    /// Watches a key from now on.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    fn watch(&self, key: impl AsRef<[u8]> + Send) -> impl Future<Output = Result<Self::Watch, Self::Error>> + Send;

    /// Watches all keys that begin with `prefix` from now on; an empty one stands for all keys.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    fn watch_prefix(
        &self,
        prefix: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Self::Watch, Self::Error>> + Send;
}

/// Why a call failed, as far as both modes tell in the same words.
pub trait ClientApiError: Error + Send + Sync + 'static {
    /// Whether the call needs the leader, and was answered by another node.
    fn is_not_leader(&self) -> bool;

    /// Where the leader is reached in this mode, host:port, if the call was answered by another node that knows.
    fn leader_address(&self) -> Option<&str>;

    /// The name of the error's code, the same in every language.
    fn code(&self) -> &'static str;

    /// Whether the call may have taken effect, or may do so later.
    fn may_have_been_applied(&self) -> bool;
}

/// Events of a watch, in the order of revisions: none is lost and none comes twice. Dropping it ends the watch.
pub trait ClientWatch: Send {
    /// Why a watch ended.
    type Error;

    /// The next event; `None` once the watch has ended. Nothing is lost if the future is dropped.
    fn recv(&mut self) -> impl Future<Output = Option<WatchEvent>> + Send;

    /// Why the watch has ended; `None` while it goes on.
    fn end_reason(&self) -> Option<&Self::Error>;
}

impl<C: ClientApi> ClientApi for Arc<C> {
    type Error = C::Error;
    type Watch = C::Watch;

    fn put(
        &self,
        key: impl AsRef<[u8]> + Send,
        value: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send {
        C::put(self, key, value)
    }

    fn put_with_ttl(
        &self,
        key: impl AsRef<[u8]> + Send,
        value: impl AsRef<[u8]> + Send,
        ttl: impl Into<TimeToLive> + Send,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send {
        C::put_with_ttl(self, key, value, ttl)
    }

    fn get(&self, key: impl AsRef<[u8]> + Send) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send {
        C::get(self, key)
    }

    fn get_linearizable(
        &self,
        key: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send {
        C::get_linearizable(self, key)
    }

    fn get_lease(
        &self,
        key: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send {
        C::get_lease(self, key)
    }

    fn get_eventual(
        &self,
        key: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send {
        C::get_eventual(self, key)
    }

    fn get_multi<K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = K> + Send,
    ) -> impl Future<Output = Result<Vec<Option<Bytes>>, Self::Error>> + Send {
        C::get_multi(self, keys)
    }

    fn scan_prefix(
        &self,
        prefix: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Vec<(Bytes, Bytes)>, Self::Error>> + Send {
        C::scan_prefix(self, prefix)
    }

    fn delete(&self, key: impl AsRef<[u8]> + Send) -> impl Future<Output = Result<(), Self::Error>> + Send {
        C::delete(self, key)
    }

    fn compare_and_swap(
        &self,
        key: impl AsRef<[u8]> + Send,
        expected: Option<impl AsRef<[u8]> + Send>,
        value: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<bool, Self::Error>> + Send {
        C::compare_and_swap(self, key, expected, value)
    }

    fn watch(&self, key: impl AsRef<[u8]> + Send) -> impl Future<Output = Result<Self::Watch, Self::Error>> + Send {
        C::watch(self, key)
    }

    fn watch_prefix(
        &self,
        prefix: impl AsRef<[u8]> + Send,
    ) -> impl Future<Output = Result<Self::Watch, Self::Error>> + Send {
        C::watch_prefix(self, prefix)
    }
}
