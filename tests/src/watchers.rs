//! Watches that run while something is done to the cluster, and keep what they are delivered for the judge
//! ([`crate::watched`]): by the client, which resumes by itself, and by hand at one node.

use std::time::Duration;

use d_engine_client::{Cache, Client, Consistency, ErrorKind, KeyRange, Revision};
use d_engine_proto::{DetailedStatus, ErrorCode, v1};
use fastrand::Rng;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use crate::cluster::Cluster;
use crate::direct::DirectNode;
use crate::truth::{Change, State, Truth, View, state};
use crate::watched::{Amount, Assembler, Delivery, Watched};
use crate::{truth, wait};

/// A watch at a node that says nothing for so long is opened anew: its connection may be gone without a word.
const SILENCE: Duration = Duration::from_secs(12);
/// For one attempt to open a watch.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Deliveries between two looks whether what came can be read at the node.
const LOOK_EVERY: usize = 8;

/// The revision up to which watchers watch, once it is known.
pub type Goal = watch::Receiver<Option<u64>>;

async fn reached(goal: &mut Goal, cursor: u64) {
    // Without a sender nobody waits for the watcher any more.
    let _ = goal.wait_for(|goal| goal.is_some_and(|goal| cursor >= goal)).await;
}

/// Watches through the client until the goal. With `rng` it drops the watch every few deliveries, often after a single
/// one, and opens it again from where it stood.
///
/// # Errors
/// When the client ends the watch.
pub async fn by_client(
    client: Client,
    mut watched: Watched,
    mut rng: Option<Rng>,
    mut goal: Goal,
) -> Result<Watched, String> {
    loop {
        let mut left = rng.as_mut().map(|rng| if rng.bool() { 1 } else { rng.usize(1..100) });
        let mut call = client.watch_range(watched.view.range.clone()).timeout(ATTEMPT);
        if watched.from != 0 {
            call = call.from(Revision(watched.cursor() + 1));
        }
        for (wanted, option) in [
            (watched.view.previous, d_engine_client::Watch::previous as fn(_) -> _),
            (watched.view.no_deletes, d_engine_client::Watch::puts_only),
            (watched.view.no_puts, d_engine_client::Watch::deletes_only),
            (watched.view.keys_only, d_engine_client::Watch::keys_only),
        ] {
            if wanted {
                call = option(call);
            }
        }
        let mut stream = match call.await {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::DeadlineExceeded) => continue,
            Err(error) => return Err(format!("{}: {error}", watched.name)),
        };
        if watched.from == 0 {
            watched.from = stream.cursor().get() + 1;
        }
        loop {
            let update = tokio::select! {
                update = stream.next() => update,
                () = reached(&mut goal, watched.cursor()) => return Ok(watched),
            };
            let update = match update {
                Some(Ok(update)) => update,
                Some(Err(error)) => return Err(format!("{}: {error}", watched.name)),
                None => return Err(format!("{}: ended without an error", watched.name)),
            };
            let changes = update.events.into_iter().map(Change::from).collect();
            watched.deliveries.push(Delivery { through: update.revision.get(), changes });
            if stream.cursor() != update.revision {
                return Err(format!("{}: cursor {} after {}", watched.name, stream.cursor(), update.revision));
            }
            if let Some(left) = &mut left {
                *left -= 1;
                if *left == 0 {
                    watched.resumed += 1;
                    break;
                }
            }
        }
    }
}

/// Watches at one node by hand until the goal, resuming there after every end, and looks whether what came can be read
/// there.
///
/// # Errors
/// When the node breaks the protocol, or refuses for good.
pub async fn at_node(node: DirectNode, mut watched: Watched, mut goal: Goal) -> Result<Watched, String> {
    let mut pace = tokio::time::interval(Duration::from_millis(50));
    loop {
        pace.tick().await;
        match one_stream(&node, &mut watched, &mut goal).await {
            Ok(true) => return Ok(watched),
            Ok(false) => watched.resumed += 1,
            Err(wrong) => return Err(format!("{}: {wrong}", watched.name)),
        }
    }
}

/// What creates a watch of this view.
#[must_use]
pub fn create(view: &View, from: u64) -> v1::WatchCreate {
    v1::WatchCreate {
        range: Some(view.range.clone().into()),
        from_revision: from,
        previous: view.previous,
        no_puts: view.no_puts,
        no_deletes: view.no_deletes,
        keys_only: view.keys_only,
        shared: false,
    }
}

