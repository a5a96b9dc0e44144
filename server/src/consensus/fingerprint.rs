//! What members tell each other of their states: a hash after a log entry, and that one of them is wrong. What is
//! hashed, and who is right, is decided elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

use d_engine_proto::{LogIndex, NodeId};
use futures_util::future::join_all;
use tokio::sync::watch;

use super::handle::Consensus;

/// The hash of a node's state after a log entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateHash {
    /// The entry.
    pub index: LogIndex,
    /// How it was computed; hashes of two kinds say nothing about each other.
    pub kind: u32,
    /// The hash.
    pub hash: u64,
}

/// The last hash of this node, and what it is accused of.
#[derive(Debug, Default)]
pub(super) struct Fingerprints {
    own: watch::Sender<Option<StateHash>>,
    /// What the hash should be.
    accused: watch::Sender<Option<StateHash>>,
}

impl Fingerprints {
    /// The hash after this entry, once there is one; `None` if there never will be, or not within `patience`.
    pub(super) async fn after(&self, index: LogIndex, patience: Duration) -> Option<StateHash> {
        let mut own = self.own.subscribe();
        let reached = own.wait_for(|own| own.is_some_and(|own| own.index >= index));
        let own = *tokio::time::timeout(patience, reached).await.ok()?.ok()?;
        own.filter(|own| own.index == index)
    }

    /// Whether the state was not what it should have been; then whoever [listens](Consensus::accused) is told.
    pub(super) fn accuse(&self, right: StateHash) -> bool {
        let own = *self.own.borrow();
        let is_wrong =
            own.is_some_and(|own| (own.index, own.kind) == (right.index, right.kind) && own.hash != right.hash);
        if is_wrong {
            self.accused.send_replace(Some(right));
        }
        is_wrong
    }
}

impl Consensus {
    /// Tells the hash of the state after an entry to whoever asks.
    pub fn publish_state_hash(&self, hash: StateHash) {
        self.fingerprints().own.send_replace(Some(hash));
    }

    /// The hash last published.
    #[must_use]
    pub fn state_hash(&self) -> Option<StateHash> {
        *self.fingerprints().own.borrow()
    }

    /// The hashes of all members after this entry, this node included; `None` where there is none in time.
    pub async fn state_hashes(&self, index: LogIndex, patience: Duration) -> BTreeMap<NodeId, Option<StateHash>> {
        let (membership, node) = (self.membership(), self.node_id());
        let asked = membership.members.iter().map(async |(id, (member, _))| {
            if *id == node {
                return (*id, self.fingerprints().after(index, patience).await);
            }
            let hash = self.peers().state_hash(id.get(), member, index, patience).await;
            (*id, hash.inspect_err(|error| tracing::debug!(peer = id.get(), %error, "no hash")).ok().flatten())
        });
        join_all(asked).await.into_iter().collect()
    }

    /// Tells a member, which may be this node, that its state is not the cluster's.
    pub async fn tell_diverged(&self, id: NodeId, right: StateHash) {
        if id == self.node_id() {
            self.fingerprints().accuse(right);
        } else if let Some(member) = self.membership().get(id)
            && let Err(error) = self.peers().diverged(id.get(), member, right).await
        {
            tracing::warn!(peer = id.get(), %error, "a member whose state differs cannot be told");
        }
    }

    /// Follows what the hash of this node's state should have been; `None` while nothing is wrong with it.
    #[must_use]
    pub fn accused(&self) -> watch::Receiver<Option<StateHash>> {
        self.fingerprints().accused.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_hash_of_the_same_moment_and_kind_is_compared() {
        let fingerprints = Fingerprints::default();
        let own = StateHash { index: LogIndex(5), kind: 1, hash: 7 };
        let patience = Duration::from_secs(60);
        assert!(!fingerprints.accuse(StateHash { hash: 8, ..own }), "nothing is known yet");
        fingerprints.own.send_replace(Some(own));
        assert_eq!(fingerprints.after(LogIndex(5), patience).await, Some(own));
        assert_eq!(fingerprints.after(LogIndex(4), patience).await, None, "gone by");
        for other in [own, StateHash { index: LogIndex(4), hash: 8, ..own }, StateHash { kind: 2, hash: 8, ..own }] {
            assert!(!fingerprints.accuse(other), "{other:?}");
        }
        assert!(fingerprints.accused.borrow().is_none());
        assert!(fingerprints.accuse(StateHash { hash: 8, ..own }));
        assert!(fingerprints.accused.borrow().is_some());
    }
}
