//! Watches that go on: a stream of changes that survives its node, its connection and its leader.
//!
//! A watch has a cursor: everything up to that revision was handed out. It asks any node for what follows; when that
//! ends, for whatever reason that another try can mend, it asks the next one from the cursor on. So nothing is lost and
//! nothing comes twice, and half a revision that was on its way is read again as a whole. All of this happens when the
//! reader asks for more; `watch_link` carries the answers.

use std::fmt;
use std::future::IntoFuture;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::{ErrorCode, Revision, v1};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, Stream, StreamExt};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::call::Unchosen;
use crate::client::Client;
use crate::error::{Error, ErrorKind, Outcome};
use crate::kv::{IntoBytes, KeyRange, KeyValue};
use crate::namespace::Enter as _;
use crate::observe::Notice;
use crate::options::bounded;
use crate::retry::{Cause, Failure, Resend, backoff};
use crate::topology::{Address, Route};
use crate::until::{Ended, Until};
use crate::watch_link::{Delivery, Ending, Subscription};

const OPERATION: &str = "watch";
/// How long a node may take to create a watch before another one is asked. It doubles with each failure in a row, since a
/// cluster to which thousands come back at once needs its time.
const CREATION: Duration = Duration::from_secs(2);
const CREATION_DOUBLINGS_MAX: u32 = 4;
/// Opening a watch asks this many nodes, if need be, within its timeout.
const OPENING_ATTEMPTS: u32 = 4;
/// A watch that was served for as long counts as one that works: what ends it then is its first failure.
const SETTLED_AFTER: Duration = Duration::from_secs(1);
/// How often a node is looked for while there is none: news wake the search.
const SEARCH: Duration = Duration::from_secs(60 * 60);

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// The key was written.
    Put {
        /// What it holds since.
        kv: KeyValue,
        /// What it held before, if it existed and was asked for.
        previous: Option<KeyValue>,
    },
    /// The key was deleted, or its lease ended.
    Delete {
        /// The key.
        key: Bytes,
        /// The revision that deleted it.
        revision: Revision,
        /// What it held before, if that was asked for.
        previous: Option<KeyValue>,
    },
}

impl WatchEvent {
    /// `None` for what no node of this version sends.
    pub(crate) fn from_wire(event: v1::WatchEvent) -> Option<Self> {
        let kind = event.kind();
        let (kv, previous) = (KeyValue::from(event.kv?), event.previous.map(KeyValue::from));
        match kind {
            v1::watch_event::Kind::Put => Some(Self::Put { kv, previous }),
            v1::watch_event::Kind::Delete => Some(Self::Delete { key: kv.key, revision: kv.mod_revision, previous }),
            v1::watch_event::Kind::Unspecified => None,
        }
    }

    /// The key that changed.
    #[must_use]
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put { kv, .. } => &kv.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The revision of the change. Events of one transaction share it.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            Self::Put { kv, .. } => kv.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }

    /// What the key held before, if it existed and the watch asked for it.
    #[must_use]
    pub fn previous(&self) -> Option<&KeyValue> {
        match self {
            Self::Put { previous, .. } | Self::Delete { previous, .. } => previous.as_ref(),
        }
    }
}

/// One or more whole revisions of what is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchUpdate {
    /// Everything up to this revision has been delivered with this update.
    pub revision: Revision,
    /// In the order of revisions. Empty: nothing that is watched changed; only the revision advanced.
    pub events: Vec<WatchEvent>,
}

/// A watch to be opened; await it to do so.
///
/// What awaiting gives has a fixed position: whatever happens from the answering node's revision on will be delivered.
#[derive(Clone, Debug)]
#[must_use = "a watch is opened when awaited"]
pub struct Watch {
    client: Client,
    /// Without a range if the key to watch was empty: refused when awaited.
    create: v1::WatchCreate,
    timeout: Duration,
}

