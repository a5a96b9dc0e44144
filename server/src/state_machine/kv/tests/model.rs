//! The store as slowly and plainly as it can be written: maps, a list of everything that ever happened, and no types of
//! its own. It shares no code with the real one.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, command_reply::Reply, compare, txn_operation::Operation, txn_result};
use d_engine_proto::{ErrorCode, limits};
use prost::Message;

use crate::state_machine::{CommittedEntry, EntryContent};

pub(super) type Keys = BTreeMap<Bytes, v1::KeyValue>;

#[derive(Default)]
pub(super) struct Model {
    pub(super) state: State,
    pub(super) history: Vec<Event>,
}

/// What is gone when a command is refused.
#[derive(Clone, Default)]
pub(super) struct State {
    pub(super) keys: Keys,
    pub(super) revision: u64,
    pub(super) compacted: u64,
    pub(super) now: Duration,
    pub(super) leases: BTreeMap<u64, Lease>,
    last_lease: u64,
    pub(super) sessions: BTreeMap<u64, Session>,
    last_session: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Event {
    pub(super) revision: u64,
    pub(super) key: Bytes,
    pub(super) after: Option<v1::KeyValue>,
    pub(super) before: Option<v1::KeyValue>,
}

#[derive(Clone)]
pub(super) struct Lease {
    pub(super) ttl: Duration,
    pub(super) deadline: Duration,
    /// Made by a put.
    pub(super) own: bool,
}

#[derive(Clone)]
pub(super) struct Session {
    ttl: Duration,
    pub(super) deadline: Duration,
    acknowledged: u64,
    answers: BTreeMap<u64, (u64, v1::CommandReply)>,
}

type Refusal = (ErrorCode, v1::Outcome);

fn refuse<T>(code: ErrorCode) -> Result<T, Refusal> {
    Err((code, v1::Outcome::Unspecified))
}

impl Model {
    pub(super) fn apply(&mut self, entry: &CommittedEntry) -> Vec<v1::CommandReply> {
        let EntryContent::Commands { store_time, commands } = &entry.content else { return Vec::new() };
        self.state.now = self.state.now.max(store_time.0);
        for _ in 0..1000 {
            self.expire_one();
        }
        commands.iter().map(|command| self.answer(&v1::Command::decode(command.clone()).unwrap())).collect()
    }

    /// The first that is due at all: time, then leases, then the smaller id.
    pub(super) fn due(&self) -> Option<(Duration, u32, u64)> {
        let leases = self.state.leases.iter().map(|(id, lease)| (lease.deadline, 0, *id));
        let sessions = self.state.sessions.iter().map(|(id, session)| (session.deadline, 1, *id));
        leases.chain(sessions).min()
    }

    fn expire_one(&mut self) {
        match self.due() {
            Some((deadline, 0, lease)) if deadline <= self.state.now => {
                self.one_revision(|step| step.revoke(lease)).unwrap();
            }
            Some((deadline, _, session)) if deadline <= self.state.now => {
                self.state.sessions.remove(&session);
            }
            _ => {}
        }
    }

    fn answer(&mut self, command: &v1::Command) -> v1::CommandReply {
        let reply = match self.known_answer(command) {
            Ok(Some(answer)) => return answer,
            Ok(None) => self.one_revision(|step| step.command(command.command.as_ref().unwrap())),
            Err((code, outcome)) => return self.reply(Err((code, outcome))),
        };
        let reply = self.reply(reply);
        if let Some(call) = command.session {
            let session = self.state.sessions.get_mut(&call.session).unwrap();
            session.answers.insert(call.sequence, (command.payload_hash, reply.clone()));
        }
        reply
    }

    fn reply(&self, reply: Result<Reply, Refusal>) -> v1::CommandReply {
        let reply = reply.unwrap_or_else(|(code, outcome)| {
            let code = code.number().unsigned_abs();
            Reply::Error(v1::CommandError { code, outcome: outcome.into(), ..Default::default() })
        });
        v1::CommandReply { revision: self.state.revision, reply: Some(reply) }
    }

