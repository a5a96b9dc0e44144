//! What a store records of itself is enough to make it anew.

use std::collections::BTreeMap;

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command};
use d_engine_proto::{LeaseId, SessionId};

use super::{apply_at, put};
use crate::state_machine::kv::Store;
use crate::state_machine::kv::invariants::Violation;
use crate::state_machine::kv::store::Effects;
use crate::storage::versions::{KeyVersion, RecordKey, StoreState};

/// What would be on the disk if everything were written at once.
#[derive(Default)]
pub(super) struct Recorded {
    versions: BTreeMap<Bytes, KeyVersion>,
    records: BTreeMap<RecordKey, Bytes>,
    state: StoreState,
}

impl Recorded {
    pub(super) fn take(&mut self, effects: Effects, state: &StoreState) {
        assert!(effects.records.windows(2).all(|pair| pair[0].key < pair[1].key), "each once");
        for record in effects.records {
            match record.value {
                Some(value) => self.records.insert(record.key, value.encode().into()),
                None => self.records.remove(&record.key),
            };
        }
        for change in effects.changes {
            match change.after {
                Some(version) => self.versions.insert(change.key, KeyVersion::clone(&version)),
                None => self.versions.remove(&change.key),
            };
        }
        self.state = state.clone();
    }

    pub(super) fn restore(&self) -> Result<Store, Violation> {
        let records: Vec<_> = self.records.iter().map(|(key, record)| (*key, record.clone())).collect();
        let mut store = Store::restore(self.state.clone(), &records)?;
        self.versions.values().for_each(|version| store.restore_key(version.clone()));
        store.validate().map(|()| store)
    }
}

fn recorded() -> Recorded {
    let (mut store, mut recorded) = (Store::default(), Recorded::default());
    let grant = v1::LeaseGrantRequest { ttl_ms: 100, ..Default::default() };
    let commands = [
        Command::LeaseGrant(grant),
        Command::SessionRegister(v1::SessionRegisterRequest::default()),
        Command::Put(v1::PutRequest { lease: 1, ..put(b"granted", b"") }),
        Command::Put(v1::PutRequest { ttl_ms: 100, ..put(b"own", b"") }),
    ];
    let effects = apply_at(&mut store, 0, &commands.map(v1::Command::from));
    recorded.take(effects, store.state());
    recorded
}

#[test]
fn a_store_made_anew_knows_its_leases_and_their_keys() {
    let store = recorded().restore().unwrap();
    let keys = |lease| store.lease(LeaseId(lease)).unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!((keys(1), keys(2)), (vec![Bytes::from("granted")], vec![Bytes::from("own")]));
    assert_eq!((store.lease_count(), store.session_count()), (2, 1));
}

#[test]
fn records_that_contradict_each_other_are_found_out() {
    let (lease, session) = (RecordKey::Lease(LeaseId(1)), RecordKey::Session(SessionId(1)));
    type Harm = fn(&mut Recorded);
    let harms: [(&str, Harm); 6] = [
        ("not a lease", |recorded| {
            recorded.records.insert(RecordKey::Lease(LeaseId(1)), Bytes::from_static(b"\xff"));
        }),
        ("not a session", |recorded| {
            recorded.records.insert(RecordKey::Session(SessionId(1)), Bytes::from_static(b"\xff"));
        }),
        ("a key without its lease", |recorded| {
            recorded.records.remove(&RecordKey::Lease(LeaseId(1)));
        }),
        ("a lease of one key without a key", |recorded| {
            recorded.versions.remove(&b"own"[..]);
        }),
        ("a lease never given", |recorded| recorded.state.last_lease = LeaseId(0)),
        ("a session never given", |recorded| recorded.state.last_session = SessionId(0)),
    ];
    for (what, harm) in harms {
        let mut recorded = recorded();
        assert!(recorded.records.contains_key(&lease) && recorded.records.contains_key(&session));
        harm(&mut recorded);
        assert!(recorded.restore().is_err(), "{what}");
    }
}