impl Watch {
    /// Begins with this revision, past or future, instead of with what comes next. The changes from it on are delivered
    /// first; `Compacted` if they are not kept any more.
    pub fn from(mut self, revision: Revision) -> Self {
        self.create.from_revision = revision.get();
        self
    }

    /// Delivers what the keys held before, too.
    pub fn previous(mut self) -> Self {
        self.create.previous = true;
        self
    }

    /// Leaves deletions out; undoes [`deletes_only`](Self::deletes_only).
    pub fn puts_only(mut self) -> Self {
        (self.create.no_puts, self.create.no_deletes) = (false, true);
        self
    }

    /// Leaves puts out; undoes [`puts_only`](Self::puts_only).
    pub fn deletes_only(mut self) -> Self {
        (self.create.no_puts, self.create.no_deletes) = (true, false);
        self
    }

    /// Leaves the values out.
    pub fn keys_only(mut self) -> Self {
        self.create.keys_only = true;
        self
    }

    /// Budget of opening the watch, all attempts included. Once it is open no time ends it.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

impl IntoFuture for Watch {
    type Output = Result<WatchStream, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            let timeout = bounded(self.timeout);
            let mut create = self.create;
            if create.range.is_none() {
                return Err(Error::invalid(OPERATION, "a key has at least one byte"));
            }
            create.enter(self.client.space()).map_err(|error| Error::invalid(OPERATION, error.to_string()))?;
            let mut resumable = Resumable::new(self.client, create);
            resumable.creation = CREATION.min(timeout / OPENING_ATTEMPTS);
            let client = resumable.client.clone();
            let until = Until::new(Instant::now() + timeout, client.cancel());
            let cursor = match client.shared().wait(&until, resumable.open()).await {
                Ok(cursor) => cursor?,
                Err(ended) => return Err(ended.error(OPERATION, || resumable.not_opened(timeout))),
            };
            resumable.creation = CREATION;
            Ok(WatchStream { cursor, live: resumable.live.subscribe(), updates: resumable.updates() })
        }
        .boxed()
    }
}

/// What happens to the watched keys, without end.
///
/// It goes on through the loss of its node, of the leader and of the whole cluster, for as long as that lasts, and
/// delivers each change once, in order, whole revisions at a time. It ends, after an error, only when nothing can make it
/// go on: `Compacted` if what it would have to deliver next is not kept any more ([`Error::revision`] names the oldest
/// revision left), `WrongCluster`, `Closed`, or what the server refuses for good.
///
/// A reader that takes its time delays nobody. A part of what it has to read waits here, the rest in the history of the
/// server; only when that is compacted it is too late.
///
/// A watch counts as a clone of its client. Dropping it ends it on the server, too.
#[must_use = "a watch does nothing unless it is read"]
pub struct WatchStream {
    /// Of `next` and `poll_next`: keeps what is under way while nobody waits.
    updates: BoxStream<'static, Result<WatchUpdate, Error>>,
    cursor: Revision,
    live: watch::Receiver<bool>,
}

impl WatchStream {
    /// The next update; `None` after the error that ended the watch.
    ///
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    /// The one that ends the watch; see there.
    pub async fn next(&mut self) -> Option<Result<WatchUpdate, Error>> {
        StreamExt::next(self).await
    }

    /// Everything up to this revision was delivered. A watch opened [`from`](Watch::from) the revision after it goes on
    /// where this one stands, also in another process.
    #[must_use]
    pub fn cursor(&self) -> Revision {
        self.cursor
    }

    /// Whether a node serves the watch at the moment. It changes only while the watch is read.
    pub(crate) fn live(&self) -> watch::Receiver<bool> {
        self.live.clone()
    }
}

impl Stream for WatchStream {
    type Item = Result<WatchUpdate, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.updates.poll_next_unpin(cx);
        if let Poll::Ready(Some(Ok(update))) = &next {
            self.cursor = update.revision;
        }
        next
    }
}

