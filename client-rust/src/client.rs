//! The client: a cheap handle on shared state, and the task that keeps the topology fresh.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use d_engine_proto::v1;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::call::Target;
use crate::cluster::{Leader, Member};
use crate::connection::Connections;
use crate::kv::IntoBytes;
use crate::namespace::Namespace;
use crate::options::{ClientBuilder, Options, bounded};
use crate::retry::{Budget, Failure, backoff};
use crate::room::Room;
use crate::session::Sessions;
use crate::stats::{Counters, Stats};
use crate::tasks::Tasks;
use crate::topology::{Address, Topology};
use crate::watch_link::Links;

/// How old the member list may grow while all is well.
const REFRESH_PERIOD: Duration = Duration::from_secs(30);
/// The same while only one address is known: when its node is lost there is nobody to ask for those that have joined it.
const REFRESH_PERIOD_ALONE: Duration = Duration::from_secs(1);
/// Rounds follow each other no faster, however many calls ask for one: with a leader that can be used, and without.
const REFRESH_GAP_CALM: Duration = Duration::from_millis(100);
const REFRESH_GAP: Duration = Duration::from_millis(20);
/// How long a round waits for further answers after the first.
const STRAGGLERS: Duration = Duration::from_millis(100);

/// A client of one cluster.
///
/// Cheap to clone; clones share connections and everything learned. What it runs in the background ends with the last
/// clone or with [`close`](Self::close). A call in flight counts as a clone.
///
/// A call ends within its timeout, whatever the network does. Dropping the future of a call abandons it: a read costs
/// nothing, a write's outcome is then unknown, as it may have been sent.
#[derive(Clone)]
pub struct Client {
    owner: Arc<Owner>,
    space: Namespace,
    cancel: Option<CancellationToken>,
}

/// Ends the background work with the last clone.
struct Owner {
    shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// What calls and the background task share.
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) tasks: Tasks,
    pub(crate) state: Mutex<State>,
    pub(crate) room: Room,
    pub(crate) connections: Connections,
    pub(crate) links: Links,
    pub(crate) sessions: Sessions,
    /// Wakes calls that wait for a node to be available.
    pub(crate) changed: Notify,
    /// Asks for fresh members.
    pub(crate) refresh: Notify,
    pub(crate) closed: CancellationToken,
    pub(crate) counters: Counters,
    /// The highest revision that an answer to a caller carried.
    pub(crate) seen: AtomicU64,
}

/// What changes with every attempt. One lock, held for a few hundred nanoseconds and never across an await.
pub(crate) struct State {
    pub(crate) topology: Topology,
    pub(crate) budget: Budget,
    pub(crate) rng: fastrand::Rng,
}

