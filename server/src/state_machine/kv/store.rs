//! The current state of the store, and how a command changes it. Pure: the same state and entry give the same state and
//! answers everywhere.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use d_engine_proto::v1::{self, command_reply::Reply};
use d_engine_proto::{LeaseId, Revision, limits};
use prost::Message;

use super::command::{Command, CompareAndSwap, Interval, RangePart, RangeQuery, Txn, Write};
use super::error::KvError;
use super::keys::Keys;
use super::page;
use super::read::{self, Source, Written};
use super::room::Room;
use crate::state_machine::{CommittedEntry, EntryContent};
use crate::storage::versions::{Change, KeyVersion, ScanOrder, StoreState};

/// Answers of an entry are encoded one behind the other; most are about this long.
const ANSWER_BYTES_TYPICAL: usize = 16;

/// The keys and everything else that entries change. A clone is cheap and independent: readers get one.
#[derive(Clone, Default)]
pub struct Store {
    /// Every version's revisions lie within the store's: created <= modified <= current revision.
    keys: Keys,
    /// `compacted <= revision`.
    state: StoreState,
}

/// What applying an entry led to.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// One encoded `CommandReply` for each command.
    pub(super) answers: Vec<Bytes>,
    /// What changed, in the order of revisions; within one, every key once.
    pub(super) changes: Vec<Change>,
}

impl Store {
    /// A store as it was written behind: its state and the current version of every key, in any order.
    pub(super) fn restore<E>(
        state: StoreState,
        mut next: impl FnMut() -> Result<Option<KeyVersion>, E>,
    ) -> Result<Self, E> {
        let mut keys = Keys::default();
        while let Some(version) = next()? {
            keys.insert(Arc::new(version));
        }
        Ok(Self { keys, state })
    }