impl fmt::Debug for WatchStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let live = *self.live.borrow();
        f.debug_struct("WatchStream").field("cursor", &self.cursor).field("live", &live).finish_non_exhaustive()
    }
}

/// A watch that is asked for again wherever it ended.
struct Resumable {
    client: Client,
    create: v1::WatchCreate,
    /// `None` until a node said where a watch that begins with what comes next begins.
    cursor: Option<Revision>,
    active: Option<Active>,
    /// Whether a node has created it before.
    opened: bool,
    creation: Duration,
    /// Nodes that failed since the last one that worked.
    tried: Vec<Address>,
    /// Failures since then.
    failures: u32,
    resume_at: Instant,
    last_failure: Option<(Address, Failure)>,
    live: watch::Sender<bool>,
}

/// The watch as one node serves it.
struct Active {
    address: Address,
    subscription: Subscription,
    begun: Instant,
    created: bool,
}

enum Step {
    Created(Revision),
    Update(WatchUpdate),
    /// Something changed; go on.
    Again,
}

impl Resumable {
    fn new(client: Client, create: v1::WatchCreate) -> Self {
        Self {
            client,
            cursor: create.from_revision.checked_sub(1).map(Revision),
            create,
            active: None,
            opened: false,
            creation: CREATION,
            tried: Vec::new(),
            failures: 0,
            resume_at: Instant::now(),
            last_failure: None,
            live: watch::Sender::new(false),
        }
    }

    async fn open(&mut self) -> Result<Revision, Error> {
        loop {
            if let Step::Created(cursor) = self.step().await? {
                return Ok(cursor);
            }
        }
    }

