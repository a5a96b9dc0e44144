//! Leases: which there are, until when, and the keys attached to them. What happens to the keys of one that ends is the
//! business of [`Step`](super::step::Step).

use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::{LeaseId, v1};
use imbl::{OrdMap, OrdSet};
use prost::Message;

use super::error::KvError;
use super::invariants::Violation;
use crate::state_machine::StoreTime;
use crate::storage::versions::{Record, RecordKey, RecordValue};

/// All leases. As [`Keys`](super::keys::Keys): a copy costs nothing.
#[derive(Clone, Default)]
pub(super) struct Leases {
    by_id: OrdMap<LeaseId, Lease>,
    /// Every leased key beside its lease; each lease counts its own. One set for all leases: most have a single key, for
    /// which a set of their own would be large.
    attached: OrdSet<(LeaseId, Bytes)>,
    /// The deadline of every lease.
    deadlines: OrdSet<(StoreTime, LeaseId)>,
    /// Those whose record the entry being applied changes; none between two entries.
    touched: OrdSet<LeaseId>,
}

/// A lease apart from its keys: what its record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) ttl_ms: u64,
    pub(super) deadline: StoreTime,
    /// Ends with the next put or deletion of its key; no other key is ever attached.
    pub(super) of_one_key: bool,
    /// Not in the record: follows from the keys.
    pub(super) key_count: u64,
}

/// A lease as of one moment.
#[derive(Clone, Copy)]
pub struct LeaseView<'a> {
    /// Its id.
    pub id: LeaseId,
    /// How long it lives after it was granted or renewed.
    pub ttl: Duration,
    /// When it is due.
    pub deadline: StoreTime,
    /// Number of keys attached to it.
    pub key_count: u64,
    leases: &'a Leases,
}

impl<'a> LeaseView<'a> {
    /// The keys attached to it, in byte order.
    pub fn keys(&self) -> impl Iterator<Item = &'a Bytes> + use<'a> {
        self.leases.keys_of(self.id)
    }
}

impl Leases {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn contains(&self, id: LeaseId) -> bool {
        self.by_id.contains_key(&id)
    }

