//! A number for everything that the members of a cluster must agree on, so that two states can be compared from afar.
//!
//! It covers what entries make of the store: keys with their revisions and leases, leases and sessions with their
//! deadlines, the counters. It reads a store that nobody changes and may take long: never while an entry is applied.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use super::store::Store;

/// How [`Store::hash`] comes about. Hashes of two kinds say nothing about each other, so a change takes a new number.
pub const STATE_HASH_KIND: u32 = 1;

impl Store {
    /// The hash of this state.
    #[must_use]
    pub fn hash(&self) -> u64 {
        let mut hasher = SipHasher13::new();
        let state = &self.state;
        if let Some(position) = state.position {
            hasher.write_u64(position.term.get());
            hasher.write_u64(position.index.get());
        }
        for number in [
            u64::try_from(state.store_time.as_nanos()).unwrap_or(u64::MAX),
            state.epoch.get(),
            state.revision.get(),
            state.compacted.get(),
            state.last_lease.get(),
            state.last_session.get(),
        ] {
            hasher.write_u64(number);
        }
        hasher.write_u64(self.keys.len() as u64);
        for version in self.keys.iter() {
            bytes(&mut hasher, &version.key);
            bytes(&mut hasher, &version.value);
            hasher.write_u64(version.create_revision.get());
            hasher.write_u64(version.mod_revision.get());
            hasher.write_u64(version.version);
            hasher.write_u64(version.lease.get());
        }
        hasher.write_u64(self.leases.len() as u64);
        for (id, record) in self.leases.records() {
            hasher.write_u64(id.get());
            bytes(&mut hasher, &record);
        }
        hasher.write_u64(self.sessions.len() as u64);
        for (id, record) in self.sessions.records() {
            hasher.write_u64(id.get());
            bytes(&mut hasher, &record);
        }
        hasher.finish()
    }
}

fn bytes(hasher: &mut SipHasher13, bytes: &[u8]) {
    hasher.write_u64(bytes.len() as u64);
    hasher.write(bytes);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use d_engine_proto::{LeaseId, Revision, SessionId};

    use super::*;
    use crate::state_machine::StoreTime;
    use crate::storage::versions::KeyVersion;

    fn version(key: &[u8], value: &[u8]) -> KeyVersion {
        let (key, value) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        KeyVersion {
            key,
            value,
            create_revision: Revision(1),
            mod_revision: Revision(2),
            version: 2,
            lease: LeaseId(0),
        }
    }

    fn store() -> Store {
        let mut store = Store::default();
        store.restore_key(version(b"a", b"1"));
        store.restore_key(version(b"b", b"2"));
        store.leases.open(LeaseId(7), 1000, StoreTime::default(), false);
        store.sessions.open(SessionId(3), 1000, StoreTime::default()).unwrap();
        store
    }

    #[test]
    fn whatever_differs_shows() {
        let hash = store().hash();
        assert_eq!(hash, store().hash(), "the same state, made anew");
        type Alteration = fn(&mut Store);
        let changes: [(&str, Alteration); 9] = [
            ("a value", |store| store.restore_key(version(b"b", b"3"))),
            ("where a key ends", |store| {
                store.keys.remove(b"a");
                store.restore_key(version(b"a1", b""));
            }),
            ("a key more", |store| store.restore_key(version(b"c", b""))),
            ("a version", |store| drop(store.keys.insert(Arc::new(KeyVersion { version: 1, ..version(b"a", b"1") })))),
            ("a key's lease", |store| store.restore_key(KeyVersion { lease: LeaseId(7), ..version(b"a", b"1") })),
            ("a lease", |store| drop(store.leases.close(LeaseId(7)))),
            ("a deadline", |store| {
                store.sessions.renew(SessionId(3), StoreTime::default().after_ms(1)).unwrap();
            }),
            ("the revision", |store| store.state.revision = Revision(9)),
            ("the time", |store| store.state.store_time = std::time::Duration::from_nanos(1)),
        ];
        for (what, change) in changes {
            let mut other = store();
            change(&mut other);
            assert_ne!(other.hash(), hash, "{what}");
        }
    }
}
