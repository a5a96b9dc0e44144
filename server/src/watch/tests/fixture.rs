//! A state machine with a hub, and a second one beside it that remembers everything.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, txn_operation::Operation};
use d_engine_proto::{LogIndex, Revision, Term};
use fastrand::Rng;
use parking_lot::RwLock;
use prost::Message;

use crate::consensus::Poison;
use crate::metrics::{Figures, Metrics};
use crate::state_machine::kv::KvStateMachine;
use crate::state_machine::{CommittedEntry, EntryContent, StateMachine, StoreTime};
use crate::storage::LogPosition;
use crate::storage::versions::{Change, VersionStore};
use crate::watch::{Hub, HubSettings};

/// Bounds so small that a short test crosses all of them many times.
pub(super) fn tiny() -> HubSettings {
    HubSettings {
        watches_max: 1000,
        window_bytes_max: 4 << 10,
        chunk_bytes: 1 << 10,
        bookmark_period: Duration::from_millis(3),
    }
}

pub(super) struct Fixture {
    pub(super) kv: Arc<KvStateMachine>,
    pub(super) hub: Hub,
    pub(super) metrics: Arc<Metrics>,
    /// Everything that changed, before anybody can see it.
    pub(super) truth: Arc<RwLock<Vec<Change>>>,
    twin: KvStateMachine,
    index: u64,
    _directories: [tempfile::TempDir; 2],
}

impl Fixture {
    pub(super) fn new(settings: HubSettings, recent_bytes: usize) -> Self {
        let directories = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let kv = KvStateMachine::load(VersionStore::open_tiny(directories[0].path()).unwrap()).unwrap();
        let kv = Arc::new(kv.with_recent_bytes(recent_bytes));
        let twin = KvStateMachine::open(directories[1].path()).unwrap();
        let metrics = Arc::new(Metrics::new());
        let hub = Hub::start(kv.clone(), settings, metrics.clone(), &Poison::default());
        Self { kv, hub, metrics, truth: Arc::default(), twin, index: 0, _directories: directories }
    }

    /// Applies an entry. Blocks while the history on disk is far behind.
    pub(super) fn apply(&mut self, commands: Vec<Command>) {
        self.index += 1;
        let commands = commands.into_iter().map(|command| v1::Command::from(command).encode_to_vec().into()).collect();
        let store_time = StoreTime(Duration::from_millis(self.index));
        let position = LogPosition { term: Term(1), index: LogIndex(self.index) };
        let entry = CommittedEntry { position, content: EntryContent::Commands { store_time, commands } };
        let before = self.twin.current().revision();
        self.twin.apply(&entry).unwrap();
        let new = self.twin.changes_after(before).expect("the twin remembers everything");
        self.truth.write().extend(new.iter().flat_map(|changes| changes.iter().cloned()));
        self.kv.apply(&entry).unwrap();
    }

    pub(super) fn revision(&self) -> Revision {
        self.kv.current().revision()
    }

    /// The value of a metric.
    pub(super) fn count(&self, name: &str) -> u64 {
        let text = self.metrics.encode(&Figures::default()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("d_engine_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }
}

pub(super) fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Command {
    Command::Put(v1::PutRequest { key: key.into(), value: value.into(), ..Default::default() })
}

pub(super) fn watch(start: &'static [u8], end: &'static [u8]) -> v1::WatchCreate {
    let range = Some(v1::KeyRange { start: Bytes::from_static(start), end: Bytes::from_static(end) });
    v1::WatchCreate { range, ..Default::default() }
}

/// Short keys of few letters, so that ranges, keys and prefixes of keys meet each other.
pub(super) fn random_key(random: &mut Rng) -> Bytes {
    (0..random.usize(1..4)).map(|_| random.u8(b'a'..=b'c')).collect::<Vec<_>>().into()
}

pub(super) fn random_range(random: &mut Rng) -> v1::KeyRange {
    let (a, b) = (random_key(random), random_key(random));
    match random.u32(..4) {
        0 => v1::KeyRange { end: [&a[..], b"\0"].concat().into(), start: a },
        1 => v1::KeyRange { start: a, end: Bytes::new() },
        2 => v1::KeyRange::default(),
        _ if a == b => v1::KeyRange { end: [&a[..], b"\xff"].concat().into(), start: a },
        _ => v1::KeyRange { start: a.clone().min(b.clone()), end: a.max(b) },
    }
}

pub(super) fn random_watch(random: &mut Rng) -> v1::WatchCreate {
    let filter = random.u32(..6);
    v1::WatchCreate {
        range: Some(random_range(random)),
        from_revision: 0,
        previous: random.bool(),
        no_puts: filter == 0,
        no_deletes: filter == 1,
        keys_only: random.u32(..4) == 0,
        shared: false,
    }
}

/// The commands of one entry.
pub(super) fn random_commands(random: &mut Rng) -> Vec<Command> {
    (0..random.usize(1..5)).map(|_| random_command(random)).collect()
}

fn random_command(random: &mut Rng) -> Command {
    match random.u32(..12) {
        0 | 1 => Command::Delete(random_delete(random)),
        2 if random.u32(..4) == 0 => {
            Command::DeleteRange(v1::DeleteRangeRequest { range: Some(random_range(random)), ..Default::default() })
        }
        3 | 4 => {
            let mut then: Vec<v1::TxnOperation> = Vec::new();
            let mut keys = std::collections::BTreeSet::new();
            for _ in 0..random.usize(1..12) {
                let put = random_put(random);
                let operation = if random.u32(..3) == 0 {
                    Operation::Delete(random_delete(random))
                } else if keys.insert(put.key.clone()) {
                    Operation::Put(put)
                } else {
                    continue;
                };
                then.push(v1::TxnOperation { operation: Some(operation) });
            }
            Command::Txn(v1::TxnRequest { then, ..Default::default() })
        }
        _ => Command::Put(random_put(random)),
    }
}

fn random_put(random: &mut Rng) -> v1::PutRequest {
    let value = vec![random.u8(..); random.usize(..60)].into();
    v1::PutRequest { key: random_key(random), value, ..Default::default() }
}

fn random_delete(random: &mut Rng) -> v1::DeleteRequest {
    v1::DeleteRequest { key: random_key(random), ..Default::default() }
}