    fn known_answer(&mut self, command: &v1::Command) -> Result<Option<v1::CommandReply>, Refusal> {
        if !valid(command) {
            return refuse(ErrorCode::InvalidArgument);
        }
        let Some(call) = command.session else { return Ok(None) };
        let Some(session) = self.state.sessions.get_mut(&call.session) else {
            return refuse(ErrorCode::SessionExpired);
        };
        session.deadline = self.state.now + session.ttl;
        session.acknowledged = session.acknowledged.max(call.acknowledged_through);
        session.answers.retain(|sequence, _| *sequence > session.acknowledged);
        if call.sequence <= session.acknowledged {
            return Err((ErrorCode::AlreadyAcknowledged, v1::Outcome::Unknown));
        }
        let kept = |reply: &v1::CommandReply| reply.encoded_len() as u64 <= limits::SESSION_ANSWER_BYTES_MAX;
        if let Some((hash, reply)) = session.answers.get(&call.sequence) {
            return match reply {
                _ if *hash != command.payload_hash => refuse(ErrorCode::InvalidArgument),
                reply if kept(reply) => Ok(Some(reply.clone())),
                _ => Err((ErrorCode::AlreadyAcknowledged, v1::Outcome::Applied)),
            };
        }
        let bytes: usize = session
            .answers
            .values()
            .map(|(_, reply)| reply)
            .filter(|reply| kept(reply))
            .map(Message::encoded_len)
            .sum();
        if call.sequence > session.acknowledged + limits::SESSION_WINDOW_CALLS
            || bytes as u64 + limits::SESSION_ANSWER_BYTES_MAX > limits::SESSION_ANSWERS_BYTES_MAX
        {
            return refuse(ErrorCode::ResourceExhausted);
        }
        Ok(None)
    }

