//! The current state of the store, and how an entry changes it. Pure: the same state and entry give the same state and
//! answers everywhere.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use d_engine_proto::v1::{self, command_reply::Reply};
use d_engine_proto::{LeaseId, LogIndex, Revision, SessionId};
use prost::Message;

use super::command::{Call, Command, Interval, Proposal, RangePart, RangeQuery};
use super::error::KvError;
use super::invariants::Violation;
use super::keys::Keys;
use super::leases::{LeaseView, Leases};
use super::page;
use super::read::{self, Source};
use super::room::Room;
use super::sessions::Sessions;
use super::step::Step;
use crate::limits::EXPIRIES_PER_ENTRY_MAX;
use crate::state_machine::{CommittedEntry, EntryContent, StoreTime};
use crate::storage::versions::{Change, KeyVersion, Record, RecordKey, ScanOrder, StoreState};

/// Answers of an entry are encoded one behind the other; most are about this long.
const ANSWER_BYTES_TYPICAL: usize = 16;

/// The keys and everything else that entries change. A clone is cheap and independent: readers get one.
#[derive(Clone, Default)]
pub struct Store {
    /// Every version's revisions lie within the store's: created <= modified <= current revision.
    pub(super) keys: Keys,
    /// A key is attached to a lease exactly if its version says so.
    pub(super) leases: Leases,
    pub(super) sessions: Sessions,
    /// `compacted <= revision`; no lease and no session has a greater id than the last one given.
    pub(super) state: StoreState,
    /// The last entry of this run that asked for a comparison with other members. No part of the state.
    pub(super) checked: Option<LogIndex>,
}

/// What applying an entry led to.
#[derive(Default)]
pub(super) struct Effects {
    /// One encoded `CommandReply` for each command.
    pub(super) answers: Vec<Bytes>,
    /// What changed, in the order of revisions; within one, every key once, in byte order.
    pub(super) changes: Vec<Change>,
    /// The leases and sessions that changed, each once.
    pub(super) records: Vec<Record>,
    /// How many leases and sessions came to their deadline.
    pub(super) expired: usize,
    /// The commands whose trace somebody records; hardly ever any.
    pub(super) traced: Vec<Traced>,
}

/// A command that belongs to a trace.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Traced {
    pub(super) context: v1::TraceContext,
    /// The store's, after the command.
    pub(super) revision: Revision,
}

impl Store {
    /// A store as it was written behind, but for its keys.
    ///
    /// # Errors
    /// When a record is none.
    pub(super) fn restore(state: StoreState, records: &[(RecordKey, Bytes)]) -> Result<Self, Violation> {
        let mut store = Self { state, ..Self::default() };
        for (key, record) in records {
            match key {
                RecordKey::Lease(lease) => store.leases.restore(*lease, record)?,
                RecordKey::Session(session) => store.sessions.restore(*session, record)?,
            }
        }
        Ok(store)
    }

    /// Adds the current version of a key, in any order, to a store that is being restored.
    pub(super) fn restore_key(&mut self, version: KeyVersion) {
        if version.lease != LeaseId(0) {
            self.leases.attach(version.lease, version.key.clone());
        }
        self.keys.insert(Arc::new(version));
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

    /// Number of leases, those that puts made included.
    #[must_use]
    pub fn lease_count(&self) -> u64 {
        self.leases.len() as u64
    }

    /// Number of sessions.
    #[must_use]
    pub fn session_count(&self) -> u64 {
        self.sessions.len() as u64
    }

    /// How far entries are applied.
    #[must_use]
    pub fn state(&self) -> &StoreState {
        &self.state
    }

    /// The last entry since the start after which members compare their states.
    #[must_use]
    pub fn checked(&self) -> Option<LogIndex> {
        self.checked
    }

    /// When the next lease or session is due; it ends with the first entry at this store time or later.
    #[must_use]
    pub fn due(&self) -> Option<StoreTime> {
        self.next_due().map(|(deadline, _)| deadline)
    }

    /// A lease, whether granted or made by a put.
    #[must_use]
    pub fn lease(&self, id: LeaseId) -> Option<LeaseView<'_>> {
        self.leases.view(id)
    }

