//! A local copy of an interval of keys that is kept fresh: a list, then the changes after it.
//!
//! A task applies the updates of a watch, each of which is one or more whole revisions, in one step; so a reader never
//! sees half a revision. When the history that the watch needs is compacted, the task lists again, and what differs is
//! published as changes. Readers share the map with the task: taking a view of it costs next to nothing.

use std::collections::VecDeque;
use std::fmt;
use std::future::IntoFuture;
use std::ops::Bound;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::Revision;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, Stream, StreamExt};
use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use parking_lot::RwLock;
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;

use crate::client::Client;
use crate::error::{Error, ErrorKind, Outcome};
use crate::kv::{IntoBytes, KeyRange, KeyValue};
use crate::read::Consistency;
use crate::retry::backoff;
use crate::snapshot_watch::{SnapshotWatch, SnapshotWatchCall};
use crate::watch::{WatchEvent, WatchStream, WatchUpdate};

/// Updates that a reader of changes may be behind.
const CHANGES_MAX: usize = 1024;

/// The keys of a cache as of one revision. It does not change, and costs next to nothing to clone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CacheView {
    revision: Revision,
    kvs: OrdMap<Bytes, KeyValue>,
}

impl CacheView {
    fn of(revision: Revision, kvs: Vec<KeyValue>) -> Self {
        Self { revision, kvs: kvs.into_iter().map(|kv| (kv.key.clone(), kv)).collect() }
    }

    /// Everything up to this revision is in.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// What the key holds.
    #[must_use]
    pub fn get(&self, key: impl AsRef<[u8]>) -> Option<&KeyValue> {
        self.kvs.get(key.as_ref())
    }

    /// All keys, in byte order.
    pub fn iter(&self) -> impl Iterator<Item = &KeyValue> {
        self.kvs.values()
    }

    /// The keys of a part of the interval, in byte order.
    pub fn range(&self, range: &KeyRange) -> impl Iterator<Item = &KeyValue> {
        let (start, end) = (range.start().clone(), range.end().clone());
        let from_start = self.kvs.range::<_, [u8]>((Bound::Included(&start[..]), Bound::Unbounded));
        from_start.map(|(_, kv)| kv).take_while(move |kv| end.is_empty() || kv.key < end)
    }

    /// Number of keys.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kvs.len()
    }

    /// Whether there is no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kvs.is_empty()
    }

    /// What leads from this view to a later one. What happened in between cannot be told from them.
    fn changes_to(&self, later: &Self) -> Vec<CacheChange> {
        let change = |key: &Bytes, before: Option<&KeyValue>, after: Option<&KeyValue>| CacheChange {
            key: key.clone(),
            before: before.cloned(),
            after: after.cloned(),
            revision: later.revision,
            merged: true,
        };
        let differences = self.kvs.diff(&later.kvs).map(|difference| match difference {
            DiffItem::Add(key, after) => change(key, None, Some(after)),
            DiffItem::Update { old: (key, before), new: (_, after) } => change(key, Some(before), Some(after)),
            DiffItem::Remove(key, before) => change(key, Some(before), None),
        });
        differences.collect()
    }

    /// Applies one event; gives what the key held before.
    fn apply(&mut self, event: &WatchEvent) -> Option<KeyValue> {
        match event {
            WatchEvent::Put { kv, .. } => self.kvs.insert(kv.key.clone(), kv.clone()),
            WatchEvent::Delete { key, .. } => self.kvs.remove(key),
        }
    }
}

/// How one key of a cache changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheChange {
    /// The key.
    pub key: Bytes,
    /// What it held before; `None`: it did not exist.
    pub before: Option<KeyValue>,
    /// What it holds since; `None`: it was deleted.
    pub after: Option<KeyValue>,
    /// The revision of the change.
    pub revision: Revision,
    /// It may stand for several changes of this key: the reader was too slow to be told each, or the cache had to list
    /// again. Then `revision` is the one that the reader has reached with the last change that has it.
    pub merged: bool,
}