    fn updates(self) -> BoxStream<'static, Result<WatchUpdate, Error>> {
        // Boxed, since it is passed on with each update.
        stream::unfold(Some(Box::new(self)), |resumable| async move {
            let mut resumable = resumable?;
            loop {
                match resumable.step().await {
                    Ok(Step::Update(update)) => return Some((Ok(update), Some(resumable))),
                    Ok(Step::Created(_) | Step::Again) => {}
                    Err(error) => return Some((Err(error), None)),
                }
            }
        })
        .boxed()
    }

    async fn step(&mut self) -> Result<Step, Error> {
        let Some(active) = &mut self.active else {
            self.subscribe().await?;
            return Ok(Step::Again);
        };
        let delivery = if active.created {
            active.subscription.next().await
        } else {
            let patience = self.creation * (1 << self.failures.min(CREATION_DOUBLINGS_MAX));
            match tokio::time::timeout_at(active.begun + patience, active.subscription.next()).await {
                Ok(delivery) => delivery,
                Err(_) => {
                    Delivery::Ended(Ending::Failed(Failure::Silent { sent: true, after: active.begun.elapsed() }))
                }
            }
        };
        match delivery {
            Delivery::Created(created) => self.created(&created),
            Delivery::Update(update) => {
                self.cursor = Some(update.revision);
                self.client.shared().saw(update.revision.get());
                self.works();
                Ok(Step::Update(update))
            }
            Delivery::Ended(Ending::Overrun) => {
                self.leave();
                Ok(Step::Again)
            }
            Delivery::Ended(Ending::Failed(failure)) => self.failed(failure),
        }
    }

    /// Asks a node for what follows the cursor.
    async fn subscribe(&mut self) -> Result<(), Error> {
        let shared = self.client.shared();
        tokio::select! {
            () = tokio::time::sleep_until(self.resume_at) => {}
            () = shared.closed.cancelled() => {}
        }
        let address = match shared.links.established(&self.tried) {
            _ if shared.closed.is_cancelled() => return Err(Error::closed(OPERATION)),
            Some(address) => address,
            None => match shared.choose(Route::Any, &self.tried, &(Instant::now() + SEARCH).into()).await {
                Ok(address) => address,
                Err(Unchosen::Ended(Ended::Deadline)) => return Ok(()),
                Err(Unchosen::Ended(_)) => return Err(Error::closed(OPERATION)),
                Err(Unchosen::Foreign(message)) => {
                    return Err(Error::new(OPERATION, ErrorKind::WrongCluster, Outcome::NotApplied, message));
                }
            },
        };
        self.create.from_revision = self.cursor.map_or(0, |cursor| cursor.get().saturating_add(1));
        let subscription = shared.links.subscribe(shared, &address, self.create.clone(), self.client.space());
        self.active = Some(Active { address, subscription, begun: Instant::now(), created: false });
        Ok(())
    }

    fn created(&mut self, created: &v1::WatchCreated) -> Result<Step, Error> {
        let Some(active) = &mut self.active else { return Ok(Step::Again) };
        let shared = self.client.shared();
        if let Err(failure) = shared.vouch(&active.address, created.header.as_ref(), active.begun.elapsed()) {
            return self.failed(failure);
        }
        let asked = self.create.from_revision;
        if created.from_revision == 0 || (asked != 0 && created.from_revision != asked) {
            let message = format!("asked for revision {asked}, the node begins with {}", created.from_revision);
            return self.failed(Failure::Lost(Cause::text(message)));
        }
        active.created = true;
        let cursor = Revision(created.from_revision - 1);
        self.cursor = Some(cursor);
        self.live.send_replace(true);
        if std::mem::replace(&mut self.opened, true) {
            let shared = self.client.shared();
            shared.counters.watch_resumes.add();
            shared.notice(&Notice::WatchResumed);
        }
        Ok(Step::Created(cursor))
    }

    fn failed(&mut self, failure: Failure) -> Result<Step, Error> {
        let Some(active) = self.leave() else { return Ok(Step::Again) };
        let shared = self.client.shared();
        shared.note_failure(&active.address, &failure);
        let Some(at_least) = resume_after(&failure) else {
            return Err(failure.into_error(OPERATION, Resend::Idempotent, active.address.as_str()));
        };
        if active.created && active.begun.elapsed() >= SETTLED_AFTER {
            self.works();
        }
        let shared = self.client.shared();
        let pause = at_least.max(backoff(self.failures, &mut shared.state.lock().rng));
        tracing::debug!(address = %active.address, cause = failure.message(), ?pause, "a watch goes on elsewhere");
        self.resume_at = Instant::now() + pause;
        self.failures = self.failures.saturating_add(1);
        if !self.tried.contains(&active.address) {
            self.tried.push(active.address.clone());
        }
        self.last_failure = Some((active.address, failure));
        Ok(Step::Again)
    }

    fn works(&mut self) {
        self.failures = 0;
        self.tried.clear();
    }

    fn leave(&mut self) -> Option<Active> {
        self.live.send_replace(false);
        self.active.take()
    }

    fn not_opened(self, timeout: Duration) -> Error {
        match self.last_failure {
            Some((address, failure)) => failure
                .into_error(OPERATION, Resend::Idempotent, address.as_str())
                .after(format!("{timeout:?} and {} retries", self.failures)),
            None => {
                let message = format!("no node could be asked within {timeout:?}");
                Error::new(OPERATION, ErrorKind::Unavailable, Outcome::NotApplied, message)
            }
        }
    }
}

/// How long to wait at least before a watch that ended like this is asked for again; `None` if that is in vain.
fn resume_after(failure: &Failure) -> Option<Duration> {
    match failure {
        Failure::NotSent(_) | Failure::Lost(_) | Failure::Silent { .. } => Some(Duration::ZERO),
        Failure::Foreign(_) | Failure::Closed { .. } | Failure::Cancelled { .. } => None,
        Failure::Refused(status) => match status.code()? {
            ErrorCode::NotLeader
            | ErrorCode::Unavailable
            | ErrorCode::DeadlineExceeded
            | ErrorCode::ResourceExhausted
            | ErrorCode::Behind
            | ErrorCode::LeadershipLost
            | ErrorCode::Internal
            | ErrorCode::Cancelled => Some(Duration::from_millis(status.detail.backoff_ms)),
            _ => None,
        },
    }
}

