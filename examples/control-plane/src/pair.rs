//! What the agents agree on: who is primary, and whether the other may follow. It owns the keys and their meaning, and
//! knows nothing of PostgreSQL.
//!
//! Reads ask the engine in this process. Writes go through the gRPC client, which finds the leader, since a node that
//! does not lead forwards nothing.

use std::sync::Arc;
use std::time::Duration;

use d_engine::client::LeaseKeeper;
use d_engine::prelude::*;
use serde::{Deserialize, Serialize};

use crate::Result;

/// A primary's agent that gives no sign of life for so long is taken for dead.
pub(crate) const TIME_TO_LIVE: Duration = Duration::from_secs(4);

const STATE: &str = "postgres/state";

/// The one key that decides. It changes by compare-and-swap only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// Counts the primaries: the fencing token of the present one.
    pub(crate) term: u64,
    /// The agent whose PostgreSQL is, or is about to be, the primary.
    pub(crate) primary: u32,
    /// The agent whose PostgreSQL has every acknowledged commit, and is waited for by each to come; only it may be
    /// promoted. `None`: the primary may acknowledge alone, and nobody may be promoted.
    pub(crate) standby: Option<u32>,
    /// Counts the changes, so that no two states are equal: a swap that was sent long ago finds another one, and fails.
    changes: u64,
}

impl State {
    /// The state of a new pair.
    pub(crate) fn first(primary: u32) -> Self {
        Self { term: 1, primary, standby: None, changes: 0 }
    }

    /// The same primary, with this standby.
    pub(crate) fn with_standby(&self, standby: Option<u32>) -> Self {
        Self { standby, changes: self.changes + 1, ..self.clone() }
    }

    /// The next primary, by itself at first.
    pub(crate) fn promoted(&self, primary: u32) -> Self {
        Self { term: self.term + 1, primary, standby: None, changes: self.changes + 1 }
    }
}

/// The agents' common knowledge.
pub(crate) struct Pair {
    engine: Arc<EmbeddedClient>,
    client: Client,
}

impl Pair {
    pub(crate) fn new(engine: Arc<EmbeddedClient>, client: Client) -> Self {
        Self { engine, client }
    }

    /// The other agent that keeps a PostgreSQL, and its address.
    pub(crate) fn peer_of(&self, agent: u32) -> Result<(u32, String)> {
        let members = self.engine.engine()?.members().members;
        let peer = members.into_iter().find(|member| member.id != agent && !member.application_address.is_empty());
        let peer = peer.ok_or("no other member keeps a PostgreSQL")?;
        Ok((peer.id, peer.application_address))
    }

    /// The state as of now; `None` before the first primary.
    pub(crate) async fn state(&self) -> Result<Option<State>> {
        let found = self.engine.get_linearizable(STATE).await?;
        Ok(found.map(|text| serde_json::from_slice(&text)).transpose()?)
    }

    /// Puts `next` in the place of `expected`; false if another state has come in between. After an error the swap may
    /// have happened or not: the state tells.
    pub(crate) async fn swap(&self, expected: Option<&State>, next: &State) -> Result<bool> {
        let expected = expected.map(serde_json::to_vec).transpose()?;
        let swapped = self.client.compare_and_swap(STATE, expected, serde_json::to_vec(next)?).await?;
        Ok(swapped.succeeded)
    }

    /// Shows from now on that the primary's agent lives, until the keeper is dropped or out of touch.
    pub(crate) async fn live(&self, term: u64) -> Result<LeaseKeeper> {
        let lease = self.client.keep_lease(TIME_TO_LIVE).await?;
        self.client.put(sign_of_life(term), "").lease(lease.id()).await?;
        Ok(lease)
    }

    /// Whether the agent of that term's primary lives.
    pub(crate) async fn is_alive(&self, term: u64) -> Result<bool> {
        Ok(self.engine.get_linearizable(sign_of_life(term)).await?.is_some())
    }
}

/// One for each term, so that an agent that has missed its end cannot speak for its successor.
fn sign_of_life(term: u64) -> String {
    format!("postgres/alive/{term}")
}
