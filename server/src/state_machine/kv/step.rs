//! One command being applied: all it changes gets one revision, and nothing stays of one that is refused.

use std::sync::Arc;

use d_engine_proto::{LeaseId, Revision, v1};

use super::command::{Attachment, CompareAndSwap, Interval, RangeQuery, Txn, Write};
use super::error::KvError;
use super::read::{self, Source, Written};
use super::room::Room;
use super::store::Store;
use crate::state_machine::StoreTime;
use crate::storage::versions::{Change, KeyVersion};

/// What one revision does to the store. Keys and leases always change together: a key is attached to a lease exactly if
/// its version says so.
pub(super) struct Step<'a> {
    pub(super) store: &'a mut Store,
    pub(super) revision: Revision,
    pub(super) changes: &'a mut Vec<Change>,
}

impl Step<'_> {
    /// Writes a key and returns the lease that it is attached to now. On an error nothing changed.
    fn put(&mut self, key: &[u8], value: &[u8], attachment: Attachment) -> Result<LeaseId, KvError> {
        if let Attachment::Lease(lease) = attachment {
            self.store.leases.check_attachable(lease)?;
        }
        let before = self.store.keys.get(key).cloned();
        let (create_revision, version) = match &before {
            Some(held) => (held.create_revision, held.version + 1),
            None => (self.revision, 1),
        };
        if let Some(held) = &before {
            self.detach(held);
        }
        let lease = match attachment {
            Attachment::None => LeaseId(0),
            Attachment::Lease(lease) => lease,
            Attachment::OwnLease { ttl_ms } => self.open_lease(ttl_ms, true),
        };
        let (key, value) = KeyVersion::own(key, value);
        let mod_revision = self.revision;
        let version = Arc::new(KeyVersion { key, value, create_revision, mod_revision, version, lease });
        if lease != LeaseId(0) {
            self.store.leases.attach(lease, version.key.clone());
        }
        let (key, after) = (version.key.clone(), Some(Arc::clone(&version)));
        self.changes.push(Change { key, revision: self.revision, after, before });
        self.store.keys.insert(version);
        Ok(lease)
    }

    /// Returns whether the key existed.
    fn delete(&mut self, key: &[u8]) -> bool {
        let Some(held) = self.store.keys.remove(key) else { return false };
        self.detach(&held);
        self.changes.push(Change { key: held.key.clone(), revision: self.revision, after: None, before: Some(held) });
        true
    }

    fn delete_range(&mut self, interval: &Interval) -> u64 {
        let held: Vec<_> = self.store.keys.interval(interval).cloned().collect();
        for version in &held {
            self.delete(&version.key);
        }
        held.len() as u64
    }

    fn detach(&mut self, held: &KeyVersion) {
        if held.lease != LeaseId(0) {
            self.store.leases.detach(held.lease, held.key.clone());
        }
    }

    /// What a key holds, as part of the answer.
    fn held(&self, key: &[u8], room: &mut Room) -> Result<Option<v1::KeyValue>, KvError> {
        self.store.keys.get(key).map(|held| room.key_value(held)).transpose()
    }

    pub(super) fn compare_and_swap(
        &mut self,
        swap: &CompareAndSwap,
        room: &mut Room,
    ) -> Result<v1::CompareAndSwapResponse, KvError> {
        let held = self.store.keys.get(&swap.key);
        let succeeded = held.map(|held| &held.value) == swap.expected.as_ref();
        let current = if succeeded { None } else { self.held(&swap.key, room)? };
        if succeeded {
            self.put(&swap.key, &swap.value, swap.attachment)?;
        }
        Ok(v1::CompareAndSwapResponse { header: None, succeeded, current })
    }

    pub(super) fn txn(&mut self, txn: Txn, room: &mut Room) -> Result<v1::TxnResponse, KvError> {
        let changed_before = self.changes.len();
        let store_before = txn.may_fail_halfway().then(|| self.store.clone());
        let result = read::run(self, txn, room);
        if let (Err(_), Some(store)) = (&result, store_before) {
            *self.store = store;
            self.changes.truncate(changed_before);
        }
        self.keep_last_changes(changed_before);
        result
    }

    /// Reduces the changes of a transaction to the last one of each key. A key that was put and deleted again leaves a
    /// deletion: its revision has been seen by the transaction, so it is used up. In the order of keys.
    fn keep_last_changes(&mut self, since: usize) {
        let mut changes = self.changes.split_off(since);
        changes.sort_by(|a, b| a.key.cmp(&b.key));
        changes.dedup_by(|later, first| {
            let same = later.key == first.key;
            if same {
                first.after = later.after.take();
            }
            same
        });
        self.changes.append(&mut changes);
    }

    pub(super) fn grant_lease(&mut self, ttl_ms: u64, chosen: Option<LeaseId>) -> Result<LeaseId, KvError> {
        let Some(lease) = chosen else { return Ok(self.open_lease(ttl_ms, false)) };
        if self.store.leases.contains(lease) {
            return Err(KvError::LeaseExists { lease });
        }
        let state = &mut self.store.state;
        state.last_lease = state.last_lease.max(lease);
        self.store.leases.open(lease, ttl_ms, StoreTime(state.store_time), false);
        Ok(lease)
    }

    fn open_lease(&mut self, ttl_ms: u64, of_one_key: bool) -> LeaseId {
        let state = &mut self.store.state;
        state.last_lease = LeaseId(state.last_lease.get() + 1);
        self.store.leases.open(state.last_lease, ttl_ms, StoreTime(state.store_time), of_one_key);
        state.last_lease
    }

    /// Ends a lease and deletes its keys; returns how many.
    pub(super) fn end_lease(&mut self, lease: LeaseId) -> Result<u64, KvError> {
        let keys = self.store.leases.close(lease).ok_or(KvError::LeaseNotFound { lease })?;
        for key in &keys {
            let before = self.store.keys.remove(key);
            self.changes.push(Change { key: key.clone(), revision: self.revision, after: None, before });
        }
        Ok(keys.len() as u64)
    }
}

impl Source for Step<'_> {
    type Error = KvError;

    fn get(&self, key: &[u8]) -> Result<Option<KeyVersion>, KvError> {
        Source::get(&&self.store.keys, key)
    }

    fn range(&self, query: &RangeQuery, room: &mut Room) -> Result<v1::RangeResponse, KvError> {
        Source::range(&&self.store.keys, query, room)
    }

    fn write(&mut self, write: Write, room: &mut Room) -> Result<Written, KvError> {
        Ok(match write {
            Write::Put { key, value, attachment, return_previous } => {
                let previous = if return_previous { self.held(&key, room)? } else { None };
                let lease = self.put(&key, &value, attachment)?.get();
                Written::Put(v1::PutResponse { header: None, previous, lease })
            }
            Write::Delete { key, return_previous } => {
                let previous = if return_previous { self.held(&key, room)? } else { None };
                let deleted = self.delete(&key);
                Written::Delete(v1::DeleteResponse { header: None, deleted, previous })
            }
            Write::DeleteRange { interval, return_previous } => {
                let mut previous = Vec::new();
                if return_previous {
                    for held in self.store.keys.interval(&interval) {
                        previous.push(room.key_value(held)?);
                    }
                }
                let deleted = self.delete_range(&interval);
                Written::DeleteRange(v1::DeleteRangeResponse { header: None, deleted, previous })
            }
        })
    }
}