/// Whether the goal was reached when the stream ended.
async fn one_stream(node: &DirectNode, watched: &mut Watched, goal: &mut Goal) -> Result<bool, String> {
    use v1::watch_response::Kind;
    let from = if watched.from == 0 { 0 } else { watched.cursor() + 1 };
    let life = node.life();
    let (requests, sent) = mpsc::channel(1);
    let action = v1::watch_request::Action::Create(create(&watched.view, from));
    if requests.send(v1::WatchRequest { watch_id: 7, action: Some(action) }).await.is_err() {
        return Ok(false);
    }
    let mut stubs = node.watch();
    let Ok(Ok(answers)) = tokio::time::timeout(ATTEMPT, stubs.watch(ReceiverStream::new(sent))).await else {
        return Ok(goal.borrow().is_some_and(|goal| watched.cursor() >= goal));
    };
    let mut answers = answers.into_inner();
    let mut assembler = Assembler::default();
    let mut created = false;
    loop {
        let answer = tokio::select! {
            answer = tokio::time::timeout(SILENCE, answers.message()) => answer,
            () = reached(goal, watched.cursor()), if created => return Ok(true),
        };
        let Ok(Ok(Some(answer))) = answer else { return Ok(false) };
        if answer.watch_id != 7 {
            return Err(format!("an answer for watch {}", answer.watch_id));
        }
        let delivery = match answer.kind {
            Some(Kind::Created(answer)) => {
                let header = answer.header.unwrap_or_default();
                let expected = if from == 0 { header.revision + 1 } else { from };
                if created || answer.from_revision != expected {
                    return Err(format!("created from {} instead of {expected}", answer.from_revision));
                }
                created = true;
                if watched.from == 0 {
                    watched.from = answer.from_revision;
                }
                continue;
            }
            Some(Kind::Events(events)) if created => assembler.events(events)?,
            Some(Kind::Bookmark(bookmark)) if created => Some(assembler.bookmark(bookmark.revision)?),
            Some(Kind::Ended(ended)) => {
                let detail = ended.error.unwrap_or_default();
                let code = ErrorCode::from_number(detail.code);
                let for_good = [ErrorCode::Compacted, ErrorCode::InvalidArgument, ErrorCode::Unsupported];
                if code.is_none_or(|code| for_good.contains(&code)) {
                    return Err(format!("ended with {code:?}: {}", ended.message));
                }
                return Ok(false);
            }
            _ => return Err("an answer out of turn".to_owned()),
        };
        let Some(delivery) = delivery else { continue };
        // A bookmark of what is known, or of what lies before the first revision asked for, says nothing, and truly.
        if delivery.changes.is_empty() && delivery.through <= watched.cursor() {
            continue;
        }
        let through = delivery.through;
        watched.deliveries.push(delivery);
        if watched.deliveries.len().is_multiple_of(LOOK_EVERY) {
            readable(node, life, through).await?;
        }
    }
}

/// Whether what a watch delivered can be read there, as long as the process that delivered it lives.
async fn readable(node: &DirectNode, life: u64, revision: u64) -> Result<(), String> {
    match node.get("look", v1::Consistency::Eventual, 0).await {
        Ok(answer) => {
            let applied = answer.header.unwrap_or_default().revision;
            if applied < revision && node.life() == life {
                return Err(format!("revision {revision} came while only {applied} can be read"));
            }
        }
        // It may have been stopped in between.
        Err(status) => {
            let code = DetailedStatus::from_status(&status).and_then(|detailed| detailed.code());
            if code == Some(ErrorCode::Behind) {
                return Err(format!("revision {revision} came before it could be read"));
            }
        }
    }
    Ok(())
}

/// Watches of every kind on a cluster, and caches beside them.
#[derive(Debug)]
pub struct Watchers {
    client: Client,
    base: (u64, State),
    goal: watch::Sender<Option<u64>>,
    /// Everything, from the base on: the truth, once it was checked.
    whole: tokio::task::JoinHandle<Result<Watched, String>>,
    tasks: JoinSet<Result<Watched, String>>,
    caches: Vec<(KeyRange, Cache)>,
}

/// What the watchers of a cluster saw.
#[derive(Debug)]
pub struct Findings {
    /// The history of the store.
    pub truth: Truth,
    /// Watches judged.
    pub watches: usize,
    /// Their sum.
    pub amount: Amount,
    /// Caches compared.
    pub caches: usize,
}

impl Watchers {
    /// Begins to watch the cluster, with special attention to what lies below `prefix` and to `key`.
    ///
    /// # Panics
    /// When the store cannot be read.
    pub async fn start(cluster: &Cluster, prefix: &str, key: &str, rng: &mut Rng) -> Self {
        let build = || {
            let client = Client::builder().endpoints(cluster.addresses()).call_timeout(wait::PATIENCE);
            client.build().expect("endpoints")
        };
        let client = build();
        let (base_revision, base) = content(&client).await;
        let (goal, goals) = watch::channel(None);

        let everything = View { previous: true, ..View::of(KeyRange::all()) };
        let first = base_revision + 1;
        let watched = Watched::new("the truth", everything.clone(), first);
        let whole = tokio::spawn(by_client(client.clone(), watched, None, goals.clone()));

        let below = || View::of(KeyRange::prefix(prefix));
        let one = || View::of(single(key));
        let half = KeyRange::between(format!("{prefix}/1"), format!("{prefix}/3"));
        let mut tasks = JoinSet::new();
        let ours = [
            ("prefix from now", View { previous: true, ..below() }, 0, false),
            ("everything, dropped again and again", everything.clone(), first, true),
            ("key, dropped again and again", View { previous: true, ..one() }, first, true),
            ("deletions of a range", View { no_puts: true, previous: true, ..View::of(half.clone()) }, first, false),
            ("keys of puts from the future", View { no_deletes: true, keys_only: true, ..below() }, first + 500, true),
            ("keys that do not exist", View::of(KeyRange::prefix("nowhere/")), first, false),
        ];
        for (name, view, from, restless) in ours {
            let rng = restless.then(|| rng.fork());
            tasks.spawn(by_client(build(), Watched::new(name, view, from), rng, goals.clone()));
        }
        for node in cluster.nodes() {
            let at_this = [
                ("everything", everything.clone(), first),
                ("prefix from now", below(), 0),
                ("key", View { previous: true, ..one() }, first),
                ("range from the future", View { keys_only: true, ..View::of(half.clone()) }, first + 300),
                ("keys that do not exist", View::of(KeyRange::prefix("nowhere/")), first),
            ];
            for (name, view, from) in at_this {
                let name = format!("{name}, at node {}", node.id);
                tasks.spawn(at_node(node.direct(ATTEMPT), Watched::new(name, view, from), goals.clone()));
            }
        }
        let mut caches = Vec::new();
        for range in [KeyRange::prefix(prefix), KeyRange::all()] {
            caches.push((range.clone(), build().cache(range).await.expect("a cache")));
        }
        Self { client, base: (base_revision, base), goal, whole, tasks, caches }
    }