    pub(super) fn view(&self, id: LeaseId) -> Option<LeaseView<'_>> {
        self.by_id.get(&id).map(|lease| self.view_of(id, lease))
    }

    /// Those that were granted, not made by a put, with a greater id than `after`; in the order of ids.
    pub(super) fn granted_after(&self, after: LeaseId) -> impl Iterator<Item = LeaseView<'_>> {
        let granted =
            self.by_id.range((Bound::Excluded(after), Bound::Unbounded)).filter(|(_, lease)| !lease.of_one_key);
        granted.map(|(id, lease)| self.view_of(*id, lease))
    }

    fn view_of(&self, id: LeaseId, lease: &Lease) -> LeaseView<'_> {
        let Lease { ttl_ms, deadline, key_count, .. } = *lease;
        LeaseView { id, ttl: Duration::from_millis(ttl_ms), deadline, key_count, leases: self }
    }

    fn keys_of(&self, id: LeaseId) -> impl Iterator<Item = &Bytes> + use<'_> {
        let attached = self.attached.range((Bound::Included((id, Bytes::new())), Bound::Unbounded));
        attached.take_while(move |(lease, _)| *lease == id).map(|(_, key)| key)
    }

    /// The lease that is due next, with its deadline.
    pub(super) fn next_due(&self) -> Option<(StoreTime, LeaseId)> {
        self.deadlines.get_min().copied()
    }

    /// Opens a lease under an id that is free.
    pub(super) fn open(&mut self, id: LeaseId, ttl_ms: u64, now: StoreTime, of_one_key: bool) {
        let deadline = now.after_ms(ttl_ms);
        self.by_id.insert(id, Lease { ttl_ms, deadline, of_one_key, key_count: 0 });
        self.deadlines.insert((deadline, id));
        self.touched.insert(id);
    }

    /// Prolongs a lease to its full time to live, and returns that; `None`: there is no such lease.
    pub(super) fn renew(&mut self, id: LeaseId, now: StoreTime) -> Option<u64> {
        let lease = self.by_id.get_mut(&id)?;
        let deadline = now.after_ms(lease.ttl_ms);
        if lease.deadline != deadline {
            self.deadlines.remove(&(lease.deadline, id));
            self.deadlines.insert((deadline, id));
            lease.deadline = deadline;
            self.touched.insert(id);
        }
        Some(lease.ttl_ms)
    }

    /// Ends a lease and returns the keys that were attached to it, in byte order; `None`: there is no such lease.
    pub(super) fn close(&mut self, id: LeaseId) -> Option<Vec<Bytes>> {
        let lease = self.by_id.remove(&id)?;
        self.deadlines.remove(&(lease.deadline, id));
        self.touched.insert(id);
        let keys: Vec<_> = self.keys_of(id).cloned().collect();
        for key in &keys {
            self.attached.remove(&(id, key.clone()));
        }
        Some(keys)
    }

    /// Whether keys may be attached: not to the own lease of another put, which ends when it pleases that key.
    pub(super) fn check_attachable(&self, id: LeaseId) -> Result<(), KvError> {
        match self.by_id.get(&id) {
            Some(lease) if !lease.of_one_key => Ok(()),
            _ => Err(KvError::LeaseNotFound { lease: id }),
        }
    }

    /// Attaches a key that is attached to no lease.
    pub(super) fn attach(&mut self, id: LeaseId, key: Bytes) {
        if let Some(lease) = self.by_id.get_mut(&id) {
            lease.key_count += 1;
        }
        self.attached.insert((id, key));
    }

    /// Detaches a key from its lease, which ends if it was there for this key only.
    pub(super) fn detach(&mut self, id: LeaseId, key: Bytes) {
        self.attached.remove(&(id, key));
        if let Some(lease) = self.by_id.get_mut(&id) {
            lease.key_count -= 1;
            if lease.of_one_key {
                self.close(id);
            }
        }
    }

    /// The records that the entry changed, in the order of ids. The next entry begins.
    pub(super) fn take_records(&mut self) -> impl Iterator<Item = Record> + use<'_> {
        std::mem::take(&mut self.touched).into_iter().map(|id| {
            let value = self.by_id.get(&id).map(|lease| Arc::new(*lease) as Arc<dyn RecordValue>);
            Record { key: RecordKey::Lease(id), value }
        })
    }

    /// Every lease as it is recorded, in the order of ids.
    pub(super) fn records(&self) -> impl Iterator<Item = (LeaseId, Vec<u8>)> + '_ {
        self.by_id.iter().map(|(id, lease)| (*id, lease.encode()))
    }

    /// Takes a lease over as it was recorded. Its keys come later.
    pub(super) fn restore(&mut self, id: LeaseId, record: &Bytes) -> Result<(), Violation> {
        let stored = v1::StoredLease::decode(record.clone())
            .map_err(|error| Violation::Record { key: RecordKey::Lease(id), message: error.to_string() })?;
        let v1::StoredLease { ttl_ms, deadline_ns, of_one_key } = stored;
        let deadline = StoreTime::from_nanos(deadline_ns);
        self.by_id.insert(id, Lease { ttl_ms, deadline, of_one_key, key_count: 0 });
        self.deadlines.insert((deadline, id));
        Ok(())
    }

    /// Checks what must hold between any two entries; `last` is the last id given.
    pub(super) fn validate(&self, now: StoreTime, last: LeaseId) -> Result<(), Violation> {
        let mut keys = 0;
        for (id, lease) in &self.by_id {
            let violation = |rule| Err(Violation::Record { key: RecordKey::Lease(*id), message: String::from(rule) });
            if *id == LeaseId(0) || *id > last {
                return violation("its id was given");
            }
            if lease.key_count != self.keys_of(*id).count() as u64 {
                return violation("it counts the keys attached to it");
            }
            if lease.of_one_key && lease.key_count != 1 {
                return violation("one made by a put has one key");
            }
            if lease.deadline > now.after_ms(lease.ttl_ms) || !self.deadlines.contains(&(lease.deadline, *id)) {
                return violation("it is due when its deadline says, within its time to live");
            }
            keys += lease.key_count;
        }
        if self.deadlines.len() != self.by_id.len() || self.attached.len() as u64 != keys || !self.touched.is_empty() {
            return Err(Violation::LeaseMissing);
        }
        Ok(())
    }

    /// Whether a key is known to its lease.
    pub(super) fn knows(&self, id: LeaseId, key: &Bytes) -> bool {
        self.attached.contains(&(id, key.clone()))
    }

    /// Number of leased keys.
    pub(super) fn attached_count(&self) -> usize {
        self.attached.len()
    }
}

impl RecordValue for Lease {
    fn encode(&self) -> Vec<u8> {
        let Self { ttl_ms, deadline, of_one_key, .. } = *self;
        v1::StoredLease { ttl_ms, deadline_ns: deadline.as_nanos(), of_one_key }.encode_to_vec()
    }
}
