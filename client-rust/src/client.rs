//! The client: a cheap handle on shared state, and the task that keeps the topology fresh.

use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::v1;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Leader, Member};
use crate::connection::Connections;
use crate::kv::IntoBytes;
use crate::namespace::Namespace;
use crate::options::{ClientBuilder, Options};
use crate::retry::{Budget, Failure, backoff};
use crate::session::Sessions;
use crate::stats::{Counters, Stats};
use crate::topology::{Address, Topology};
use crate::watch_link::Links;

/// How old the member list may grow while all is well.
const REFRESH_PERIOD: Duration = Duration::from_secs(30);
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
    /// Runs what goes on in the background.
    pub(crate) runtime: Handle,
    pub(crate) state: Mutex<State>,
    pub(crate) connections: Connections,
    pub(crate) links: Links,
    pub(crate) sessions: Sessions,
    /// Wakes calls that wait for a node to be available.
    pub(crate) changed: Notify,
    /// Asks for fresh members.
    pub(crate) refresh: Notify,
    pub(crate) closed: CancellationToken,
    pub(crate) counters: Counters,
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
        let shared = Arc::new(Shared {
            connections: Connections::new(options.connect_timeout),
            links: Links::default(),
            options,
            sessions: Sessions::default(),
            runtime: runtime.clone(),
            state: Mutex::new(State {
                topology: Topology::new(seeds),
                budget: Budget::new(Instant::now()),
                rng: fastrand::Rng::new(),
            }),
            changed: Notify::new(),
            refresh: Notify::new(),
            closed: CancellationToken::new(),
            counters: Counters::default(),
        });
        runtime.spawn(keep_fresh(Arc::clone(&shared)));
        Self { owner: Arc::new(Owner { shared }), space: Namespace::default() }
    }

    /// A client of the keys that begin with `prefix` and go on, which sees them without it: every key and interval
    /// that goes in gets the prefix, every key that comes out loses it, and no interval reaches beyond. Within a
    /// namespace, it is one inside. It shares everything else with this client.
    ///
    /// Leases, sessions, compaction and the cluster are of the whole store: revoking a lease deletes its keys wherever
    /// they are.
    ///
    /// ```no_run
    /// # async fn example(client: d_engine_client::Client) -> Result<(), d_engine_client::Error> {
    /// let tenant = client.namespace("tenants/7/");
    /// tenant.put("greeting", "hello").await?;
    /// assert_eq!(client.get("tenants/7/greeting").await?.into_value().as_deref(), Some(&b"hello"[..]));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn namespace(&self, prefix: impl IntoBytes) -> Self {
        Self { owner: Arc::clone(&self.owner), space: self.space.nested(&prefix.into_bytes()) }
    }

    /// Ends the client and all its clones: connections close, calls in flight fail with [`ErrorKind::Closed`] and tell
    /// their outcome, later calls fail at once. Calling it again does nothing.
    ///
    /// [`ErrorKind::Closed`]: crate::ErrorKind::Closed
    pub fn close(&self) {
        self.shared().close();
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
        self.closed.cancel();
        self.connections.retain(|_| false);
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
    let work = async {
        let mut fruitless = 0;
        loop {
            refresh(&shared).await;
            let (gap, delay) = {
                let mut state = shared.state.lock();
                if state.topology.leader_is_usable(Instant::now()) {
                    fruitless = 0;
                    (REFRESH_GAP_CALM, REFRESH_PERIOD)
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
    };
    tokio::select! {
        () = shared.closed.cancelled() => {}
        () = work => {}
    }
}

/// One round: all known nodes at once. Whoever answers much later than the first waits for the next round, so that a
/// silent node does not hold up the news of a new leader.
async fn refresh(shared: &Shared) {
    shared.counters.refreshes.add();
    let addresses = shared.state.lock().topology.addresses();
    let mut deadline = Instant::now() + shared.options.connect_timeout;
    let mut answers: FuturesUnordered<_> = addresses
        .into_iter()
        .map(|address| async move {
            let answer = shared.attempt(&address, v1::MembersRequest {}, deadline, None).await;
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