    /// Waits until every watch has come to the present, in which nobody writes, and judges each.
    ///
    /// # Errors
    /// The first one that is wrong, or that does not come this far.
    pub async fn judge(mut self) -> Result<Findings, String> {
        let (last, end) = content(&self.client).await;
        self.goal.send_replace(Some(last));
        let patience = tokio::time::Instant::now() + wait::PATIENCE;
        let late = |what: &str| format!("{what} did not come to revision {last} within {:?}", wait::PATIENCE);

        let whole = tokio::time::timeout_at(patience, self.whole).await.map_err(|_| late("the watch of everything"))?;
        let whole = whole.map_err(|error| error.to_string())??;
        let changes: Vec<Change> = whole.deliveries.iter().flat_map(|delivery| delivery.changes.clone()).collect();
        let truth =
            Truth::new(self.base.0, self.base.1, changes).map_err(|wrong| format!("watch of everything: {wrong}"))?;
        if truth.last() != last {
            return Err(format!("the watch of everything ends at {} instead of {last}", truth.last()));
        }
        truth.check_state(last, &KeyRange::all(), &end).map_err(|wrong| format!("watch and read differ: {wrong}"))?;
        whole.judge(&truth)?;
        past(&self.client, &truth).await?;

        let (mut watches, mut amount) = (1, Amount::default());
        while !self.tasks.is_empty() {
            let joined = tokio::time::timeout_at(patience, self.tasks.join_next()).await;
            let joined = joined.map_err(|_| late(&format!("{} watches", self.tasks.len())))?;
            let Some(watched) = joined else { break };
            let watched = watched.map_err(|error| error.to_string())??;
            let one = watched.judge(&truth)?;
            watches += 1;
            amount.changes += one.changes;
            amount.bookmarks += one.bookmarks;
            amount.resumed += one.resumed;
        }
        for (range, cache) in &self.caches {
            let fresh = tokio::time::timeout_at(patience, cache.wait_for(Revision(last))).await;
            fresh.map_err(|_| late("a cache"))?.map_err(|error| format!("a cache ended: {error}"))?;
            let view = cache.view();
            let found = state(view.iter().cloned());
            truth
                .check_state(view.revision().get(), range, &found)
                .map_err(|wrong| format!("the cache of {range:?}: {wrong}"))?;
        }
        Ok(Findings { truth, watches, amount, caches: self.caches.len() })
    }
}

/// The interval of one key.
#[must_use]
pub fn single(key: &str) -> KeyRange {
    KeyRange::between(key, format!("{key}\0"))
}

/// The store's revision and what it holds then, read linearizably.
///
/// # Panics
/// When it cannot be read.
pub async fn content(client: &Client) -> (u64, State) {
    wait::until("the whole store to be read", wait::PATIENCE, || async {
        let first = client.range(KeyRange::all()).consistency(Consistency::Linearizable).await.ok()?;
        let revision = first.header.revision;
        let mut found = truth::state(first.kvs);
        let mut rest = first.rest;
        while let Some(range) = rest {
            let page = client.range(range).revision(revision).await.ok()?;
            found.extend(truth::state(page.kvs));
            rest = page.rest;
        }
        Some((revision.get(), found))
    })
    .await
}

/// Compares reads at some past revisions with the history.
async fn past(client: &Client, truth: &Truth) -> Result<(), String> {
    let span = truth.last() - truth.first();
    for part in 1..=4 {
        let revision = truth.first() + span * part / 5;
        if revision == 0 {
            continue;
        }
        let found = client.range(KeyRange::all()).revision(Revision(revision)).all().await;
        let found = found.map_err(|error| format!("a read at revision {revision}: {error}"))?;
        truth.check_state(revision, &KeyRange::all(), &state(found))?;
    }
    Ok(())
}
