//! Reads for callers in the same process: keys and values as they are, without a message in between.
//!
//! What may be answered at once is, in the caller's own task: a lease read costs a look at the clock and one at memory,
//! an eventual read only the latter.

use bytes::Bytes;
use d_engine_proto::{Revision, v1};

use super::expiry::is_due;
use super::{Deadline, Engine, EngineError};
use crate::state_machine::StoreTime;
use crate::state_machine::kv::{self, Store};

impl Engine {
    /// The value of a key, if the policy allows to answer this very moment; `None`: it has to be waited for, by
    /// [`value`](Self::value).
    pub(crate) fn value_now(
        &self,
        key: &[u8],
        consistency: v1::Consistency,
    ) -> Result<Option<Option<Bytes>>, EngineError> {
        kv::validate_key(key, "key")?;
        let settled = match self.policy(consistency)? {
            v1::Consistency::Eventual => None,
            v1::Consistency::Lease => match self.consensus().read_by_lease() {
                Some(now) => Some(now),
                None => return Ok(None),
            },
            _ => return Ok(None),
        };
        Ok(self.look(settled, |store| store.value(key)))
    }

    /// The value of a key.
    pub(crate) async fn value(
        &self,
        key: &[u8],
        consistency: v1::Consistency,
        deadline: Deadline,
    ) -> Result<Option<Bytes>, EngineError> {
        kv::validate_key(key, "key")?;
        self.read_store(consistency, deadline, |store| store.value(key)).await
    }

    /// Every key from `start` to, but without, `end` (empty: to the last) with its value, and the one revision that they
    /// are of.
    pub(crate) async fn pairs(
        &self,
        start: Bytes,
        end: Bytes,
        consistency: v1::Consistency,
        deadline: Deadline,
    ) -> Result<(Revision, Vec<(Bytes, Bytes)>), EngineError> {
        let read = |store: &Store| (store.revision(), store.pairs(start.clone(), end.clone()));
        self.read_store(consistency, deadline, read).await
    }

    async fn read_store<T>(
        &self,
        consistency: v1::Consistency,
        deadline: Deadline,
        read: impl Fn(&Store) -> T,
    ) -> Result<T, EngineError> {
        let settled = self.earn(self.policy(consistency)?, deadline).await?;
        loop {
            if let Some(found) = self.look(settled, &read) {
                return Ok(found);
            }
            if let Some(now) = settled {
                self.settle(now, deadline).await?;
            }
        }
    }

    /// Reads from memory, unless something is due there that may not be shown any more.
    fn look<T>(&self, settled: Option<StoreTime>, read: impl FnOnce(&Store) -> T) -> Option<T> {
        self.inner.kv.look(|store| match settled {
            Some(now) if is_due(store.due(), now) => None,
            _ => Some(read(store)),
        })
    }
}
