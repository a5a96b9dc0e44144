//! The streams that carry watches: one per node at most, shared by all watches of a client there.
//!
//! A link is opened by its first watch and ends with its last. Its task takes answers off the wire as they come and
//! waits for no reader: each watch has a mailbox, and when that is full the watch is ended, here and on the node. Its
//! reader notices after what is still in the mailbox. So a slow reader delays nobody, and holds no more memory than
//! `MAILBOX_BYTES_MAX` and the revision that is being put together.
//!
//! It knows nothing of cursors, nor which node to ask next: that is `watch`.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use d_engine_proto::v1::watch_response::Kind;
use d_engine_proto::{DetailedStatus, Revision, v1};
use futures_util::stream;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

use crate::call::{REPLY_BYTES_MAX, stream_failure};
use crate::client::Shared;
use crate::kv::KeyValue;
use crate::namespace::{Leave as _, Namespace};
use crate::retry::{Cause, Failure};
use crate::topology::Address;
use crate::watch::{WatchEvent, WatchUpdate};

const METHOD: &str = "/d_engine.v1.Watch/Watch";
/// Bytes that wait for a reader.
const MAILBOX_BYTES_MAX: usize = 4 << 20;
/// What an event is counted for besides its keys and values.
const EVENT_BYTES: usize = 128;

/// The links of a client, by the node they lead to.
#[derive(Default)]
pub(crate) struct Links(Mutex<BTreeMap<Address, Arc<Link>>>);

impl Links {
    /// A node with a link that works, none of `tried`.
    pub(crate) fn established(&self, tried: &[Address]) -> Option<Address> {
        let links = self.0.lock();
        let mut working = links.iter().filter(|(_, link)| link.state.lock().phase == Phase::Established);
        working.find(|(address, _)| !tried.contains(address)).map(|(address, _)| address.clone())
    }

    /// Begins a watch on the node at `address`. Its keys leave `space`.
    pub(crate) fn subscribe(
        &self,
        shared: &Arc<Shared>,
        address: &Address,
        create: v1::WatchCreate,
        space: &Namespace,
    ) -> Subscription {
        let mut links = self.0.lock();
        if let Some(link) = links.get(address) {
            let mut state = link.state.lock();
            if state.phase != Phase::Ended {
                return state.add(link, create, space);
            }
        }
        let link = Arc::new(Link::default());
        let subscription = link.state.lock().add(&link, create, space);
        links.insert(address.clone(), Arc::clone(&link));
        shared.tasks.spawn(run(Arc::clone(shared), address.clone(), link));
        subscription
    }

    fn forget(&self, address: &Address, link: &Arc<Link>) {
        let mut links = self.0.lock();
        if links.get(address).is_some_and(|current| Arc::ptr_eq(current, link)) {
            links.remove(address);
        }
    }
}

/// One stream of watches.
#[derive(Default)]
struct Link {
    state: Mutex<LinkState>,
    /// Wakes whoever sends the requests.
    requests: Notify,
    /// Wakes the task once no watch is left.
    idle: Notify,
}

#[derive(Default)]
struct LinkState {
    phase: Phase,
    next_id: u64,
    watches: HashMap<u64, Arc<Mailbox>>,
    /// What was not sent yet. At most one creation of each watch, and one cancellation of each that was created.
    requests: VecDeque<v1::WatchRequest>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Opening,
    Established,
    /// It takes no more watches.
    Ended,
}

impl LinkState {
    fn add(&mut self, link: &Arc<Link>, create: v1::WatchCreate, space: &Namespace) -> Subscription {
        self.next_id += 1;
        let id = self.next_id;
        let mailbox = Arc::new(Mailbox::new(space));
        self.watches.insert(id, Arc::clone(&mailbox));
        self.request(link, id, v1::watch_request::Action::Create(create));
        Subscription { link: Arc::clone(link), id, mailbox }
    }

    /// Takes a watch out that the node need not know to be over.
    fn remove(&mut self, link: &Link, id: u64) -> Option<Arc<Mailbox>> {
        let mailbox = self.watches.remove(&id);
        if self.watches.is_empty() {
            self.phase = Phase::Ended;
            link.requests.notify_one();
            link.idle.notify_one();
        }
        mailbox
    }

    /// Takes a watch out and ends it on the node.
    fn cancel(&mut self, link: &Link, id: u64) -> Option<Arc<Mailbox>> {
        let mailbox = self.remove(link, id)?;
        match self.requests.iter().position(|request| request.watch_id == id) {
            Some(unsent) => drop(self.requests.remove(unsent)),
            None => self.request(link, id, v1::watch_request::Action::Cancel(v1::WatchCancel {})),
        }
        Some(mailbox)
    }

    fn request(&mut self, link: &Link, watch_id: u64, action: v1::watch_request::Action) {
        self.requests.push_back(v1::WatchRequest { watch_id, action: Some(action) });
        link.requests.notify_one();
    }
}