    /// Revision of the last change.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.state.revision
    }

    /// The oldest revision that can be read.
    #[must_use]
    pub fn compacted(&self) -> Revision {
        self.state.compacted
    }

    /// Number of keys that exist.
    #[must_use]
    pub fn key_count(&self) -> u64 {
        self.keys.len() as u64
    }

    /// How far entries are applied.
    #[must_use]
    pub fn state(&self) -> &StoreState {
        &self.state
    }

    /// Answers a read of one key; the header is left to the caller.
    ///
    /// # Errors
    /// None at present: the type is that of every read.
    pub fn get(&self, request: &v1::GetRequest) -> Result<v1::GetResponse, KvError> {
        read::get(&&self.keys, request)
    }

    /// Answers a read of several keys; the header is left to the caller.
    ///
    /// # Errors
    /// [`KvError::AnswerTooLarge`].
    pub fn get_many(&self, request: &v1::GetManyRequest) -> Result<v1::GetManyResponse, KvError> {
        read::get_many(&&self.keys, request)
    }

    /// Answers a read of an interval, up to a page; the header is left to the caller.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn range(&self, request: &v1::RangeRequest) -> Result<v1::RangeResponse, KvError> {
        read::range(&&self.keys, request)
    }

    /// Answers a transaction that cannot write; the header is left to the caller.
    ///
    /// # Errors
    /// The first rule broken; [`KvError::NotReadOnly`] or [`KvError::AnswerTooLarge`].
    pub fn txn(&self, request: &v1::TxnRequest) -> Result<v1::TxnResponse, KvError> {
        read::txn(&mut &self.keys, request)
    }

    /// Applies the next entry of the log.
    pub(super) fn apply(&mut self, entry: &CommittedEntry) -> Effects {
        self.state.position = Some(entry.position);
        match &entry.content {
            EntryContent::Blank => Effects::default(),
            EntryContent::Membership(membership) => {
                self.state.membership = Some((entry.position, membership.clone()));
                Effects::default()
            }
            EntryContent::Commands { store_time, commands } => {
                self.state.store_time = self.state.store_time.max(store_time.0);
                self.apply_commands(commands)
            }
        }
    }

    fn apply_commands(&mut self, commands: &[Bytes]) -> Effects {
        let mut changes = Vec::with_capacity(commands.len());
        let mut answers = Vec::with_capacity(commands.len());
        let mut buffer = BytesMut::with_capacity(commands.len() * ANSWER_BYTES_TYPICAL);
        for command in commands {
            let reply = Command::decode(command)
                .and_then(|command| self.apply_command(command, &mut changes))
                .unwrap_or_else(|refusal| Reply::Error(refusal.into()));
            let answer = v1::CommandReply { revision: self.revision().get(), reply: Some(reply) };
            buffer.reserve(answer.encoded_len());
            answer.encode_raw(&mut buffer);
            answers.push(buffer.split().freeze());
        }
        Effects { answers, changes }
    }

    /// Applies one command. An error means that nothing changed.
    fn apply_command(&mut self, command: Command, changes: &mut Vec<Change>) -> Result<Reply, KvError> {
        let changed_before = changes.len();
        let mut room = Room::default();
        let mut step = Step { keys: &mut self.keys, revision: self.state.revision.next(), changes };
        let reply = match command {
            Command::Write(write) => step.write(write, &mut room)?.into(),
            Command::CompareAndSwap(swap) => Reply::CompareAndSwap(step.compare_and_swap(&swap, &mut room)?),
            Command::Txn(txn) => Reply::Txn(step.txn(txn, &mut room)?),
        };
        if changes.len() > changed_before {
            self.state.revision = self.state.revision.next();
        }
        Ok(reply)
    }

    /// Checks what must hold between any two entries.
    ///
    /// # Errors
    /// The first thing that does not hold.
    pub(super) fn validate(&self) -> Result<(), Violation> {
        if self.compacted() > self.revision() {
            return Err(Violation::CompactedAhead);
        }
        let mut previous: Option<&KeyVersion> = None;
        for version in self.keys.iter() {
            let violation = |rule| Err(Violation::Key { key: version.key.clone(), rule });
            let ordered = version.create_revision <= version.mod_revision && version.mod_revision <= self.revision();
            if version.create_revision == Revision(0) || !ordered {
                return violation("0 < create revision <= mod revision <= the store's revision");
            }
            // A revision changes a key at most once.
            if version.version == 0 || version.version - 1 > version.mod_revision.get() - version.create_revision.get()
            {
                return violation("1 <= version <= mod revision - create revision + 1");
            }
            if version.key.is_empty() || version.key.len() as u64 > limits::KEY_BYTES_MAX {
                return violation("a key's length is within its bounds");
            }
            if previous.is_some_and(|previous| previous.key >= version.key) {
                return violation("keys ascend");
            }
            previous = Some(version);
        }
        Ok(())
    }
}

/// An invariant that does not hold: going on could let replicas diverge.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    /// `compacted <= revision`.
    #[error("the compacted revision is ahead of the current one")]
    CompactedAhead,
    /// A rule about each key.
    #[error("key \"{}\" breaks the rule: {rule}", key.escape_ascii())]
    Key { key: Bytes, rule: &'static str },
}

/// One command being applied: all it changes gets its revision.
struct Step<'a> {
    keys: &'a mut Keys,
    revision: Revision,
    changes: &'a mut Vec<Change>,
}