/// How far a cache can be trusted to be fresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CacheState {
    /// A node delivers changes as they happen there.
    Fresh,
    /// No node does at the moment. What the cache holds was true at its revision.
    Stale,
    /// It will not change any more; [`Cache::error`] says why.
    Ended,
}

/// A cache to be filled; await it to do so.
#[derive(Clone, Debug)]
#[must_use = "nothing is read until this is awaited"]
pub struct CacheCall {
    client: Client,
    list: SnapshotWatchCall,
}

impl CacheCall {
    /// How fresh the list is that the cache begins with; otherwise the client's default decides, and without one it is
    /// linearizable.
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.list = self.list.consistency(consistency);
        self
    }

    /// Budget of each page of the list, and of opening the watch.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.list = self.list.timeout(timeout);
        self
    }
}

impl IntoFuture for CacheCall {
    type Output = Result<Cache, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            let Self { client, list } = self;
            let SnapshotWatch { revision, kvs, watch } = list.clone().await?;
            let content =
                Content { view: CacheView::of(revision, kvs), changes: Some(broadcast::Sender::new(CHANGES_MAX)) };
            let status = Status { revision, live: true, error: None };
            let local = Arc::new(Local { content: RwLock::new(content), status: watch::Sender::new(status) });
            let (client, list) = (client.uncancelled(), list.uncancelled());
            let tasks = client.shared().tasks.clone();
            let task = tasks.spawn(keep_fresh(Arc::clone(&local), client, list, watch)).abort_handle();
            Ok(Cache { owner: Arc::new(Owner { local, task }) })
        }
        .boxed()
    }
}

/// A local copy of an interval of keys. Reading it asks nobody and waits for nothing.
///
/// It is a committed state of the interval, at most as old as changes take to come here; [`wait_for`](Self::wait_for) a
/// revision, such as that of one's own write, when that is not enough. It keeps itself fresh through everything that a
/// [`WatchStream`] survives, and lists again when its history was compacted.
///
/// Cheap to clone; it ends with its last clone. A cache counts as a clone of its client.
#[derive(Clone)]
pub struct Cache {
    owner: Arc<Owner>,
}

/// Ends the task with the last clone.
struct Owner {
    local: Arc<Local>,
    task: AbortHandle,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.task.abort();
        self.local.content.write().changes = None;
    }
}

/// What readers and the task share.
struct Local {
    content: RwLock<Content>,
    /// Follows `content`, never before it.
    status: watch::Sender<Status>,
}

struct Content {
    view: CacheView,
    /// `None` once nothing will change any more.
    changes: Option<broadcast::Sender<Arc<Batch>>>,
}

struct Status {
    revision: Revision,
    live: bool,
    error: Option<Error>,
}

/// The changes of one update, and what they lead to.
struct Batch {
    changes: Vec<CacheChange>,
    view: CacheView,
}

impl Cache {
    /// All keys as of one revision: several reads of a view fit together.
    #[must_use]
    pub fn view(&self) -> CacheView {
        self.owner.local.content.read().view.clone()
    }

    /// What the key holds.
    #[must_use]
    pub fn get(&self, key: impl AsRef<[u8]>) -> Option<KeyValue> {
        self.owner.local.content.read().view.get(key).cloned()
    }

    /// All keys as of one revision, in byte order.
    pub fn iter(&self) -> impl Iterator<Item = KeyValue> + use<> {
        self.view().kvs.into_iter().map(|(_, kv)| kv)
    }

    /// The keys of a part of the interval as of one revision, in byte order.
    #[must_use]
    pub fn range(&self, range: &KeyRange) -> Vec<KeyValue> {
        self.view().range(range).cloned().collect()
    }

    /// Number of keys.
    #[must_use]
    pub fn len(&self) -> usize {
        self.owner.local.content.read().view.len()
    }