impl Link {
    /// Opens the stream and hands out what comes, until it breaks.
    async fn carry(self: &Arc<Self>, shared: &Shared, address: &Address) -> Failure {
        let connection = match shared.connections.get(address).await {
            Ok(connection) => connection,
            Err(cause) => return Failure::NotSent(cause),
        };
        let status = match self.converse(connection.channel.clone()).await {
            Ok(()) => return Failure::Lost(Cause::text("the node ended the stream of watches")),
            Err(status) => status,
        };
        let failure = stream_failure(status);
        if matches!(failure, Failure::Lost(_)) {
            shared.connections.discard(address, &connection);
        }
        failure
    }

    async fn converse(self: &Arc<Self>, channel: tonic::transport::Channel) -> Result<(), tonic::Status> {
        let mut grpc = Grpc::new(channel).max_decoding_message_size(REPLY_BYTES_MAX);
        grpc.ready().await.map_err(|error| tonic::Status::unavailable(Cause::of(error).message))?;
        let requests = stream::unfold(Arc::clone(self), |link| async move { Some((link.next_request().await?, link)) });
        let codec = ProstCodec::<v1::WatchRequest, v1::WatchResponse>::default();
        let path = PathAndQuery::from_static(METHOD);
        let mut responses = grpc.streaming(tonic::Request::new(requests), path, codec).await?.into_inner();
        {
            let mut state = self.state.lock();
            if state.phase == Phase::Opening {
                state.phase = Phase::Established;
            }
        }
        while let Some(response) = responses.message().await? {
            self.deliver(response);
        }
        Ok(())
    }

    /// `None` once the link has ended: an HTTP/2 stream is over only when its sender is, too.
    async fn next_request(&self) -> Option<v1::WatchRequest> {
        loop {
            {
                let mut state = self.state.lock();
                if state.phase == Phase::Ended {
                    return None;
                }
                if let Some(request) = state.requests.pop_front() {
                    return Some(request);
                }
            }
            self.requests.notified().await;
        }
    }

    fn deliver(&self, response: v1::WatchResponse) {
        let v1::WatchResponse { watch_id, also, kind: Some(kind) } = response else { return };
        let mut state = self.state.lock();
        for id in std::iter::once(watch_id).chain(also) {
            // Answers to a watch that was given up meanwhile find none.
            let Some(mailbox) = state.watches.get(&id) else { continue };
            if let Kind::Ended(ended) = &kind {
                let detail = ended.error.clone().unwrap_or_default();
                let status = DetailedStatus { message: ended.message.clone(), detail };
                mailbox.end(Ending::Failed(Failure::Refused(Box::new(status))));
                state.remove(self, id);
            } else if let Err(ending) = mailbox.accept(&kind) {
                mailbox.end(ending);
                state.cancel(self, id);
            }
        }
    }

    /// Ends the watches that are left.
    fn end(&self, failure: &Failure) {
        let mut state = self.state.lock();
        state.phase = Phase::Ended;
        state.requests.clear();
        self.requests.notify_one();
        for (_, mailbox) in state.watches.drain() {
            mailbox.end(Ending::Failed(failure.clone()));
        }
    }
}

/// The task of a link.
async fn run(shared: Arc<Shared>, address: Address, link: Arc<Link>) {
    let failure = tokio::select! {
        failure = link.carry(&shared, &address) => failure,
        () = link.idle.notified() => Failure::Closed { sent: true },
        () = shared.closed.cancelled() => Failure::Closed { sent: true },
    };
    tracing::debug!(%address, cause = failure.message(), "a stream of watches ended");
    link.end(&failure);
    shared.links.forget(&address, &link);
}

/// One watch on a link. Dropping it ends the watch on the node.
pub(crate) struct Subscription {
    link: Arc<Link>,
    id: u64,
    mailbox: Arc<Mailbox>,
}

/// What a watch is told, in order.
#[derive(Debug)]
pub(crate) enum Delivery {
    Created(v1::WatchCreated),
    Update(WatchUpdate),
    /// Nothing comes after it.
    Ended(Ending),
}

/// Why a watch on a link is over.
#[derive(Clone, Debug)]
pub(crate) enum Ending {
    /// Its reader was too slow.
    Overrun,
    Failed(Failure),
}

impl Subscription {
    /// What comes next. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Delivery {
        loop {
            if let Some(delivery) = self.mailbox.take() {
                return delivery;
            }
            self.mailbox.news.notified().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.link.state.lock().cancel(&self.link, self.id);
    }
}

/// What waits for the reader of one watch.
struct Mailbox {
    space: Namespace,
    mail: Mutex<Mail>,
    /// Wakes the reader.
    news: Notify,
}

