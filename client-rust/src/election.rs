//! Elections: a lock whose holder says something, and everybody can hear it.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::{Epoch, LeaseId};
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};

use crate::cache::{Cache, CacheStatus};
use crate::client::Client;
use crate::error::Error;
use crate::fencing::FencingToken;
use crate::kv::{IntoBytes, KeyValue};
use crate::lock::CLAIM_TTL;
use crate::lock_queue::{Claim, Queue, lease_ended, within};
use crate::txn::{Compare, Op, Relation, Txn};

/// An election among all who campaign for one name. What it keeps in the store lies below `<name>/`.
#[derive(Clone, Debug)]
pub struct Election {
    client: Client,
    queue: Queue,
    ttl: Duration,
    timeout: Option<Duration>,
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElectionLeader {
    /// What the leader said last.
    pub value: Bytes,
    /// Greater than that of every earlier leader.
    pub token: FencingToken,
}

impl ElectionLeader {
    fn of(kv: &KeyValue, epoch: Epoch) -> Self {
        Self { value: kv.value.clone(), token: FencingToken { epoch, revision: kv.create_revision } }
    }
}

impl Election {
    /// How long after its last sign of life a leader is deposed; 10 seconds unless set.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// Budget of a campaign; unlimited unless set.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Waits until everybody who campaigned before is gone, and leads. Observers hear `value` then.
    ///
    /// Dropping the future withdraws the candidate.
    ///
    /// # Errors
    /// As [`Lock::acquire`](crate::Lock::acquire).
    pub async fn campaign(&self, value: impl IntoBytes) -> Result<Leadership, Error> {
        let value = value.into_bytes();
        within("campaign", self.timeout, async {
            let claim = Claim::join(&self.client, &self.queue, &value, self.ttl).await?;
            let token = claim.first().await?;
            Ok(Leadership { claim, token })
        })
        .await
    }

    /// Who leads now; `None`: nobody. Read as the client reads by default.
    ///
    /// # Errors
    /// As [`Client::range`].
    pub async fn leader(&self) -> Result<Option<ElectionLeader>, Error> {
        let mut pages = self.client.range(self.queue.range()).pages();
        let mut first: Option<(KeyValue, Epoch)> = None;
        while let Some(page) = pages.next().await? {
            let so_far = first.iter().map(|(kv, _)| kv);
            let found = self.queue.first(so_far.chain(&page.kvs)).cloned();
            first = found.map(|kv| (kv, page.header.epoch));
        }
        Ok(first.map(|(kv, epoch)| ElectionLeader::of(&kv, epoch)))
    }

    /// Follows who leads: the current leader first, then whenever there is another one, none, or the leader says something
    /// else. A slow reader misses what passed, never what is.
    ///
    /// # Errors
    /// As [`Client::cache`].
    pub async fn observe(&self) -> Result<ElectionObserver, Error> {
        let cache = self.client.cache(self.queue.range()).await?;
        let status = cache.watch_status();
        let following = Following { client: self.client.clone(), queue: self.queue.clone(), cache, status, told: None };
        Ok(ElectionObserver(following.leaders()))
    }
}

/// Leadership that was won.
///
/// It lasts until it is resigned, or until the leader is out of contact for the election's time to live. Look at
/// [`is_leader`](Self::is_leader) before each step that only the leader may take, stop at [`lost`](Self::lost), and send
/// the [`token`](Self::token) along to whatever must not obey a deposed leader.
///
/// Dropping it resigns in the background, as well as that goes; see [`LockGuard`](crate::LockGuard).
#[derive(Debug)]
#[must_use = "dropping it resigns"]
pub struct Leadership {
    claim: Claim,
    token: FencingToken,
}

impl Leadership {
    /// Greater than that of every earlier leader.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// Whether the leadership is certain at this moment, by a look at the clock; unless somebody deleted its key or revoked
    /// its lease by hand, which only [`lost`](Self::lost) tells at once.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.claim.is_alive()
    }