    fn one_revision<T>(&mut self, change: impl FnOnce(&mut Step<'_>) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let mut state = self.state.clone();
        let mut touched = Vec::new();
        let revision = state.revision + 1;
        let reply = change(&mut Step { state: &mut state, touched: &mut touched, revision, page: Page::default() })?;
        touched.sort();
        touched.dedup();
        for key in touched {
            state.revision = revision;
            let (before, after) = (self.state.keys.get(&key).cloned(), state.keys.get(&key).cloned());
            self.history.push(Event { revision, key, after, before });
        }
        self.state = state;
        Ok(reply)
    }

    /// The keys as they were.
    pub(super) fn at(&self, revision: u64) -> Keys {
        let mut keys = Keys::new();
        for event in self.history.iter().filter(|event| event.revision <= revision) {
            match &event.after {
                Some(kv) => keys.insert(event.key.clone(), kv.clone()),
                None => keys.remove(&event.key),
            };
        }
        keys
    }
}

impl State {
    pub(super) fn keys_of(&self, lease: u64) -> Vec<Bytes> {
        self.keys.values().filter(|kv| kv.lease == lease).map(|kv| kv.key.clone()).collect()
    }
}

pub(super) fn get(keys: &Keys, get: &v1::GetRequest) -> v1::GetResponse {
    v1::GetResponse { header: None, kv: keys.get(&get.key).cloned() }
}

/// `None`: the answer would be too large.
pub(super) fn get_many(keys: &Keys, get: &v1::GetManyRequest) -> Option<v1::GetManyResponse> {
    let kvs: Vec<_> = get.keys.iter().filter_map(|key| keys.get(key).cloned()).collect();
    (bytes_of_kvs(&kvs) <= limits::ANSWER_BYTES_MAX).then_some(v1::GetManyResponse { header: None, kvs })
}

fn bytes_of_kvs(kvs: &[v1::KeyValue]) -> u64 {
    v1::GetManyResponse { header: None, kvs: kvs.to_vec() }.encoded_len() as u64
}

/// Bytes of all keys and values in an answer.
fn bytes_of_txn(answer: &v1::TxnResponse) -> u64 {
    let bytes = |result: &v1::TxnResult| match result.result.as_ref().unwrap() {
        txn_result::Result::Put(put) => bytes_of_kvs(put.previous.as_slice()),
        txn_result::Result::Get(get) => bytes_of_kvs(get.kv.as_slice()),
        txn_result::Result::Range(range) => bytes_of_kvs(&range.kvs) + range.next.len() as u64,
        txn_result::Result::Delete(delete) => bytes_of_kvs(delete.previous.as_slice()),
        txn_result::Result::DeleteRange(delete) => bytes_of_kvs(&delete.previous),
        txn_result::Result::Txn(txn) => bytes_of_txn(txn),
    };
    answer.results.iter().map(bytes).sum()
}

/// What the ranges of a request have returned so far. So few keys are never too many for a page.
#[derive(Default)]
pub(super) struct Page(u64);

impl Page {
    fn takes(&mut self, kv: &v1::KeyValue) -> bool {
        let bytes = self.0 + bytes_of_kvs(std::slice::from_ref(kv));
        let takes = self.0 == 0 || bytes <= limits::RANGE_PAGE_BYTES_MAX;
        if takes {
            self.0 = bytes;
        }
        takes
    }
}

pub(super) fn range(keys: &Keys, request: &v1::RangeRequest, page: &mut Page) -> v1::RangeResponse {
    let bounds = request.range.clone().unwrap();
    let mut kvs: Vec<_> = keys.values().filter(|kv| within(&bounds, &kv.key)).cloned().collect();
    let descending = request.order() == v1::RangeOrder::Descending;
    if descending {
        kvs.reverse();
    }
    let count = kvs.len();
    if request.count_only {
        return v1::RangeResponse { count: Some(count as u64), ..Default::default() };
    }
    if request.keys_only {
        kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
    }
    let mut taken = 0;
    while taken < count && (request.limit == 0 || (taken as u64) < request.limit) && page.takes(&kvs[taken]) {
        taken += 1;
    }
    let more = taken < count;
    let next = match (more, taken) {
        (false, _) => Bytes::new(),
        (true, 0) if descending => bounds.end,
        (true, _) if descending => kvs[taken - 1].key.clone(),
        (true, _) => kvs[taken].key.clone(),
    };
    kvs.truncate(taken);
    v1::RangeResponse { header: None, kvs, count: (!more).then_some(count as u64), more, next }
}

/// `None`: the answer would be too large.
pub(super) fn read_txn(keys: &Keys, txn: &v1::TxnRequest) -> Option<v1::TxnResponse> {
    let mut state = State { keys: keys.clone(), ..Default::default() };
    let mut touched = Vec::new();
    let mut step = Step { state: &mut state, touched: &mut touched, revision: 0, page: Page::default() };
    let answer = step.txn(txn).unwrap();
    assert!(touched.is_empty());
    (bytes_of_txn(&answer) <= limits::ANSWER_BYTES_MAX).then_some(answer)
}

struct Step<'a> {
    state: &'a mut State,
    touched: &'a mut Vec<Bytes>,
    revision: u64,
    page: Page,
}

impl Step<'_> {
    fn command(&mut self, command: &Command) -> Result<Reply, Refusal> {
        let reply = match command {
            Command::Put(put) => Reply::Put(self.put(put)?),
            Command::Delete(delete) => Reply::Delete(self.delete(delete)),
            Command::DeleteRange(delete) => Reply::DeleteRange(self.delete_range(delete)),
            Command::CompareAndSwap(swap) => {
                let held = self.state.keys.get(&swap.key).cloned();
                let succeeded = held.as_ref().map(|held| held.value.clone()) == swap.expected;
                if succeeded {
                    let v1::CompareAndSwapRequest { key, value, lease, .. } = swap.clone();
                    self.put(&v1::PutRequest { key, value, lease, ..Default::default() })?;
                }
                let current = if succeeded { None } else { held };
                Reply::CompareAndSwap(v1::CompareAndSwapResponse { header: None, succeeded, current })
            }
            Command::Txn(txn) => Reply::Txn(self.txn(txn)?),
            Command::LeaseGrant(grant) => {
                if self.state.leases.contains_key(&grant.lease) {
                    return refuse(ErrorCode::LeaseExists);
                }
                let lease = self.open_lease(grant.lease, grant.ttl_ms, false);
                Reply::LeaseGrant(v1::LeaseGrantResponse { header: None, lease, ttl_ms: grant.ttl_ms })
            }
            Command::LeaseRevoke(revoke) => {
                let deleted = self.revoke(revoke.lease)?;
                Reply::LeaseRevoke(v1::LeaseRevokeResponse { header: None, deleted })
            }
            Command::LeaseRenewals(renewals) => {
                let now = self.state.now;
                let renew = |lease| {
                    let Some(lease) = self.state.leases.get_mut(lease) else { return 0 };
                    lease.deadline = now + lease.ttl;
                    millis(lease.ttl)
                };
                Reply::LeaseRenewed(v1::LeaseRenewed { ttl_ms: renewals.leases.iter().map(renew).collect() })
            }
            Command::SessionRegister(register) => {
                let ttl_ms = if register.ttl_ms == 0 { 60_000 } else { register.ttl_ms };
                let ttl = Duration::from_millis(ttl_ms);
                self.state.last_session += 1;
                let session = self.state.last_session;
                let deadline = self.state.now + ttl;
                let opened = Session { ttl, deadline, acknowledged: 0, answers: BTreeMap::new() };
                self.state.sessions.insert(session, opened);
                Reply::SessionRegister(v1::SessionRegisterResponse { header: None, session, ttl_ms })
            }
            Command::SessionRenew(renew) => {
                let now = self.state.now;
                let Some(session) = self.state.sessions.get_mut(&renew.session) else {
                    return refuse(ErrorCode::SessionExpired);
                };
                session.deadline = now + session.ttl;
                Reply::SessionRenew(v1::SessionRenewResponse { header: None, ttl_ms: millis(session.ttl) })
            }
            Command::SessionClose(close) => {
                self.state.sessions.remove(&close.session);
                Reply::SessionClose(v1::SessionCloseResponse::default())
            }
            Command::Compact(compact) => {
                let Some(v1::compact_request::Target::Revision(revision)) = compact.target else { panic!() };
                if revision < self.state.compacted {
                    return refuse(ErrorCode::Compacted);
                }
                if revision > self.state.revision {
                    return refuse(ErrorCode::FutureRevision);
                }
                self.state.compacted = revision;
                Reply::Compact(v1::CompactResponse { header: None, compacted_revision: revision })
            }
            Command::Tick(_) | Command::StateCheck(_) => Reply::Ticked(v1::Ticked {}),
        };
        let fits = match &reply {
            Reply::DeleteRange(delete) => bytes_of_kvs(&delete.previous) <= limits::ANSWER_BYTES_MAX,
            Reply::Txn(txn) => bytes_of_txn(txn) <= limits::ANSWER_BYTES_MAX,
            // One key always fits.
            _ => true,
        };
        if fits { Ok(reply) } else { refuse(ErrorCode::InvalidArgument) }
    }

