//! What an application asks its embedded engine.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use d_engine_proto::v1::{self, Consistency};
use d_engine_proto::{ErrorCode, TimeToLive};

use super::watch::after_prefix;
use super::{EventReceiver, LocalClientError, SnapshotWatch, WatchReceiver, WatchRequest};
use crate::consensus::{Poison, StartError};
use crate::engine::{CustomEngine, Deadline, Engine, EngineError};
use crate::node::Door;

/// The name that older programs know it by.
pub type LocalKvClient = EmbeddedClient;

const NOT_THE_STORE: &str = "this engine runs a state machine of the application's own; use propose and query";
const THE_STORE: &str = "this engine runs the key-value store; use put, get and their like";

/// How often a list is read anew because its revision was compacted before the watch began.
const ATTEMPTS: u32 = 5;

/// Asks the engine in the same process: reads from its memory, writes into its log.
///
/// Keys and values go in as anything that is bytes, and come out as [`Bytes`] that share the engine's memory. A call
/// that writes, and one that promises the present, ends within `network.call_timeout_ms`. A write on a node that does
/// not lead is not forwarded; see [`LocalClientError::NotLeader`]. Dropping the future of a call abandons it: a write
/// may have taken effect then.
///
/// It outlives its engine, and answers [`LocalClientError::Stopped`] then; or [`LocalClientError::Failed`], from the
/// moment that the node meets a fault it cannot go on with. So does every call, eventual reads included.
pub struct EmbeddedClient {
    /// `None` once the engine has stopped.
    door: ArcSwapOption<Door>,
    /// What it says without a door.
    closed: OnceLock<LocalClientError>,
    /// The node's; it keeps nothing else of it.
    poison: Poison,
    call_timeout: Duration,
}

impl EmbeddedClient {
    pub(super) fn new(door: Door, call_timeout: Duration) -> Self {
        let poison = door.consensus().poison().clone();
        Self { door: ArcSwapOption::from_pointee(door), closed: OnceLock::new(), poison, call_timeout }
    }

    /// Lets go of the engine, for the first reason that is given.
    pub(super) fn close(&self, reason: LocalClientError) {
        self.closed.get_or_init(|| reason);
        self.door.store(None);
    }

    pub(super) fn door(&self) -> Result<Arc<Door>, LocalClientError> {
        match self.door.load_full() {
            None => Err(self.closed.get().cloned().unwrap_or(LocalClientError::Stopped)),
            Some(_) if self.poison.has_failed() => Err(LocalClientError::failed(&self.poison)),
            Some(door) => Ok(door),
        }
    }

    /// What the node cannot go on with, if there is something.
    pub(super) fn failure(&self) -> Option<StartError> {
        self.poison.failure().borrow().clone()
    }

    /// Whether this node leads, by the clock of this moment.
    pub(super) fn is_leader(&self) -> bool {
        !self.poison.has_failed() && self.door.load().as_ref().is_some_and(|door| door.consensus().is_leader())
    }

    /// Everything the engine can do with its key-value store, as messages of the protocol: transactions, leases, reads at
    /// past revisions, members, status.
    ///
    /// # Errors
    /// [`LocalClientError::Stopped`], [`LocalClientError::Failed`] and [`LocalClientError::Unsupported`].
    pub fn engine(&self) -> Result<Engine, LocalClientError> {
        match &*self.door()? {
            Door::Kv(engine) => Ok(engine.clone()),
            Door::Custom(_) => Err(LocalClientError::Unsupported { operation: "this call", remedy: NOT_THE_STORE }),
        }
    }

    /// When a call that begins now has to have its answer: for those of [`engine`](Self::engine).
    #[must_use]
    pub fn deadline(&self) -> Deadline {
        Deadline::now() + self.call_timeout
    }

    /// Runs a call of the key-value store.
    async fn on_store<T>(
        &self,
        operation: &'static str,
        call: impl AsyncFnOnce(&Engine, Deadline) -> Result<T, EngineError>,
    ) -> Result<T, LocalClientError> {
        let door = self.door()?;
        let Door::Kv(engine) = &*door else {
            return Err(LocalClientError::Unsupported { operation, remedy: NOT_THE_STORE });
        };
        call(engine, self.deadline()).await.map_err(|error| LocalClientError::explain(error, &door))
    }

    /// Runs a call of an application's state machine.
    async fn on_custom<T>(
        &self,
        operation: &'static str,
        call: impl AsyncFnOnce(&CustomEngine, Deadline) -> Result<T, EngineError>,
    ) -> Result<T, LocalClientError> {
        let door = self.door()?;
        let Door::Custom(engine) = &*door else {
            return Err(LocalClientError::Unsupported { operation, remedy: THE_STORE });
        };
        call(engine, self.deadline()).await.map_err(|error| LocalClientError::explain(error, &door))
    }

    /// Writes a key. When this returns the write is committed and can be read here.
    ///
    /// # Errors
    /// See [`LocalClientError`]; its [`outcome`](LocalClientError::outcome) tells whether the write can have taken
    /// effect. So with every write.
    pub async fn put(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), LocalClientError> {
        self.put_request(key.as_ref(), value.as_ref(), 0).await
    }