impl Client {
    /// Begins to build a client.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::new()
    }

    pub(crate) fn start(seeds: Vec<Address>, options: Options, runtime: &Handle) -> Self {
        let closed = CancellationToken::new();
        let tasks = Tasks::new(runtime, &closed);
        let shared = Arc::new(Shared {
            connections: Connections::new(options.connect_timeout, options.security.clone(), tasks.clone()),
            links: Links::default(),
            room: Room::new(options.calls_in_flight_max, options.bytes_in_flight_max),
            options,
            sessions: Sessions::default(),
            tasks,
            state: Mutex::new(State {
                topology: Topology::new(seeds),
                budget: Budget::new(Instant::now()),
                rng: fastrand::Rng::new(),
            }),
            changed: Notify::new(),
            refresh: Notify::new(),
            closed,
            counters: Counters::default(),
            seen: AtomicU64::new(0),
        });
        shared.tasks.spawn_until_closed(keep_fresh(Arc::clone(&shared)));
        Self { owner: Arc::new(Owner { shared }), space: Namespace::default(), cancel: None }
    }

    /// A client of the keys that begin with `prefix` and go on, which sees them without it: every key and interval
    /// that goes in gets the prefix, every key that comes out loses it, and no interval reaches beyond. Within a
    /// namespace, it is one inside. It shares everything else with this client.
    ///
    /// Leases, sessions, compaction and the cluster are of the whole store: revoking a lease deletes its keys wherever
    /// they are.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// let tenant = client.namespace("tenants/7/");
    /// tenant.put("greeting", "hello").await?;
    /// assert_eq!(client.get("tenants/7/greeting").await?.into_value().as_deref(), Some(&b"hello"[..]));
    /// # Ok(()) }) }
    /// ```
    #[must_use]
    pub fn namespace(&self, prefix: impl IntoBytes) -> Self {
        Self { space: self.space.nested(&prefix.into_bytes()), ..self.clone() }
    }

    /// A client whose calls end when `token` is cancelled; it shares everything else with this client. For callers that
    /// cannot drop a future to give a call up, or want to know what became of it. The token takes the place of one given
    /// before: where both count, give a child of that one.
    ///
    /// A cancelled call that was not sent yet fails with [`ErrorKind::Cancelled`] and
    /// [`Outcome::NotApplied`]. One that was sent is cancelled on the node too, as advice, and waits up to 100 ms for its
    /// word: that is what the call ends with, also a success, if it could not be taken back any more. Without a word the
    /// outcome of a write is [`Outcome::Unknown`].
    ///
    /// It ends calls, the opening of watches and caches, and the waiting for locks and elections. What was opened goes
    /// on until it is dropped: watches, caches, lease keepers, locks and leaderships that are held.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::{CancellationToken, ErrorKind, Outcome};
    ///
    /// let token = CancellationToken::new();
    /// let stop = token.clone();
    /// std::thread::spawn(move || stop.cancel());
    /// match client.cancelled_by(token).put("greeting", "hello").await {
    ///     Ok(answer) => println!("it was faster, at revision {}", answer.header.revision),
    ///     Err(error) if error.outcome() == Outcome::NotApplied => assert_eq!(error.kind(), ErrorKind::Cancelled),
    ///     Err(error) => println!("{error}"),
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// [`ErrorKind::Cancelled`]: crate::ErrorKind::Cancelled
    /// [`Outcome::NotApplied`]: crate::Outcome::NotApplied
    /// [`Outcome::Unknown`]: crate::Outcome::Unknown
    #[must_use]
    pub fn cancelled_by(&self, token: CancellationToken) -> Self {
        Self { cancel: Some(token), ..self.clone() }
    }

    /// Ends the client and all its clones: connections close, calls in flight fail with [`ErrorKind::Closed`] and tell
    /// their outcome, later calls fail at once. Calling it again does nothing. It does not wait;
    /// [`close_within`](Self::close_within) does.
    ///
    /// [`ErrorKind::Closed`]: crate::ErrorKind::Closed
    pub fn close(&self) {
        self.shared().close();
    }

    /// Ends the client and all its clones, and gives calls in flight up to `patience` to end by themselves: calls that
    /// begin meanwhile fail, the session is closed on the servers if there is time left, then everything ends as by
    /// [`close`](Self::close). Returns when every task of the client has ended: true if no call in flight was cut off.
    ///
    /// Watches, caches and lease keepers are no calls: they end with the client, without a wait for them.
    ///
    /// Dropping the future leaves the client refusing new calls; close it then.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::ErrorKind;
    /// use std::time::Duration;
    ///
    /// client.put("greeting", "hello").await?;
    /// assert!(client.close_within(Duration::from_secs(10)).await, "no call was in flight");
    /// assert_eq!(client.get("greeting").await.unwrap_err().kind(), ErrorKind::Closed);
    /// # Ok(()) }) }
    /// ```
    pub async fn close_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + bounded(patience);
        let shared = self.shared();
        let finished = shared.room.empty(bounded(patience)).await;
        if finished && !shared.closed.is_cancelled() {
            shared.close_session(deadline).await;
        }
        shared.close();
        shared.tasks.ended().await;
        finished
    }

    /// The leader, as far as this client knows.
    #[must_use]
    pub fn leader(&self) -> Option<Leader> {
        self.shared().state.lock().topology.leader().cloned()
    }

    /// What this client and its clones did so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let leader_changes = self.shared().state.lock().topology.leader_changes();
        self.shared().counters.snapshot(leader_changes)
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.owner.shared
    }

    /// Where keys enter and leave this client's namespace.
    pub(crate) fn space(&self) -> &Namespace {
        &self.space
    }

    /// What may cancel this client's calls.
    pub(crate) fn cancel(&self) -> Option<&CancellationToken> {
        self.cancel.as_ref()
    }

    /// The same client for what must go on when calls are cancelled.
    pub(crate) fn uncancelled(&self) -> Self {
        Self { cancel: None, ..self.clone() }
    }

    pub(crate) fn options(&self) -> &Options {
        &self.owner.shared.options
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let addresses = self.shared().state.lock().topology.addresses();
        f.debug_struct("Client").field("addresses", &addresses).finish_non_exhaustive()
    }
}