    fn put(&mut self, put: &v1::PutRequest) -> Result<v1::PutResponse, Refusal> {
        let mut lease = put.lease;
        if lease != 0 && self.state.leases.get(&lease).is_none_or(|lease| lease.own) {
            return refuse(ErrorCode::LeaseNotFound);
        }
        if put.ttl_ms != 0 {
            lease = self.open_lease(0, put.ttl_ms, true);
        }
        let held = self.state.keys.get(&put.key).cloned();
        self.touched.push(put.key.clone());
        let kv = v1::KeyValue {
            key: put.key.clone(),
            value: put.value.clone(),
            create_revision: held.as_ref().map_or(self.revision, |held| held.create_revision),
            mod_revision: self.revision,
            version: held.as_ref().map_or(0, |held| held.version) + 1,
            lease,
        };
        self.state.keys.insert(put.key.clone(), kv);
        self.end_own_leases();
        Ok(v1::PutResponse { header: None, previous: if put.return_previous { held } else { None }, lease })
    }

    fn delete(&mut self, delete: &v1::DeleteRequest) -> v1::DeleteResponse {
        let held = self.state.keys.remove(&delete.key);
        let deleted = held.is_some();
        if deleted {
            self.touched.push(delete.key.clone());
        }
        self.end_own_leases();
        v1::DeleteResponse { header: None, deleted, previous: if delete.return_previous { held } else { None } }
    }