impl Client {
    /// Watches one key.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::WatchEvent;
    ///
    /// let mut watch = client.watch("greeting").await?;
    /// client.put("greeting", "hello").await?;
    /// client.delete("greeting").await?;
    /// 'events: while let Some(update) = watch.next().await {
    ///     for event in update?.events {
    ///         match event {
    ///             WatchEvent::Put { kv, .. } => println!("{:?} = {:?}", kv.key, kv.value),
    ///             WatchEvent::Delete { .. } => break 'events,
    ///         }
    ///     }
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// Of opening it: `InvalidArgument`, `Compacted`, `Unsupported`, `Unavailable`, `DeadlineExceeded`,
    /// `ResourceExhausted`, `WrongCluster`, `Closed`.
    pub fn watch(&self, key: impl IntoBytes) -> Watch {
        let start = key.into_bytes();
        let mut end = Vec::with_capacity(start.len() + 1);
        end.extend_from_slice(&start);
        end.push(0);
        self.watching((!start.is_empty()).then(|| KeyRange::between(start, end)))
    }

    /// Watches all keys that begin with `prefix`.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// let revision = client.put("services/api", "10.0.0.1:8080").await?.header.revision;
    /// let mut watch = client.watch_prefix("services/").from(revision).await?;
    /// let update = watch.next().await.expect("a watch goes on by itself")?;
    /// assert_eq!(update.events[0].key(), &b"services/api"[..]);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`watch`](Self::watch).
    pub fn watch_prefix(&self, prefix: impl IntoBytes) -> Watch {
        self.watch_range(KeyRange::prefix(prefix))
    }

    /// Watches an interval of keys.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::KeyRange;
    ///
    /// let revision = client.put("b", "1").await?.header.revision;
    /// let mut watch = client.watch_range(KeyRange::between("a", "c")).from(revision).await?;
    /// assert_eq!(watch.next().await.expect("a watch goes on by itself")?.revision, revision);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`watch`](Self::watch).
    pub fn watch_range(&self, range: KeyRange) -> Watch {
        self.watching(Some(range))
    }

    fn watching(&self, range: Option<KeyRange>) -> Watch {
        let range = range.map(v1::KeyRange::from);
        let create = v1::WatchCreate { range, shared: true, ..v1::WatchCreate::default() };
        Watch { client: self.clone(), create, timeout: self.options().call_timeout }
    }
}

#[cfg(test)]
mod tests {
    use d_engine_proto::DetailedStatus;

    use super::*;

    #[test]
    fn a_watch_goes_on_after_what_time_or_another_node_can_mend_and_ends_after_the_rest() {
        let refused = |code: i32| {
            let detail = v1::ErrorDetail { code, backoff_ms: 7, ..v1::ErrorDetail::default() };
            resume_after(&Failure::Refused(Box::new(DetailedStatus { message: String::new(), detail })))
        };
        let goes_on: Vec<_> =
            ErrorCode::ALL.iter().filter(|code| refused(code.number()).is_some()).map(|code| code.name()).collect();
        let expected = [
            "NotLeader",
            "Unavailable",
            "DeadlineExceeded",
            "ResourceExhausted",
            "Behind",
            "LeadershipLost",
            "Internal",
            "Cancelled",
        ];
        assert_eq!(goes_on, expected);
        assert_eq!(refused(ErrorCode::ResourceExhausted.number()), Some(Duration::from_millis(7)));
        assert_eq!(refused(999), None, "a code of a newer server");
        assert_eq!(resume_after(&Failure::Lost(Cause::text("reset"))), Some(Duration::ZERO));
        assert_eq!(resume_after(&Failure::Foreign(String::new())), None);
    }
}
