//! The gRPC client, as applications that are generic over the mode see it.

use std::collections::VecDeque;

use bytes::Bytes;
use d_engine_client as client;
use d_engine_client::{Client, Consistency, Error, KeyRange, Outcome, WatchStream};
use d_engine_proto::{TimeToLive, WatchEvent};

use super::{ClientApi, ClientApiError, ClientWatch};

/// The gRPC client, by the name that tells it from the embedded one.
pub type GrpcClient = Client;

/// A watch of the gRPC client, event by event. It goes on by itself wherever it breaks.
pub struct GrpcWatch {
    stream: WatchStream,
    /// Events that have arrived and were not handed out.
    events: VecDeque<WatchEvent>,
    reason: Option<Error>,
}

impl ClientApi for Client {
    type Error = Error;
    type Watch = GrpcWatch;

    async fn put(&self, key: impl AsRef<[u8]> + Send, value: impl AsRef<[u8]> + Send) -> Result<(), Error> {
        Self::put(self, key.as_ref(), value.as_ref()).await.map(drop)
    }

    async fn put_with_ttl(
        &self,
        key: impl AsRef<[u8]> + Send,
        value: impl AsRef<[u8]> + Send,
        ttl: impl Into<TimeToLive> + Send,
    ) -> Result<(), Error> {
        Self::put_with_ttl(self, key.as_ref(), value.as_ref(), ttl.into().0).await.map(drop)
    }

    async fn get(&self, key: impl AsRef<[u8]> + Send) -> Result<Option<Bytes>, Error> {
        Ok(Self::get(self, key.as_ref()).await?.into_value())
    }

    async fn get_linearizable(&self, key: impl AsRef<[u8]> + Send) -> Result<Option<Bytes>, Error> {
        Ok(Self::get(self, key.as_ref()).consistency(Consistency::Linearizable).await?.into_value())
    }

    async fn get_lease(&self, key: impl AsRef<[u8]> + Send) -> Result<Option<Bytes>, Error> {
        Ok(Self::get(self, key.as_ref()).consistency(Consistency::Lease).await?.into_value())
    }

    async fn get_eventual(&self, key: impl AsRef<[u8]> + Send) -> Result<Option<Bytes>, Error> {
        Ok(Self::get(self, key.as_ref()).consistency(Consistency::Eventual).await?.into_value())
    }

    fn get_multi<K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = K> + Send,
    ) -> impl Future<Output = Result<Vec<Option<Bytes>>, Error>> + Send {
        // Copied before the first await: the caller's keys need not be `Send`.
        let keys: Vec<Bytes> = keys.into_iter().map(|key| Bytes::copy_from_slice(key.as_ref())).collect();
        async move {
            // The keys that exist, in the order asked for.
            let mut found = Self::get_many(self, keys.clone()).await?.kvs.into_iter().peekable();
            Ok(keys.iter().map(|key| found.next_if(|kv| kv.key == *key).map(|kv| kv.value)).collect())
        }
    }

    async fn scan_prefix(&self, prefix: impl AsRef<[u8]> + Send) -> Result<Vec<(Bytes, Bytes)>, Error> {
        let found = self.range(KeyRange::prefix(prefix.as_ref())).all().await?;
        Ok(found.into_iter().map(|kv| (kv.key, kv.value)).collect())
    }

    async fn delete(&self, key: impl AsRef<[u8]> + Send) -> Result<(), Error> {
        Self::delete(self, key.as_ref()).await.map(drop)
    }

    async fn compare_and_swap(
        &self,
        key: impl AsRef<[u8]> + Send,
        expected: Option<impl AsRef<[u8]> + Send>,
        value: impl AsRef<[u8]> + Send,
    ) -> Result<bool, Error> {
        let expected = expected.map(|expected| Bytes::copy_from_slice(expected.as_ref()));
        Ok(Self::compare_and_swap(self, key.as_ref(), expected, value.as_ref()).await?.succeeded)
    }

    async fn watch(&self, key: impl AsRef<[u8]> + Send) -> Result<GrpcWatch, Error> {
        Ok(GrpcWatch::of(Self::watch(self, key.as_ref()).await?))
    }

    async fn watch_prefix(&self, prefix: impl AsRef<[u8]> + Send) -> Result<GrpcWatch, Error> {
        Ok(GrpcWatch::of(Self::watch_prefix(self, prefix.as_ref()).await?))
    }
}

impl ClientApiError for Error {
    fn is_not_leader(&self) -> bool {
        self.kind() == client::ErrorKind::NotLeader
    }

    fn leader_address(&self) -> Option<&str> {
        self.leader().map(|leader| leader.client_address.as_str())
    }

    fn code(&self) -> &'static str {
        self.kind().name()
    }

    fn may_have_been_applied(&self) -> bool {
        self.outcome() != Outcome::NotApplied
    }
}

impl GrpcWatch {
    fn of(stream: WatchStream) -> Self {
        Self { stream, events: VecDeque::new(), reason: None }
    }
}

impl ClientWatch for GrpcWatch {
    type Error = Error;

    async fn recv(&mut self) -> Option<WatchEvent> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            if self.reason.is_some() {
                return None;
            }
            match self.stream.next().await? {
                Ok(update) => self.events.extend(update.events.into_iter().map(|event| match event {
                    client::WatchEvent::Put { kv, .. } => WatchEvent::Put(kv.key, kv.value),
                    client::WatchEvent::Delete { key, .. } => WatchEvent::Delete(key),
                })),
                Err(error) => self.reason = Some(error),
            }
        }
    }

    fn end_reason(&self) -> Option<&Error> {
        self.reason.as_ref()
    }
}