    /// Whether there is no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Everything up to this revision is in.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.owner.local.content.read().view.revision
    }

    /// Whether changes arrive at the moment.
    #[must_use]
    pub fn state(&self) -> CacheState {
        let status = self.owner.local.status.borrow();
        match (&status.error, status.live) {
            (Some(_), _) => CacheState::Ended,
            (None, true) => CacheState::Fresh,
            (None, false) => CacheState::Stale,
        }
    }

    /// Why the cache ended.
    #[must_use]
    pub fn error(&self) -> Option<Error> {
        self.owner.local.status.borrow().error.clone()
    }

    /// Waits until everything up to `revision` is in. Without end if there is no such revision, or no node can be
    /// reached; the caller sets the time limit. Dropping the future does no harm.
    ///
    /// # Errors
    /// The one that ended the cache.
    pub async fn wait_for(&self, revision: Revision) -> Result<(), Error> {
        let mut status = self.owner.local.status.subscribe();
        // The sender lives as long as this cache.
        match status.wait_for(|status| status.revision >= revision || status.error.is_some()).await {
            Ok(status) if status.revision >= revision => Ok(()),
            Ok(status) => status.error.clone().map_or(Ok(()), Err),
            Err(_) => Ok(()),
        }
    }

    /// Every change from now on, in the order of revisions.
    pub fn changes(&self) -> CacheChanges {
        self.view_and_changes().1
    }

    /// All keys, and every change after them.
    pub fn view_and_changes(&self) -> (CacheView, CacheChanges) {
        // Under one lock, so that nothing comes between the view and the first change.
        let content = self.owner.local.content.read();
        let view = content.view.clone();
        let changes = content.changes.as_ref().map(broadcast::Sender::subscribe);
        let changes =
            changes.map_or_else(|| stream::empty().boxed(), |batches| Follower::new(batches, &view).changes());
        (view, CacheChanges(changes))
    }

    /// Follows what `revision` and `state` say.
    pub(crate) fn watch_status(&self) -> CacheStatus {
        CacheStatus(self.owner.local.status.subscribe())
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (len, revision, state) = (self.len(), self.revision(), self.state());
        f.debug_struct("Cache").field("len", &len).field("revision", &revision).field("state", &state).finish()
    }
}

/// Tells when a cache may have changed.
pub(crate) struct CacheStatus(watch::Receiver<Status>);

impl CacheStatus {
    /// Waits for a change since the last call; the error that ended the cache.
    pub(crate) async fn changed(&mut self) -> Result<(), Error> {
        if let Some(error) = &self.0.borrow().error {
            return Err(error.clone());
        }
        self.0.changed().await.map_err(|_| closed())
    }
}

/// The changes of a cache, one by one. It ends with the cache.
///
/// A reader that falls far behind is not told every step: it gets what leads from the last change it took to where
/// the cache is by then, marked as [`merged`](CacheChange::merged). The changes it gets always add up.
#[must_use = "changes do nothing unless they are read"]
pub struct CacheChanges(BoxStream<'static, CacheChange>);

impl CacheChanges {
    /// The next change; `None` when the cache has ended.
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<CacheChange> {
        self.0.next().await
    }
}

impl Stream for CacheChanges {
    type Item = CacheChange;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<CacheChange>> {
        self.0.poll_next_unpin(cx)
    }
}

impl fmt::Debug for CacheChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheChanges").finish_non_exhaustive()
    }
}

/// One reader of changes.
struct Follower {
    batches: broadcast::Receiver<Arc<Batch>>,
    /// What the changes that were taken over add up to.
    seen: CacheView,
    /// Whether batches after `seen` are gone.
    behind: bool,
    pending: VecDeque<CacheChange>,
}

impl Follower {
    fn new(batches: broadcast::Receiver<Arc<Batch>>, view: &CacheView) -> Self {
        Self { batches, seen: view.clone(), behind: false, pending: VecDeque::new() }
    }