    fn delete_range(&mut self, delete: &v1::DeleteRangeRequest) -> v1::DeleteRangeResponse {
        let bounds = delete.range.clone().unwrap();
        let held: Vec<_> = self.state.keys.values().filter(|kv| within(&bounds, &kv.key)).cloned().collect();
        for kv in &held {
            self.state.keys.remove(&kv.key);
            self.touched.push(kv.key.clone());
        }
        self.end_own_leases();
        let deleted = held.len() as u64;
        let previous = if delete.return_previous { held } else { Vec::new() };
        v1::DeleteRangeResponse { header: None, deleted, previous }
    }

    fn txn(&mut self, txn: &v1::TxnRequest) -> Result<v1::TxnResponse, Refusal> {
        let succeeded = txn.compare.iter().all(|compare| holds(compare, self.state.keys.get(&compare.key)));
        let mut results = Vec::new();
        for operation in if succeeded { &txn.then } else { &txn.otherwise } {
            let result = match operation.operation.as_ref().unwrap() {
                Operation::Put(put) => txn_result::Result::Put(self.put(put)?),
                Operation::Get(request) => txn_result::Result::Get(get(&self.state.keys, request)),
                Operation::Range(request) => {
                    txn_result::Result::Range(range(&self.state.keys, request, &mut self.page))
                }
                Operation::Delete(delete) => txn_result::Result::Delete(self.delete(delete)),
                Operation::DeleteRange(delete) => txn_result::Result::DeleteRange(self.delete_range(delete)),
                Operation::Txn(nested) => txn_result::Result::Txn(self.txn(nested)?),
            };
            results.push(v1::TxnResult { result: Some(result) });
        }
        Ok(v1::TxnResponse { header: None, succeeded, results })
    }

    fn open_lease(&mut self, chosen: u64, ttl_ms: u64, own: bool) -> u64 {
        let id = if chosen == 0 { self.state.last_lease + 1 } else { chosen };
        self.state.last_lease = self.state.last_lease.max(id);
        let ttl = Duration::from_millis(ttl_ms);
        self.state.leases.insert(id, Lease { ttl, deadline: self.state.now + ttl, own });
        id
    }

    fn revoke(&mut self, lease: u64) -> Result<u64, Refusal> {
        if self.state.leases.remove(&lease).is_none() {
            return refuse(ErrorCode::LeaseNotFound);
        }
        let keys = self.state.keys_of(lease);
        for key in &keys {
            self.state.keys.remove(key);
            self.touched.push(key.clone());
        }
        Ok(keys.len() as u64)
    }