    /// Writes a key that is deleted when its time to live has passed, unless it is written before; by the cluster's own
    /// clock, never earlier.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn put_with_ttl(
        &self,
        key: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
        ttl: impl Into<TimeToLive>,
    ) -> Result<(), LocalClientError> {
        self.put_request(key.as_ref(), value.as_ref(), ttl.into().as_ms()).await
    }

    async fn put_request(&self, key: &[u8], value: &[u8], ttl_ms: u64) -> Result<(), LocalClientError> {
        let (key, value) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        let request = v1::PutRequest { key, value, ttl_ms, ..v1::PutRequest::default() };
        self.on_store("put", async |engine, deadline| engine.put(request, deadline).await).await.map(drop)
    }

    /// Reads a key by the policy that the configuration names, `raft.read_consistency.default_policy`.
    ///
    /// # Errors
    /// See [`LocalClientError`]; a read can always be repeated. So with every read.
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>, LocalClientError> {
        self.get_with(key.as_ref(), Consistency::Unspecified).await
    }

    /// Reads the latest committed value, on any node: one confirmation by a quorum, shared by all who wait for one.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn get_linearizable(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>, LocalClientError> {
        self.get_with(key.as_ref(), Consistency::Linearizable).await
    }

    /// Reads the latest committed value from the leader's memory: linearizable as long as the clocks' rates differ by
    /// less than a lease allows for.
    ///
    /// # Errors
    /// As [`get`](Self::get); [`LocalClientError::NotLeader`] on a node that does not lead.
    pub async fn get_lease(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>, LocalClientError> {
        self.get_with(key.as_ref(), Consistency::Lease).await
    }

    /// Reads what this node has applied, whatever else goes on: committed, and perhaps not the latest.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn get_eventual(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>, LocalClientError> {
        self.get_with(key.as_ref(), Consistency::Eventual).await
    }

    async fn get_with(&self, key: &[u8], consistency: Consistency) -> Result<Option<Bytes>, LocalClientError> {
        if !self.poison.has_failed()
            && let Some(Door::Kv(engine)) = self.door.load().as_deref()
        {
            match engine.value_now(key, consistency) {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                Err(error) => return Err(LocalClientError::Engine(error)),
            }
        }
        self.on_store("get", async |engine, deadline| engine.value(key, consistency, deadline).await).await
    }

    /// Reads several keys at one revision, by the policy of [`get`](Self::get): a value for each key, in the order of
    /// the keys. 1024 keys at most, and together no more than an answer carries.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn get_multi<K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Vec<Option<Bytes>>, LocalClientError> {
        let keys: Vec<Bytes> = keys.into_iter().map(|key| Bytes::copy_from_slice(key.as_ref())).collect();
        let request = v1::GetManyRequest { keys: keys.clone(), read: None };
        let found =
            self.on_store("get_multi", async |engine, deadline| engine.get_many(request, deadline).await).await?;
        // The keys that exist, in the order asked for.
        let mut found = found.kvs.into_iter().peekable();
        Ok(keys.iter().map(|key| found.next_if(|kv| kv.key == *key).map(|kv| kv.value)).collect())
    }

    /// Every key that begins with `prefix`, with its value, in byte order and of one revision; by the policy of
    /// [`get`](Self::get). All of it at once: [`engine`](Self::engine) reads in pages.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn scan_prefix(&self, prefix: impl AsRef<[u8]>) -> Result<Vec<(Bytes, Bytes)>, LocalClientError> {
        let (start, end) = (Bytes::copy_from_slice(prefix.as_ref()), after_prefix(prefix.as_ref()));
        let scan = async |engine: &Engine, deadline| engine.pairs(start, end, Consistency::Unspecified, deadline).await;
        Ok(self.on_store("scan_prefix", scan).await?.1)
    }

    /// Deletes a key. One that does not exist is no error.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn delete(&self, key: impl AsRef<[u8]>) -> Result<(), LocalClientError> {
        let request = v1::DeleteRequest { key: Bytes::copy_from_slice(key.as_ref()), ..v1::DeleteRequest::default() };
        self.on_store("delete", async |engine, deadline| engine.delete(request, deadline).await).await.map(drop)
    }

    /// Writes a key if it holds `expected`; `None`: if it does not exist. Returns whether it was written.
    ///
    /// # Errors
    /// As [`put`](Self::put). A value that differs is an answer, not an error.
    pub async fn compare_and_swap(
        &self,
        key: impl AsRef<[u8]>,
        expected: Option<impl AsRef<[u8]>>,
        value: impl AsRef<[u8]>,
    ) -> Result<bool, LocalClientError> {
        let request = v1::CompareAndSwapRequest {
            key: Bytes::copy_from_slice(key.as_ref()),
            expected: expected.map(|expected| Bytes::copy_from_slice(expected.as_ref())),
            value: Bytes::copy_from_slice(value.as_ref()),
            ..v1::CompareAndSwapRequest::default()
        };
        let swapped = self
            .on_store("compare_and_swap", async |engine, deadline| engine.compare_and_swap(request, deadline).await);
        Ok(swapped.await?.succeeded)
    }

    /// Watches a key from now on: every change of it that follows what this node has applied.
    ///
    /// # Errors
    /// See [`LocalClientError`].
    pub async fn watch(&self, key: impl AsRef<[u8]>) -> Result<WatchReceiver, LocalClientError> {
        self.watch_events(WatchRequest::key(key)).await.map(WatchReceiver)
    }

    /// Watches all keys that begin with `prefix`, as [`watch`](Self::watch); an empty one stands for all keys.
    ///
    /// # Errors
    /// As [`watch`](Self::watch).
    pub async fn watch_prefix(&self, prefix: impl AsRef<[u8]>) -> Result<WatchReceiver, LocalClientError> {
        self.watch_events(WatchRequest::prefix(prefix)).await.map(WatchReceiver)
    }

    /// Watches with full events: their revisions and, if asked for, what keys held before. Takes a key, or a
    /// [`WatchRequest`].
    ///
    /// # Errors
    /// As [`watch`](Self::watch); `Compacted` when the revision to begin with is gone.
    pub async fn watch_events(&self, request: impl Into<WatchRequest>) -> Result<EventReceiver, LocalClientError> {
        let WatchRequest(create) = request.into();
        let watch = self.on_store("watch", async |engine, _| engine.watch(&create)).await?;
        Ok(EventReceiver::new(watch))
    }

    /// Reads the keys that a watch is of, all at one revision, by the policy of [`get`](Self::get); and watches them from
    /// the next revision on: nothing that happens in between is missed. What a cache needs. Takes a key, or a
    /// [`WatchRequest`], of which [`from`](WatchRequest::from) has no meaning here.
    ///
    /// When the watch ends for another reason than that the engine does, the cache is begun anew the same way.
    ///
    /// ```
    /// use d_engine_server::embedded::{EmbeddedEngine, WatchEvent, WatchRequest};
    /// use std::collections::BTreeMap;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let directory = tempfile::tempdir()?;
    /// # let file = directory.path().join("node.toml");
    /// # std::fs::write(&file, format!("[cluster]\ndb_root_dir = {:?}", directory.path().join("db")))?;
    /// # let engine = EmbeddedEngine::start_with(&file).await?;
    /// # engine.wait_ready(std::time::Duration::from_secs(5)).await?;
    /// # let client = engine.client();
    /// client.put("services/a", "10.0.0.1:80").await?;
    /// let mut services = client.watch_from_snapshot(WatchRequest::prefix("services/")).await?;
    /// let mut cache: BTreeMap<_, _> = services.pairs.into_iter().collect();
    /// client.put("services/b", "10.0.0.2:80").await?;
    /// match services.watch.recv().await {
    ///     Some(WatchEvent::Put(key, value)) => drop(cache.insert(key, value)),
    ///     Some(WatchEvent::Delete(key)) => drop(cache.remove(&key)),
    ///     None => println!("the watch ended: {:?}", services.watch.end_reason()),
    /// }
    /// assert_eq!(cache.len(), 2);
    /// # engine.stop().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`watch`](Self::watch); `Compacted` if the history is compacted faster than the keys can be read, time and again.
    pub async fn watch_from_snapshot(
        &self,
        request: impl Into<WatchRequest>,
    ) -> Result<SnapshotWatch, LocalClientError> {
        let request = request.into();
        let v1::KeyRange { start, end } = request.0.range.clone().unwrap_or_default();
        let list = async |engine: &Engine, deadline| {
            engine.pairs(start.clone(), end.clone(), Consistency::Unspecified, deadline).await
        };
        let mut attempts = 1;
        loop {
            let (revision, pairs) = self.on_store("watch_from_snapshot", &list).await?;
            match self.watch_events(request.clone().from(revision.next())).await {
                Ok(events) => return Ok(SnapshotWatch { revision, pairs, watch: WatchReceiver(events) }),
                Err(error) if error.code() == ErrorCode::Compacted && attempts < ATTEMPTS => attempts += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Replicates a command of an application's own state machine and returns its answer.
    ///
    /// # Errors
    /// As [`put`](Self::put); [`LocalClientError::Unsupported`] on the key-value store.
    pub async fn propose(&self, command: impl Into<Bytes>) -> Result<Bytes, LocalClientError> {
        let command = command.into();
        self.on_custom("propose", async |engine, deadline| engine.propose(command, deadline).await).await
    }

    /// Asks an application's own state machine, by the policy of [`get`](Self::get).
    ///
    /// # Errors
    /// As [`get`](Self::get); [`LocalClientError::Unsupported`] on the key-value store.
    pub async fn query(&self, query: impl Into<Bytes>) -> Result<Bytes, LocalClientError> {
        self.query_with(query, Consistency::Unspecified).await
    }

    /// As [`query`](Self::query), by the policy asked for.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    pub async fn query_with(
        &self,
        query: impl Into<Bytes>,
        consistency: Consistency,
    ) -> Result<Bytes, LocalClientError> {
        let query = query.into();
        self.on_custom("query", async |engine, deadline| engine.query(query, consistency, deadline).await).await
    }
}