    fn changes(self) -> BoxStream<'static, CacheChange> {
        stream::unfold(self, |mut follower| async move {
            loop {
                if let Some(change) = follower.pending.pop_front() {
                    return Some((change, follower));
                }
                match follower.batches.recv().await {
                    Ok(batch) => follower.take(&batch),
                    Err(broadcast::error::RecvError::Lagged(_)) => follower.behind = true,
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        })
        .boxed()
    }

    fn take(&mut self, batch: &Batch) {
        if std::mem::take(&mut self.behind) {
            self.pending.extend(self.seen.changes_to(&batch.view));
        } else {
            self.pending.extend(batch.changes.iter().cloned());
        }
        self.seen = batch.view.clone();
    }
}

impl Local {
    /// Applies an update, in one step.
    fn apply(&self, update: &WatchUpdate) {
        {
            let mut content = self.content.write();
            let mut changes = Vec::with_capacity(update.events.len());
            for event in &update.events {
                let before = content.view.apply(event);
                let after = match event {
                    WatchEvent::Put { kv, .. } => Some(kv.clone()),
                    WatchEvent::Delete { .. } => None,
                };
                let (key, revision) = (event.key().clone(), event.revision());
                changes.push(CacheChange { key, before, after, revision, merged: false });
            }
            content.view.revision = update.revision;
            content.publish(changes);
        }
        self.status.send_modify(|status| status.revision = update.revision);
    }

    /// Takes over what a new list holds, in one step.
    fn replace(&self, view: CacheView) {
        let revision = view.revision;
        {
            let mut content = self.content.write();
            let changes = content.view.changes_to(&view);
            content.view = view;
            content.publish(changes);
        }
        self.status.send_modify(|status| status.revision = revision);
    }

    fn set_live(&self, live: bool) {
        self.status.send_if_modified(|status| std::mem::replace(&mut status.live, live) != live);
    }

    fn end(&self, error: Error) {
        self.content.write().changes = None;
        self.status.send_modify(|status| {
            status.live = false;
            status.error = Some(error);
        });
    }
}

impl Content {
    fn publish(&self, changes: Vec<CacheChange>) {
        if let Some(readers) = &self.changes
            && !changes.is_empty()
        {
            // Fails if there is no reader, and then nobody misses it.
            let _ = readers.send(Arc::new(Batch { changes, view: self.view.clone() }));
        }
    }
}

/// The task of a cache.
async fn keep_fresh(local: Arc<Local>, client: Client, list: SnapshotWatchCall, mut watch: WatchStream) {
    let error = loop {
        let error = follow(&local, watch).await;
        local.set_live(false);
        if error.kind() != ErrorKind::Compacted {
            break error;
        }
        tracing::debug!(%error, "a cache lists again");
        let revision = local.status.borrow().revision;
        match list_again(&client, &list, revision).await {
            Ok(snapshot) => {
                local.replace(CacheView::of(snapshot.revision, snapshot.kvs));
                watch = snapshot.watch;
            }
            Err(error) => break error,
        }
    };
    local.end(error);
}

/// Applies updates until the watch ends.
async fn follow(local: &Local, mut watch: WatchStream) -> Error {
    let mut live = watch.live();
    loop {
        let now = *live.borrow_and_update();
        local.set_live(now);
        tokio::select! {
            update = watch.next() => match update {
                Some(Ok(update)) => local.apply(&update),
                Some(Err(error)) => return error,
                None => return closed(),
            },
            Ok(()) = live.changed() => {}
        }
    }
}

/// Lists for as long as it takes. Never goes back in time, whoever answers.
async fn list_again(client: &Client, list: &SnapshotWatchCall, seen: Revision) -> Result<SnapshotWatch, Error> {
    let mut retries = 0;
    loop {
        let error = match list.clone().min_revision(seen).await {
            Ok(snapshot) => return Ok(snapshot),
            Err(error) => error,
        };
        if !error.kind().may_pass() {
            return Err(error);
        }
        let pause = backoff(retries, &mut client.shared().state.lock().rng);
        retries += 1;
        tokio::time::sleep(pause).await;
    }
}

fn closed() -> Error {
    Error::new("cache", ErrorKind::Closed, Outcome::NotApplied, "the cache has ended")
}

impl Client {
    /// Keeps a local copy of an interval of keys; ready once it is filled.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::KeyRange;
    ///
    /// let services = client.cache(KeyRange::prefix("services/")).await?;
    /// let written = client.put("services/a", "10.0.0.1:80").await?.header.revision;
    /// services.wait_for(written).await?;
    /// assert!(services.get("services/a").is_some());
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// Of filling it: as [`watch_from_snapshot`](Self::watch_from_snapshot).
    pub fn cache(&self, range: KeyRange) -> CacheCall {
        CacheCall { client: self.clone(), list: self.watch_from_snapshot(range) }
    }

