//! Locks: one holder of a name at a time, in the order in which they asked for it.

use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::LeaseId;

use crate::client::Client;
use crate::error::Error;
use crate::fencing::FencingToken;
use crate::kv::IntoBytes;
use crate::lock_queue::{Claim, Queue, within};

/// Time to live of the lease of a lock or a leadership, unless another is given.
pub(crate) const CLAIM_TTL: Duration = Duration::from_secs(10);

/// A lock to be acquired.
#[derive(Clone, Debug)]
#[must_use = "nothing is locked until `acquire` or `try_acquire`"]
pub struct Lock {
    client: Client,
    queue: Queue,
    ttl: Duration,
    timeout: Option<Duration>,
    value: Bytes,
}

impl Lock {
    /// How long after its last sign of life a holder loses the lock; 10 seconds unless set. Shorter: others wait less
    /// for one that died; longer: a holder outlasts longer interruptions.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// Budget of acquiring; unlimited unless set.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// What the holder's key says, for people who look at it: who it is, perhaps.
    pub fn value(mut self, value: impl IntoBytes) -> Self {
        self.value = value.into_bytes();
        self
    }

    /// Waits until everybody who asked before has had the lock, and takes it.
    ///
    /// Dropping the future gives the place in the queue up.
    ///
    /// # Errors
    /// `LeaseNotFound` if contact was lost for so long that the place in the queue is gone, `DeadlineExceeded` if the
    /// timeout passed, and what [`Client::put`] fails with. The lock is not held then, and the place given up.
    pub async fn acquire(self) -> Result<LockGuard, Error> {
        within("acquire", self.timeout, async {
            let claim = self.claim().await?;
            let token = claim.first().await?;
            Ok(LockGuard { claim, token })
        })
        .await
    }

    /// Takes the lock if nobody has it; `None` if somebody has.
    ///
    /// Dropping the future gives the lock up if it was taken.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub async fn try_acquire(self) -> Result<Option<LockGuard>, Error> {
        within("acquire", self.timeout, async {
            let claim = self.claim().await?;
            match claim.first_at_once().await? {
                Some(token) => Ok(Some(LockGuard { claim, token })),
                None => claim.give_up().await.map(|()| None),
            }
        })
        .await
    }

    async fn claim(&self) -> Result<Claim, Error> {
        Claim::join(&self.client, &self.queue, &self.value, self.ttl).await
    }
}

/// A lock that is held.
///
/// It is held until it is released, or until the holder is out of contact for the lock's time to live. Look at
/// [`is_held`](Self::is_held) before each step that needs it, stop at [`lost`](Self::lost), and send the
/// [`token`](Self::token) along with whatever the lock guards: only the token protects against a holder that is stopped
/// right after it looked.
///
/// Dropping it releases the lock in the background, as well as that goes: if the runtime ends first or nobody can be
/// reached, the lock is free once its time to live has passed. A lock counts as a clone of its client.
#[derive(Debug)]
#[must_use = "dropping it releases the lock"]
pub struct LockGuard {
    claim: Claim,
    token: FencingToken,
}

impl LockGuard {
    /// Greater than that of every earlier holder.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// Whether the lock is certain to be held at this moment, by a look at the clock; unless somebody deleted its key or
    /// revoked its lease by hand, which only [`lost`](Self::lost) tells at once.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.claim.is_alive()
    }

    /// For how long it is held at least, if contact is lost now.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.claim.remaining()
    }

    /// The lease of the lock. Keys attached to it go when the lock does.
    #[must_use]
    pub fn lease(&self) -> LeaseId {
        self.claim.lease()
    }

    /// Ends when the lock is lost. Dropping the future changes nothing.
    pub async fn lost(&self) {
        self.claim.lost(self.token).await;
    }

    /// Frees the lock for the next one. Dropping the future does so in the background.
    ///
    /// # Errors
    /// `LeaseNotFound` if it was lost before; else as [`Client::put`], and it is tried again in the background.
    pub async fn release(self) -> Result<(), Error> {
        self.claim.give_up().await
    }
}

impl Client {
    /// A lock: of all who acquire the same name, one at a time holds it. What it keeps in the store lies below
    /// `<name>/`.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// # async fn write_to_the_shared_disk(_: d_engine_client::FencingToken) {}
    /// let guard = client.lock("locks/disk-7").acquire().await?;
    /// tokio::select! {
    ///     () = write_to_the_shared_disk(guard.token()) => guard.release().await?,
    ///     () = guard.lost() => println!("somebody else may hold it now"),
    /// }
    /// # Ok(()) }) }
    /// ```
    pub fn lock(&self, name: impl IntoBytes) -> Lock {
        let queue = Queue::of(&name.into_bytes());
        Lock { client: self.clone(), queue, ttl: CLAIM_TTL, timeout: None, value: Bytes::new() }
    }
}