    /// For how long it lasts at least, if contact is lost now.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.claim.remaining()
    }

    /// The lease of the leadership. Keys attached to it go when the leadership does.
    #[must_use]
    pub fn lease(&self) -> LeaseId {
        self.claim.lease()
    }

    /// Says something else to the observers. A deposed leader cannot.
    ///
    /// # Errors
    /// `LeaseNotFound` if the leadership was lost; else as [`Client::put`].
    pub async fn proclaim(&self, value: impl IntoBytes) -> Result<(), Error> {
        let key = self.claim.key();
        let still_leader = Compare::create_revision(&key, Relation::Equal, self.token.revision);
        let proclamation = Op::put(&key, value).lease(self.lease());
        let answer = self.claim.client().txn(Txn::new().when(still_leader).then(proclamation)).await?;
        if answer.succeeded { Ok(()) } else { Err(lease_ended()) }
    }

    /// Ends when the leadership is lost. Dropping the future changes nothing.
    pub async fn lost(&self) {
        self.claim.lost(self.token).await;
    }

    /// Leaves the lead to the next candidate. Dropping the future does so in the background.
    ///
    /// # Errors
    /// `LeaseNotFound` if it was lost before; else as [`Client::put`], and it is tried again in the background.
    pub async fn resign(self) -> Result<(), Error> {
        self.claim.give_up().await
    }
}

/// Who leads, time after time. It ends, after an error, with what ends a [`Cache`].
#[must_use = "an observer does nothing unless it is read"]
pub struct ElectionObserver(BoxStream<'static, Result<Option<ElectionLeader>, Error>>);

impl ElectionObserver {
    /// The leader, once that is another one than was told before; `None` within: nobody leads.
    ///
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    /// The one that ends the observer.
    pub async fn next(&mut self) -> Option<Result<Option<ElectionLeader>, Error>> {
        self.0.next().await
    }
}

impl Stream for ElectionObserver {
    type Item = Result<Option<ElectionLeader>, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx)
    }
}

impl fmt::Debug for ElectionObserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ElectionObserver").finish_non_exhaustive()
    }
}

struct Following {
    client: Client,
    queue: Queue,
    cache: Cache,
    status: CacheStatus,
    /// `None`: nothing was told yet.
    told: Option<Option<ElectionLeader>>,
}

impl Following {
    fn leaders(self) -> BoxStream<'static, Result<Option<ElectionLeader>, Error>> {
        stream::unfold(Some(self), |following| async move {
            let mut following = following?;
            loop {
                let leader = following.leader();
                if following.told.as_ref() != Some(&leader) {
                    following.told = Some(leader.clone());
                    return Some((Ok(leader), Some(following)));
                }
                // What changes after the look is noticed by the next round.
                if let Err(error) = following.status.changed().await {
                    return Some((Err(error), None));
                }
            }
        })
        .boxed()
    }

    fn leader(&self) -> Option<ElectionLeader> {
        // A client talks to one epoch only, and it has had answers.
        let epoch = self.client.shared().state.lock().topology.epoch();
        self.queue.first(self.cache.view().iter()).map(|kv| ElectionLeader::of(kv, epoch))
    }
}

impl Client {
    /// An election. Candidates lead one at a time, in the order in which they campaigned.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// let election = client.election("elections/scheduler");
    /// let mut leaders = election.observe().await?;
    /// let leadership = election.campaign("10.0.0.1:8080").await?;
    /// println!("leading with token {}", leadership.token());
    /// while let Some(leader) = leaders.next().await {
    ///     if leader?.map(|leader| leader.token) == Some(leadership.token()) {
    ///         break;
    ///     }
    /// }
    /// # Ok(()) }) }
    /// ```
    #[must_use]
    pub fn election(&self, name: impl IntoBytes) -> Election {
        Election { client: self.clone(), queue: Queue::of(&name.into_bytes()), ttl: CLAIM_TTL, timeout: None }
    }
}
