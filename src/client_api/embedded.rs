//! The embedded client, as applications that are generic over the mode see it.

use bytes::Bytes;
use d_engine_proto::{TimeToLive, WatchEvent, v1};
use d_engine_server::embedded::{EmbeddedClient, LocalClientError, WatchReceiver};

use super::{ClientApi, ClientApiError, ClientWatch};

impl ClientApi for EmbeddedClient {
    type Error = LocalClientError;
    type Watch = WatchReceiver;

    async fn put(&self, key: impl AsRef<[u8]> + Send, value: impl AsRef<[u8]> + Send) -> Result<(), LocalClientError> {
        Self::put(self, key, value).await
    }

    async fn put_with_ttl(
        &self,
        key: impl AsRef<[u8]> + Send,
        value: impl AsRef<[u8]> + Send,
        ttl: impl Into<TimeToLive> + Send,
    ) -> Result<(), LocalClientError> {
        Self::put_with_ttl(self, key, value, ttl).await
    }

    async fn get(&self, key: impl AsRef<[u8]> + Send) -> Result<Option<Bytes>, LocalClientError> {
        Self::get(self, key).await
    }

    async fn get_linearizable(&self, key: impl AsRef<[u8]> + Send) -> Result<Option<Bytes>, LocalClientError> {
        Self::get_linearizable(self, key).await
    }

    async fn get_lease(&self, key: impl AsRef<[u8]> + Send) -> Result<Option<Bytes>, LocalClientError> {
        Self::get_lease(self, key).await
    }

    async fn get_eventual(&self, key: impl AsRef<[u8]> + Send) -> Result<Option<Bytes>, LocalClientError> {
        Self::get_eventual(self, key).await
    }

    fn get_multi<K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = K> + Send,
    ) -> impl Future<Output = Result<Vec<Option<Bytes>>, LocalClientError>> + Send {
        // Copied before the first await: the caller's keys need not be `Send`.
        let keys: Vec<Bytes> = keys.into_iter().map(|key| Bytes::copy_from_slice(key.as_ref())).collect();
        Self::get_multi(self, keys)
    }

    async fn scan_prefix(&self, prefix: impl AsRef<[u8]> + Send) -> Result<Vec<(Bytes, Bytes)>, LocalClientError> {
        Self::scan_prefix(self, prefix).await
    }

    async fn delete(&self, key: impl AsRef<[u8]> + Send) -> Result<(), LocalClientError> {
        Self::delete(self, key).await
    }

    async fn compare_and_swap(
        &self,
        key: impl AsRef<[u8]> + Send,
        expected: Option<impl AsRef<[u8]> + Send>,
        value: impl AsRef<[u8]> + Send,
    ) -> Result<bool, LocalClientError> {
        Self::compare_and_swap(self, key, expected, value).await
    }

    async fn watch(&self, key: impl AsRef<[u8]> + Send) -> Result<WatchReceiver, LocalClientError> {
        Self::watch(self, key).await
    }

    async fn watch_prefix(&self, prefix: impl AsRef<[u8]> + Send) -> Result<WatchReceiver, LocalClientError> {
        Self::watch_prefix(self, prefix).await
    }
}

impl ClientApiError for LocalClientError {
    fn is_not_leader(&self) -> bool {
        Self::is_not_leader(self)
    }

    fn leader_address(&self) -> Option<&str> {
        Self::leader_address(self)
    }

    fn code(&self) -> &'static str {
        Self::code(self).name()
    }

    fn may_have_been_applied(&self) -> bool {
        self.outcome() != v1::Outcome::NotApplied
    }
}

impl ClientWatch for WatchReceiver {
    type Error = LocalClientError;

    async fn recv(&mut self) -> Option<WatchEvent> {
        Self::recv(self).await
    }

    fn end_reason(&self) -> Option<&LocalClientError> {
        Self::end_reason(self)
    }
}