impl Shared {
    fn close(&self) {
        self.room.shut();
        self.closed.cancel();
        self.connections.retain(|_| false);
    }

    /// Takes note of a revision that a caller was shown.
    pub(crate) fn saw(&self, revision: u64) {
        if self.options.monotonic_reads {
            self.seen.fetch_max(revision, Ordering::Relaxed);
        }
    }

    /// Takes over what a node says of the members and the leader.
    pub(crate) fn learn(&self, response: &v1::MembersResponse) {
        let news = {
            let mut state = self.state.lock();
            state.topology.learn(response.members.iter().cloned().map(Member::from));
            let hint = response.leader.clone().map(Leader::from);
            hint.is_some_and(|leader| state.topology.hint(leader, Instant::now()))
        };
        if news {
            self.changed.notify_waiters();
            self.notice_leader();
        }
    }
}

/// Asks for the members when a call wants to know, as long as no leader can be used, and now and then.
async fn keep_fresh(shared: Arc<Shared>) {
    let mut fruitless = 0;
    loop {
        refresh(&shared).await;
        let (gap, delay) = {
            let mut state = shared.state.lock();
            if state.topology.leader_is_usable(Instant::now()) {
                fruitless = 0;
                let alone = state.topology.addresses().len() < 2;
                (REFRESH_GAP_CALM, if alone { REFRESH_PERIOD_ALONE } else { REFRESH_PERIOD })
            } else {
                fruitless += 1;
                (REFRESH_GAP, backoff(fruitless, &mut state.rng))
            }
        };
        tokio::time::sleep(gap).await;
        tokio::select! {
            () = shared.refresh.notified() => {}
            () = tokio::time::sleep(delay) => {}
        }
    }
}

/// One round: all known nodes at once. Whoever answers much later than the first waits for the next round, so that a
/// silent node does not hold up the news of a new leader. By unary calls, which do not stand in the line of a pipeline
/// that its node has stopped to read.
async fn refresh(shared: &Shared) {
    shared.counters.refreshes.add();
    let addresses = shared.state.lock().topology.addresses();
    let mut deadline = Instant::now() + shared.options.connect_timeout;
    let mut answers: FuturesUnordered<_> = addresses
        .into_iter()
        .map(|address| async move {
            let target = Target::begin(shared, &address);
            let answer = shared.attempt_unary(target, v1::MembersRequest {}, &deadline.into(), None).await;
            (address, answer)
        })
        .collect();
    let (mut answered, mut foreign) = (false, None);
    while let Ok(Some((address, answer))) = tokio::time::timeout_at(deadline, answers.next()).await {
        match answer {
            Ok(response) => {
                answered = true;
                shared.learn(&response);
                deadline = deadline.min(Instant::now() + STRAGGLERS);
            }
            Err(failure) => {
                tracing::debug!(%address, cause = failure.message(), "a node did not tell the members");
                shared.note_failure(&address, &failure);
                if let Failure::Foreign(message) = failure {
                    foreign = Some(format!("{address}: {message}"));
                }
            }
        }
    }
    drop(answers);
    let mut state = shared.state.lock();
    if let Some(foreign) = foreign
        && !answered
    {
        state.topology.estrange(foreign);
    }
    shared.changed.notify_waiters();
    shared.connections.retain(|address| state.topology.knows(address));
}