impl Step<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) {
        let before = self.keys.get(key).cloned();
        let (create_revision, version) = match &before {
            Some(held) => (held.create_revision, held.version + 1),
            None => (self.revision, 1),
        };
        let (key, value) = KeyVersion::own(key, value);
        let mod_revision = self.revision;
        let version = Arc::new(KeyVersion { key, value, create_revision, mod_revision, version, lease: LeaseId(0) });
        let (key, after) = (version.key.clone(), Some(Arc::clone(&version)));
        self.changes.push(Change { key, revision: self.revision, after, before });
        self.keys.insert(version);
    }

    /// Returns whether the key existed.
    fn delete(&mut self, key: &[u8]) -> bool {
        let Some(held) = self.keys.remove(key) else { return false };
        self.changes.push(Change { key: held.key.clone(), revision: self.revision, after: None, before: Some(held) });
        true
    }

    fn delete_range(&mut self, interval: &Interval) -> u64 {
        let held: Vec<_> = self.keys.interval(interval).cloned().collect();
        for version in &held {
            self.delete(&version.key);
        }
        held.len() as u64
    }

    /// What a key holds, as part of the answer.
    fn held(&self, key: &[u8], room: &mut Room) -> Result<Option<v1::KeyValue>, KvError> {
        self.keys.get(key).map(|held| room.key_value(held)).transpose()
    }

    fn compare_and_swap(
        &mut self,
        swap: &CompareAndSwap,
        room: &mut Room,
    ) -> Result<v1::CompareAndSwapResponse, KvError> {
        let held = self.keys.get(&swap.key);
        let succeeded = held.map(|held| &held.value) == swap.expected.as_ref();
        let current = if succeeded { None } else { self.held(&swap.key, room)? };
        if succeeded {
            self.put(&swap.key, &swap.value);
        }
        Ok(v1::CompareAndSwapResponse { header: None, succeeded, current })
    }

    fn txn(&mut self, txn: Txn, room: &mut Room) -> Result<v1::TxnResponse, KvError> {
        let changed_before = self.changes.len();
        let keys_before = txn.may_fail_halfway().then(|| self.keys.clone());
        let result = read::run(self, txn, room);
        if let (Err(_), Some(keys)) = (&result, keys_before) {
            *self.keys = keys;
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
}

impl Source for Step<'_> {
    type Error = KvError;

    fn get(&self, key: &[u8]) -> Result<Option<KeyVersion>, KvError> {
        Source::get(&&*self.keys, key)
    }

    fn range(&self, query: &RangeQuery, room: &mut Room) -> Result<v1::RangeResponse, KvError> {
        Source::range(&&*self.keys, query, room)
    }

    fn write(&mut self, write: Write, room: &mut Room) -> Result<Written, KvError> {
        Ok(match write {
            Write::Put { key, value, return_previous } => {
                let previous = if return_previous { self.held(&key, room)? } else { None };
                self.put(&key, &value);
                Written::Put(v1::PutResponse { previous, ..Default::default() })
            }
            Write::Delete { key, return_previous } => {
                let previous = if return_previous { self.held(&key, room)? } else { None };
                let deleted = self.delete(&key);
                Written::Delete(v1::DeleteResponse { header: None, deleted, previous })
            }
            Write::DeleteRange { interval, return_previous } => {
                let mut previous = Vec::new();
                if return_previous {
                    for held in self.keys.interval(&interval) {
                        previous.push(room.key_value(held)?);
                    }
                }
                let deleted = self.delete_range(&interval);
                Written::DeleteRange(v1::DeleteRangeResponse { header: None, deleted, previous })
            }
        })
    }
}

/// Reads from memory, which cannot fail.
impl Source for &Keys {
    type Error = KvError;

    fn get(&self, key: &[u8]) -> Result<Option<KeyVersion>, KvError> {
        Ok(Keys::get(self, key).map(|version| KeyVersion::clone(version)))
    }

    fn range(&self, query: &RangeQuery, room: &mut Room) -> Result<v1::RangeResponse, KvError> {
        if query.part == RangePart::Count {
            let count = Some(self.count(&query.interval) as u64);
            return Ok(v1::RangeResponse { count, ..v1::RangeResponse::default() });
        }
        let mut versions = self.interval(&query.interval).map(|version| &**version);
        page::fill(query, room, || {
            Ok(match query.order {
                ScanOrder::Ascending => versions.next(),
                ScanOrder::Descending => versions.next_back(),
            })
        })
    }
}