    /// Keeps a local copy of all keys that begin with `prefix`.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// let services = client.cache_prefix("services/").await?;
    /// let mut changes = services.changes();
    /// client.put("services/a", "10.0.0.1:80").await?;
    /// if let Some(change) = changes.next().await {
    ///     println!("{:?}: {:?} -> {:?}", change.key, change.before, change.after);
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`cache`](Self::cache).
    pub fn cache_prefix(&self, prefix: impl IntoBytes) -> CacheCall {
        self.cache(KeyRange::prefix(prefix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv(key: &str, revision: u64) -> KeyValue {
        KeyValue {
            key: key.into_bytes(),
            value: Bytes::new(),
            create_revision: Revision(revision),
            mod_revision: Revision(revision),
            version: 1,
            lease: None,
        }
    }

    fn view(revision: u64, kvs: &[(&str, u64)]) -> CacheView {
        CacheView::of(Revision(revision), kvs.iter().map(|(key, revision)| kv(key, *revision)).collect())
    }

    #[test]
    fn differences_lead_from_one_view_to_the_other() {
        let (before, after) = (view(4, &[("a", 1), ("b", 2), ("c", 3)]), view(9, &[("b", 2), ("c", 8), ("d", 9)]));
        let changes = before.changes_to(&after);
        let expected = [("a", Some(1), None), ("c", Some(3), Some(8)), ("d", None, Some(9))];
        assert_eq!(changes.len(), expected.len());
        for (change, (key, before, after)) in changes.iter().zip(expected) {
            let revision = |kv: &Option<KeyValue>| kv.as_ref().map(|kv| kv.mod_revision.get());
            assert_eq!((&change.key[..], revision(&change.before)), (key.as_bytes(), before));
            assert_eq!((revision(&change.after), change.revision, change.merged), (after, Revision(9), true));
        }
    }

    #[test]
    fn a_view_is_read_by_key_and_by_interval() {
        let view = view(3, &[("a/1", 1), ("a/2", 2), ("b", 3)]);
        let keys = |range: KeyRange| view.range(&range).map(|kv| kv.mod_revision.get()).collect::<Vec<_>>();
        assert_eq!(keys(KeyRange::all()), [1, 2, 3]);
        assert_eq!(keys(KeyRange::prefix("a/")), [1, 2]);
        assert_eq!(keys(KeyRange::from("a/2")), [2, 3]);
        assert_eq!(keys(KeyRange::between("b", "a")), [0; 0], "an interval that ends before it begins");
        assert_eq!(view.get("b"), Some(&kv("b", 3)));
        assert_eq!((view.get("c"), view.len(), view.revision()), (None, 3, Revision(3)));
    }

    #[tokio::test]
    async fn a_reader_that_is_too_slow_gets_changes_that_add_up() {
        let local = Local {
            content: RwLock::new(Content { view: view(1, &[("k", 1)]), changes: Some(broadcast::Sender::new(4)) }),
            status: watch::Sender::new(Status { revision: Revision(1), live: true, error: None }),
        };
        let follow = || {
            let content = local.content.read();
            Follower::new(content.changes.as_ref().unwrap().subscribe(), &content.view).changes()
        };
        let mut slow = follow();
        for revision in 2..=20 {
            let events = vec![WatchEvent::Put { kv: kv("k", revision), previous: None }];
            local.apply(&WatchUpdate { revision: Revision(revision), events });
        }
        let mut held = Some(kv("k", 1));
        let (mut told, mut merged) = (0, 0);
        while held != Some(kv("k", 20)) {
            let change = slow.next().await.unwrap();
            assert_eq!(change.before, held, "a change does not begin where the one before it ended");
            held = change.after;
            told += 1;
            merged += u32::from(change.merged);
        }
        assert_eq!((told, merged), (4, 1));
    }
}
