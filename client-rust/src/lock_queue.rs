//! The queue behind locks and elections: whoever is first in it holds the name.
//!
//! Each claimant has one key under the name, attached to a lease of its own. The revision that created the key is its
//! place, and once it is first, its fencing token:
//!
//! ```text
//!   name/00000000000000b4   created at  7   holds the name, with token 1.7
//!   name/00000000000000a1   created at  9   waits for the key of b4 to go
//!   name/00000000000000c2   created at 12   waits for the key of a1 to go
//! ```
//!
//! Revisions grow, so nobody ever comes in before a place that is taken: who was once seen to be first stays so until
//! its key goes, and the key goes with its lease at the latest. Each waits for the one before it only, so that an end
//! wakes one claimant and not all of them.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use d_engine_proto::{LeaseId, Revision};
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::error::{Error, ErrorKind, Outcome};
use crate::fencing::FencingToken;
use crate::keeper::LeaseKeeper;
use crate::kv::{KeyRange, KeyValue};
use crate::retry::backoff;
use crate::watch::WatchEvent;

/// Digits of a lease in a key.
const LEASE_DIGITS: usize = 16;

/// The keys of the claimants of a name.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    prefix: Bytes,
}

impl Queue {
    pub(crate) fn of(name: &Bytes) -> Self {
        let mut prefix = BytesMut::with_capacity(name.len() + 1);
        prefix.extend_from_slice(name);
        prefix.extend_from_slice(b"/");
        Self { prefix: prefix.freeze() }
    }

    pub(crate) fn range(&self) -> KeyRange {
        KeyRange::prefix(&self.prefix)
    }

    fn key(&self, lease: LeaseId) -> Bytes {
        let mut key = BytesMut::with_capacity(self.prefix.len() + LEASE_DIGITS);
        key.extend_from_slice(&self.prefix);
        key.extend_from_slice(format!("{:0width$x}", lease.get(), width = LEASE_DIGITS).as_bytes());
        key.freeze()
    }

    /// Whether the key is a claimant's. Others may lie below the name, such as those of a name that continues it.
    fn is_place(&self, key: &[u8]) -> bool {
        let lease = key.strip_prefix(&self.prefix[..]).unwrap_or_default();
        lease.len() == LEASE_DIGITS && lease.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    }

    /// The claimant that holds the name.
    pub(crate) fn first<'a>(&self, kvs: impl IntoIterator<Item = &'a KeyValue>) -> Option<&'a KeyValue> {
        kvs.into_iter().filter(|kv| self.is_place(&kv.key)).min_by_key(|kv| kv.create_revision)
    }
}

/// A place in a queue. Dropping it gives it up, in the background.
#[derive(Debug)]
pub(crate) struct Claim {
    client: Client,
    queue: Queue,
    keeper: LeaseKeeper,
    /// What cancels the waiting. Once it is over, nothing does: `client` is one whose calls are not cancelled.
    cancel: Option<CancellationToken>,
    /// When it joined.
    joined: Revision,
    given_up: bool,
}

/// The queue as one claimant sees it.
struct Look {
    /// The claimant's own place.
    token: FencingToken,
    /// The key of the claimant before it.
    before: Option<Bytes>,
    /// The revision of all this.
    revision: Revision,
}

impl Claim {
    /// Joins a queue. Dropping the future leaves it.
    pub(crate) async fn join(client: &Client, queue: &Queue, value: &Bytes, ttl: Duration) -> Result<Self, Error> {
        let keeper = client.keep_lease(ttl).await?;
        // From here on the lease is revoked, and the key with it, wherever this ends without success.
        let mut claim = Self {
            client: client.uncancelled(),
            queue: queue.clone(),
            keeper,
            cancel: client.cancel().cloned(),
            joined: Revision(0),
            given_up: false,
        };
        claim.joined = client.put(claim.key(), value).lease(claim.lease()).await?.header.revision;
        Ok(claim)
    }

    /// Waits until nobody is before this claimant.
    pub(crate) async fn first(&self) -> Result<FencingToken, Error> {
        self.while_alive(async {
            let mut retries = 0;
            let mut seen = self.joined;
            loop {
                match self.wait_once(seen).await {
                    Ok(Look { before: None, token, .. }) => return Ok(token),
                    Ok(look) => (seen, retries) = (look.revision, 0),
                    // The lease bounds how long that is tried.
                    Err(error) if error.kind().may_pass() => self.pause(&mut retries).await,
                    Err(error) => return Err(error),
                }
            }
        })
        .await
    }

    /// Looks whether somebody is before this claimant.
    pub(crate) async fn first_at_once(&self) -> Result<Option<FencingToken>, Error> {
        let look = self.while_alive(self.look(self.joined)).await?;
        Ok(look.before.is_none().then_some(look.token))
    }