#[derive(Default)]
struct Mail {
    /// `None` until the watch is created.
    assembler: Option<Assembler>,
    created: Option<v1::WatchCreated>,
    /// Each with the bytes it counts for.
    updates: VecDeque<(WatchUpdate, usize)>,
    /// Invariant: the sum over `updates`.
    bytes: usize,
    ending: Option<Ending>,
}

impl Mailbox {
    fn new(space: &Namespace) -> Self {
        Self { space: space.clone(), mail: Mutex::default(), news: Notify::new() }
    }

    fn accept(&self, kind: &Kind) -> Result<(), Ending> {
        let mut mail = self.mail.lock();
        let update = match (kind, &mut mail.assembler) {
            (Kind::Created(created), None) => {
                mail.assembler = Some(Assembler::starting_at(Revision(created.from_revision)));
                mail.created = Some(*created);
                self.news.notify_one();
                return Ok(());
            }
            (Kind::Events(events), Some(assembler)) => assembler.events(events, &self.space),
            (Kind::Bookmark(bookmark), Some(assembler)) => assembler.bookmark(Revision(bookmark.revision)),
            _ => Err("answers of a watch in the wrong order"),
        };
        let update = update.map_err(|message| Ending::Failed(Failure::Lost(Cause::text(message))))?;
        let Some(update) = update else { return Ok(()) };
        match mail.updates.back_mut() {
            // Else the bookmarks of an idle watch would fill the mailbox of a reader that looks for events only.
            Some((last, _)) if update.events.is_empty() => last.revision = update.revision,
            _ => {
                let bytes = update.events.iter().map(WatchEvent::bytes).sum::<usize>() + EVENT_BYTES;
                if mail.bytes > 0 && mail.bytes + bytes > MAILBOX_BYTES_MAX {
                    return Err(Ending::Overrun);
                }
                mail.bytes += bytes;
                mail.updates.push_back((update, bytes));
            }
        }
        self.news.notify_one();
        Ok(())
    }

    fn end(&self, ending: Ending) {
        let mut mail = self.mail.lock();
        mail.assembler = None;
        mail.ending = Some(ending);
        self.news.notify_one();
    }

    fn take(&self) -> Option<Delivery> {
        let mut mail = self.mail.lock();
        if let Some(created) = mail.created.take() {
            return Some(Delivery::Created(created));
        }
        match mail.updates.pop_front() {
            Some((update, bytes)) => {
                mail.bytes -= bytes;
                Some(Delivery::Update(update))
            }
            None => mail.ending.clone().map(Delivery::Ended),
        }
    }
}

impl WatchEvent {
    /// What it takes from a mailbox.
    fn bytes(&self) -> usize {
        let size = |kv: &KeyValue| kv.key.len() + kv.value.len();
        let now = match self {
            Self::Put { kv, .. } => size(kv),
            Self::Delete { key, .. } => key.len(),
        };
        EVENT_BYTES + now + self.previous().map_or(0, size)
    }
}

/// Puts whole revisions together. Pure.
#[derive(Debug)]
struct Assembler {
    /// Everything up to it was handed out; what comes of it again is left out.
    delivered: Revision,
    /// Events of the revision after that which is still incomplete.
    partial: Vec<WatchEvent>,
}

impl Assembler {
    fn starting_at(first: Revision) -> Self {
        Self { delivered: Revision(first.get().saturating_sub(1)), partial: Vec::new() }
    }

    /// Takes an answer with events; gives the revisions that it completes.
    fn events(&mut self, answer: &v1::WatchEvents, space: &Namespace) -> Result<Option<WatchUpdate>, &'static str> {
        let mut events = std::mem::take(&mut self.partial);
        events.reserve_exact(answer.events.len());
        for event in &answer.events {
            // The answer may be for other watches, too: they share its bytes.
            let mut event = event.clone();
            event.leave(space);
            let event = WatchEvent::from_wire(event).ok_or("an event that this client cannot read")?;
            if event.revision() <= self.delivered {
                continue;
            }
            if events.last().is_some_and(|last| event.revision() < last.revision()) {
                return Err("events out of order");
            }
            events.push(event);
        }
        if answer.incomplete {
            let open = events.last().map(WatchEvent::revision);
            let begin = events.partition_point(|event| Some(event.revision()) < open);
            self.partial = events.split_off(begin);
        }
        let Some(revision) = events.last().map(WatchEvent::revision) else { return Ok(None) };
        self.delivered = revision;
        Ok(Some(WatchUpdate { revision, events }))
    }

    fn bookmark(&mut self, revision: Revision) -> Result<Option<WatchUpdate>, &'static str> {
        if !self.partial.is_empty() {
            return Err("a bookmark within a revision");
        }
        // A watch that waits for a revision in the future is beyond the bookmarks of its node.
        if revision <= self.delivered {
            return Ok(None);
        }
        self.delivered = revision;
        Ok(Some(WatchUpdate { revision, events: Vec::new() }))
    }
}

#[cfg(test)]
#[path = "watch_link_tests.rs"]
mod tests;