    /// The leases that were granted and have a greater id than `after`, in the order of ids. Those made by puts are left
    /// out.
    pub fn leases(&self, after: LeaseId) -> impl Iterator<Item = LeaseView<'_>> {
        self.leases.granted_after(after)
    }

    /// Answers a read of one key; the header is left to the caller.
    ///
    /// # Errors
    /// None at present: the type is that of every read.
    pub fn get(&self, request: &v1::GetRequest) -> Result<v1::GetResponse, KvError> {
        read::get(&&self.keys, request)
    }

    /// The value of a key.
    #[must_use]
    pub(crate) fn value(&self, key: &[u8]) -> Option<Bytes> {
        self.keys.get(key).map(|version| version.value.clone())
    }

    /// The keys from `start` to, but without, `end` (empty: to the last), with their values.
    pub(crate) fn pairs(&self, start: Bytes, end: Bytes) -> Vec<(Bytes, Bytes)> {
        let interval = Interval { start, end: (!end.is_empty()).then_some(end) };
        self.keys.interval(&interval).map(|version| (version.key.clone(), version.value.clone())).collect()
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
        let expired = self.expire(&mut changes);
        let mut answers = Vec::with_capacity(commands.len());
        let mut buffer = BytesMut::with_capacity(commands.len() * ANSWER_BYTES_TYPICAL);
        let mut traced = Vec::new();
        for command in commands {
            let (answer, trace) = self.answer(command, &mut buffer, &mut changes);
            answers.push(answer);
            if let Some(context) = trace {
                traced.push(Traced { context, revision: self.revision() });
            }
        }
        let records = self.leases.take_records().chain(self.sessions.take_records()).collect();
        Effects { answers, changes, records, expired, traced }
    }

    /// Ends what is due, the earliest first; only so much of it that the entry's commands need not wait for long. The
    /// next entry goes on. Returns how much.
    fn expire(&mut self, changes: &mut Vec<Change>) -> usize {
        for expired in 0..EXPIRIES_PER_ENTRY_MAX {
            match self.next_due() {
                Some((deadline, owner)) if deadline <= self.now() => match owner {
                    // It exists, being due.
                    RecordKey::Lease(lease) => drop(self.in_one_revision(changes, |step| step.end_lease(lease))),
                    RecordKey::Session(session) => self.sessions.close(session),
                },
                _ => return expired,
            }
        }
        EXPIRIES_PER_ENTRY_MAX
    }

    /// Who is due next, and when. Of those that are due at once, leases come before sessions and smaller ids before
    /// greater ones.
    fn next_due(&self) -> Option<(StoreTime, RecordKey)> {
        let lease = self.leases.next_due().map(|(deadline, id)| (deadline, RecordKey::Lease(id)));
        let session = self.sessions.next_due().map(|(deadline, id)| (deadline, RecordKey::Session(id)));
        lease.into_iter().chain(session).min()
    }

    fn now(&self) -> StoreTime {
        StoreTime(self.state.store_time)
    }

    /// Answers a command, and says to which trace it belongs.
    fn answer(
        &mut self,
        command: &Bytes,
        buffer: &mut BytesMut,
        changes: &mut Vec<Change>,
    ) -> (Bytes, Option<v1::TraceContext>) {
        match Proposal::decode(command) {
            Ok(Proposal { call, command, trace }) => (self.answer_once(call, command, buffer, changes), trace),
            Err(refusal) => (self.encode(Err(refusal), buffer), None),
        }
    }

    /// Applies a command, unless its session knows the answer.
    fn answer_once(
        &mut self,
        call: Option<Call>,
        command: Command,
        buffer: &mut BytesMut,
        changes: &mut Vec<Change>,
    ) -> Bytes {
        let Some(call) = call else {
            let reply = self.apply_command(command, changes);
            return self.encode(reply, buffer);
        };
        match self.sessions.admit(&call, self.now()) {
            Ok(Some(first_answer)) => first_answer,
            Ok(None) => {
                let reply = self.apply_command(command, changes);
                let answer = self.encode(reply, buffer);
                self.sessions.keep(&call, &answer);
                answer
            }
            Err(refusal) => self.encode(Err(refusal), buffer),
        }
    }

    fn encode(&self, reply: Result<Reply, KvError>, buffer: &mut BytesMut) -> Bytes {
        let reply = reply.unwrap_or_else(|refusal| Reply::Error(refusal.into()));
        let answer = v1::CommandReply { revision: self.revision().get(), reply: Some(reply) };
        buffer.reserve(answer.encoded_len());
        answer.encode_raw(buffer);
        buffer.split().freeze()
    }

    /// Applies one command. An error means that nothing changed.
    fn apply_command(&mut self, command: Command, changes: &mut Vec<Change>) -> Result<Reply, KvError> {
        match command {
            Command::Write(write) => {
                self.in_one_revision(changes, |step| Ok(step.write(write, &mut Room::default())?.into()))
            }
            Command::CompareAndSwap(swap) => self.in_one_revision(changes, |step| {
                Ok(Reply::CompareAndSwap(step.compare_and_swap(&swap, &mut Room::default())?))
            }),
            Command::Txn(txn) => {
                self.in_one_revision(changes, |step| Ok(Reply::Txn(step.txn(txn, &mut Room::default())?)))
            }
            Command::GrantLease { ttl_ms, chosen } => self.in_one_revision(changes, |step| {
                let lease = step.grant_lease(ttl_ms, chosen)?.get();
                Ok(Reply::LeaseGrant(v1::LeaseGrantResponse { header: None, lease, ttl_ms }))
            }),
            Command::RevokeLease(lease) => self.in_one_revision(changes, |step| {
                Ok(Reply::LeaseRevoke(v1::LeaseRevokeResponse { header: None, deleted: step.end_lease(lease)? }))
            }),
            Command::RenewLeases(leases) => {
                let now = self.now();
                let ttl_ms = leases.into_iter().map(|lease| self.leases.renew(lease, now).unwrap_or(0)).collect();
                Ok(Reply::LeaseRenewed(v1::LeaseRenewed { ttl_ms }))
            }
            Command::RegisterSession { ttl_ms } => {
                let session = SessionId(self.state.last_session.get() + 1);
                self.sessions.open(session, ttl_ms, self.now())?;
                self.state.last_session = session;
                let session = session.get();
                Ok(Reply::SessionRegister(v1::SessionRegisterResponse { header: None, session, ttl_ms }))
            }
            Command::RenewSession(session) => {
                let ttl_ms = self.sessions.renew(session, self.now())?;
                Ok(Reply::SessionRenew(v1::SessionRenewResponse { header: None, ttl_ms }))
            }
            Command::CloseSession(session) => {
                self.sessions.close(session);
                Ok(Reply::SessionClose(v1::SessionCloseResponse::default()))
            }
            Command::Compact(revision) => {
                self.compact(revision)?;
                let compacted_revision = self.compacted().get();
                Ok(Reply::Compact(v1::CompactResponse { header: None, compacted_revision }))
            }
            Command::Tick => Ok(Reply::Ticked(v1::Ticked {})),
            Command::StateCheck => {
                self.checked = self.state.position.map(|position| position.index);
                Ok(Reply::Ticked(v1::Ticked {}))
            }
        }
    }

    /// Gives all that `change` changes the next revision, if it changes a key.
    fn in_one_revision<T>(&mut self, changes: &mut Vec<Change>, change: impl FnOnce(&mut Step<'_>) -> T) -> T {
        let (revision, changed_before) = (self.state.revision.next(), changes.len());
        let result = change(&mut Step { store: self, revision, changes });
        if changes.len() > changed_before {
            self.state.revision = revision;
        }
        result
    }

    fn compact(&mut self, oldest: Revision) -> Result<(), KvError> {
        let (minimum, current) = (self.compacted(), self.revision());
        if oldest < minimum {
            return Err(KvError::Compacted { requested: oldest, minimum });
        }
        if oldest > current {
            return Err(KvError::FutureRevision { requested: oldest, current });
        }
        self.state.compacted = oldest;
        Ok(())
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