    /// The lease is counted from when its renewal was sent: alive after a look at the queue, it was alive at the look.
    async fn while_alive<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let cancelled = async {
            match &self.cancel {
                Some(cancel) => cancel.cancelled().await,
                None => std::future::pending().await,
            }
        };
        let result = tokio::select! {
            result = work => result?,
            () = self.keeper.lost() => return Err(lease_ended()),
            () = cancelled => return Err(Error::cancelled("claim")),
        };
        if self.is_alive() { Ok(result) } else { Err(lease_ended()) }
    }

    /// Looks at the queue, and waits for the end of whoever is before.
    async fn wait_once(&self, seen: Revision) -> Result<Look, Error> {
        let look = self.look(seen).await?;
        if let Some(before) = &look.before {
            self.deletion(before, look.revision).await?;
        }
        Ok(look)
    }

    /// Reads the queue at `seen` or later. Any node may answer: the own key is in it unless it is gone for good.
    async fn look(&self, seen: Revision) -> Result<Look, Error> {
        let mut pages = self.client.range(self.queue.range()).keys_only().min_revision(seen).pages();
        let (mut header, mut places) = (None, Vec::new());
        while let Some(page) = pages.next().await? {
            header = Some(page.header);
            places.extend(page.kvs.into_iter().filter(|kv| self.queue.is_place(&kv.key)));
        }
        let key = self.key();
        let own = places.iter().find(|place| place.key == key);
        let (Some(own), Some(header)) = (own, header) else { return Err(lease_ended()) };
        let earlier = places.iter().filter(|place| place.create_revision < own.create_revision);
        let before = earlier.max_by_key(|place| place.create_revision).map(|place| place.key.clone());
        let token = FencingToken { epoch: header.epoch, revision: own.create_revision };
        Ok(Look { token, before, revision: header.revision })
    }

    /// Waits until the key was deleted after `seen`.
    async fn deletion(&self, key: &Bytes, seen: Revision) -> Result<(), Error> {
        let mut watch = self.client.watch(key).from(seen.next()).deletes_only().keys_only().await?;
        while let Some(update) = watch.next().await {
            if update?.events.iter().any(|event| matches!(event, WatchEvent::Delete { .. })) {
                return Ok(());
            }
        }
        // A stream ends with an error only.
        Err(lease_ended())
    }

    /// Ends when the lease is lost, or the key is deleted by somebody else.
    pub(crate) async fn lost(&self, token: FencingToken) {
        tokio::select! {
            () = self.keeper.lost() => {}
            () = self.deleted(token) => {}
        }
    }

    async fn deleted(&self, token: FencingToken) {
        let mut retries = 0;
        let mut seen = token.revision;
        let key = self.key();
        loop {
            match self.deletion(&key, seen).await {
                Ok(()) => return,
                Err(error) if error.kind() == ErrorKind::Compacted => match self.look(seen).await {
                    Ok(look) => seen = look.revision,
                    Err(error) if error.kind() == ErrorKind::LeaseNotFound => return,
                    Err(_) => self.pause(&mut retries).await,
                },
                Err(error) if error.kind().may_pass() => self.pause(&mut retries).await,
                // What cannot be watched is left to the lease.
                Err(_) => std::future::pending().await,
            }
        }
    }

    async fn pause(&self, retries: &mut u32) {
        let pause = backoff(*retries, &mut self.client.shared().state.lock().rng);
        *retries = retries.saturating_add(1);
        tokio::time::sleep(pause).await;
    }

    /// Leaves the queue.
    pub(crate) async fn give_up(mut self) -> Result<(), Error> {
        self.keeper.revoke().await?;
        self.given_up = true;
        Ok(())
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn key(&self) -> Bytes {
        self.queue.key(self.lease())
    }

    pub(crate) fn lease(&self) -> LeaseId {
        self.keeper.id()
    }

    /// By a look at the clock.
    pub(crate) fn is_alive(&self) -> bool {
        self.keeper.is_alive()
    }

    /// By a look at the clock.
    pub(crate) fn remaining(&self) -> Duration {
        self.keeper.remaining()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.given_up {
            let revocation = self.client.revoke_lease(self.lease());
            let tasks = &self.client.shared().tasks;
            tasks.spawn(async move {
                if let Err(error) = revocation.await {
                    tracing::debug!(%error, "a lease was left to end by itself");
                }
            });
        }
    }
}

/// Limits how long a claim is tried, if it is limited.
pub(crate) async fn within<T>(
    operation: &'static str,
    timeout: Option<Duration>,
    claim: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let Some(timeout) = timeout else { return claim.await };
    match tokio::time::timeout(timeout, claim).await {
        Ok(result) => result,
        Err(_) => {
            let message = format!("somebody else held it for {timeout:?}, or no node answered");
            Err(Error::new(operation, ErrorKind::DeadlineExceeded, Outcome::NotApplied, message))
        }
    }
}

/// The error of a claimant whose lease ended.
pub(crate) fn lease_ended() -> Error {
    Error::new("claim", ErrorKind::LeaseNotFound, Outcome::NotApplied, "the lease of the claim has ended")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv(key: &Bytes, create_revision: u64) -> KeyValue {
        KeyValue {
            key: key.clone(),
            value: Bytes::new(),
            create_revision: Revision(create_revision),
            mod_revision: Revision(create_revision + 50),
            version: 1,
            lease: None,
        }
    }

    #[test]
    fn the_first_is_who_came_first_and_not_who_sorts_first_or_lies_below_by_chance() {
        let queue = Queue::of(&Bytes::from_static(b"locks/a"));
        let (early, late) = (queue.key(LeaseId(u64::MAX)), queue.key(LeaseId(3)));
        assert_eq!(late, "locks/a/0000000000000003");
        let longer_name = Queue::of(&Bytes::from_static(b"locks/a/b")).key(LeaseId(9));
        let foreign =
            [longer_name, Bytes::from_static(b"locks/a/owner"), Bytes::from_static(b"locks/a/000000000000000G")];
        let mut kvs: Vec<_> = foreign.iter().map(|key| kv(key, 1)).collect();
        assert_eq!(queue.first(&kvs), None);
        kvs.extend([kv(&late, 9), kv(&early, 7)]);
        assert_eq!(queue.first(&kvs).map(|first| &first.key), Some(&early));
    }
}