    /// Leases made by a put end with the key's next put or deletion.
    fn end_own_leases(&mut self) {
        let State { leases, keys, .. } = self.state;
        leases.retain(|id, lease| !lease.own || keys.values().any(|kv| kv.lease == *id));
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap()
}

fn holds(compare: &v1::Compare, held: Option<&v1::KeyValue>) -> bool {
    let nothing = v1::KeyValue::default();
    let numbers = held.unwrap_or(&nothing);
    let (left, right) = match compare.target.as_ref().unwrap() {
        compare::Target::Value(value) => match held {
            Some(held) => (held.value.to_vec(), value.to_vec()),
            None => return compare.relation() == compare::Relation::NotEqual,
        },
        compare::Target::Version(number) => (bytes_of(numbers.version), bytes_of(*number)),
        compare::Target::CreateRevision(number) => (bytes_of(numbers.create_revision), bytes_of(*number)),
        compare::Target::ModRevision(number) => (bytes_of(numbers.mod_revision), bytes_of(*number)),
        compare::Target::Lease(number) => (bytes_of(numbers.lease), bytes_of(*number)),
    };
    match compare.relation() {
        compare::Relation::Equal => left == right,
        compare::Relation::NotEqual => left != right,
        compare::Relation::Less => left < right,
        compare::Relation::Greater => left > right,
    }
}

fn bytes_of(number: u64) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

fn within(range: &v1::KeyRange, key: &Bytes) -> bool {
    *key >= range.start && (range.end.is_empty() || *key < range.end)
}

/// The rules that concern a command alone.
fn valid(command: &v1::Command) -> bool {
    let may_have_session = match command.command.as_ref().unwrap() {
        Command::Put(put) if valid_put(put) => true,
        Command::Delete(delete) if valid_key(&delete.key) => true,
        Command::DeleteRange(delete) if valid_range(&delete.range) => true,
        Command::CompareAndSwap(swap) if valid_key(&swap.key) => true,
        Command::Txn(txn) if valid_txn(txn) => true,
        Command::LeaseGrant(grant) if valid_ttl(grant.ttl_ms) && grant.lease < 1 << 63 => true,
        Command::LeaseRevoke(revoke) if revoke.lease != 0 => true,
        Command::LeaseRenewals(_) | Command::Tick(_) | Command::StateCheck(_) => false,
        Command::SessionRegister(register) if matches!(register.ttl_ms, 0 | 1000..=3_600_000) => false,
        Command::SessionRenew(renew) if renew.session != 0 => false,
        Command::SessionClose(close) if close.session != 0 => false,
        Command::Compact(v1::CompactRequest { target: Some(v1::compact_request::Target::Revision(_)) }) => false,
        _ => return false,
    };
    command.session.is_none_or(|call| may_have_session && call.session != 0 && call.sequence != 0)
}

fn valid_put(put: &v1::PutRequest) -> bool {
    let attachments = u32::from(put.lease != 0) + u32::from(put.ttl_ms != 0);
    valid_key(&put.key) && attachments < 2 && (put.ttl_ms == 0 || valid_ttl(put.ttl_ms))
}

fn valid_ttl(ttl_ms: u64) -> bool {
    (100..=365 * 24 * 3_600_000).contains(&ttl_ms)
}

fn valid_key(key: &Bytes) -> bool {
    !key.is_empty()
}

fn valid_range(range: &Option<v1::KeyRange>) -> bool {
    range.as_ref().is_some_and(|range| range.end.is_empty() || range.start < range.end)
}

/// Which branch of which transaction, from the outside in.
type Path = Vec<(usize, bool)>;

fn valid_txn(txn: &v1::TxnRequest) -> bool {
    let mut puts = Vec::new();
    if !collect_puts(txn, &mut 0, &mut Vec::new(), &mut puts) {
        return false;
    }
    // Two puts of one key are fine only if some transaction on the way takes them different ways.
    puts.iter().enumerate().all(|(index, (key, path))| {
        puts[index + 1..].iter().all(|(other_key, other_path)| {
            let part_ways = path.iter().any(|(txn, branch)| other_path.contains(&(*txn, !*branch)));
            key != other_key || part_ways
        })
    })
}

fn collect_puts(txn: &v1::TxnRequest, txns: &mut usize, path: &mut Path, puts: &mut Vec<(Bytes, Path)>) -> bool {
    let this = *txns;
    *txns += 1;
    if txn.compare.iter().any(|compare| !valid_key(&compare.key)) {
        return false;
    }
    for (branch, operations) in [(true, &txn.then), (false, &txn.otherwise)] {
        path.push((this, branch));
        for operation in operations {
            let valid = match operation.operation.as_ref().unwrap() {
                Operation::Put(put) => {
                    puts.push((put.key.clone(), path.clone()));
                    valid_put(put)
                }
                Operation::Get(get) => valid_key(&get.key),
                Operation::Range(range) => valid_range(&range.range),
                Operation::Delete(delete) => valid_key(&delete.key),
                Operation::DeleteRange(delete) => valid_range(&delete.range),
                Operation::Txn(nested) => collect_puts(nested, txns, path, puts),
            };
            if !valid {
                return false;
            }
        }
        path.pop();
    }
    true
}
