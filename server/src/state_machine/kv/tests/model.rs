//! The store as slowly and plainly as it can be written: a map, a list of everything that ever happened, and no types
//! of its own. It shares no code with the real one.

use std::collections::BTreeMap;

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, command_reply::Reply, compare, txn_operation::Operation, txn_result};
use d_engine_proto::{ErrorCode, limits};
use prost::Message;

pub(super) type Keys = BTreeMap<Bytes, v1::KeyValue>;

#[derive(Clone, Default)]
pub(super) struct Model {
    pub(super) keys: Keys,
    pub(super) revision: u64,
    history: Vec<(u64, Bytes, Option<v1::KeyValue>)>,
}

impl Model {
    pub(super) fn apply(&mut self, command: &v1::Command) -> v1::CommandReply {
        let mut keys = self.keys.clone();
        let mut touched = Vec::new();
        let mut step =
            Step { keys: &mut keys, touched: &mut touched, revision: self.revision + 1, page: Page::default() };
        let reply = match command.command.as_ref() {
            Some(Command::Put(put)) if valid_key(&put.key) => Some(Reply::Put(step.put(put))),
            Some(Command::Delete(delete)) if valid_key(&delete.key) => Some(Reply::Delete(step.delete(delete))),
            Some(Command::DeleteRange(delete)) if valid_range(&delete.range) => {
                Some(Reply::DeleteRange(step.delete_range(delete)))
            }
            Some(Command::CompareAndSwap(swap)) if valid_key(&swap.key) => {
                let held = step.keys.get(&swap.key).cloned();
                let succeeded = held.as_ref().map(|held| held.value.clone()) == swap.expected;
                if succeeded {
                    step.put(&v1::PutRequest {
                        key: swap.key.clone(),
                        value: swap.value.clone(),
                        ..Default::default()
                    });
                }
                let current = if succeeded { None } else { held };
                Some(Reply::CompareAndSwap(v1::CompareAndSwapResponse { header: None, succeeded, current }))
            }
            Some(Command::Txn(txn)) if valid_txn(txn) => Some(Reply::Txn(step.txn(txn))),
            _ => None,
        };
        let fits = |reply: &Reply| match reply {
            Reply::DeleteRange(delete) => bytes_of_kvs(&delete.previous) <= limits::ANSWER_BYTES_MAX,
            Reply::Txn(txn) => bytes_of_txn(txn) <= limits::ANSWER_BYTES_MAX,
            // One key always fits.
            _ => true,
        };
        let reply = reply.filter(fits).unwrap_or_else(|| {
            touched.clear();
            let code = ErrorCode::InvalidArgument.number().unsigned_abs();
            Reply::Error(v1::CommandError { code, ..Default::default() })
        });
        if !touched.is_empty() {
            self.revision += 1;
            touched.sort();
            touched.dedup();
            for key in touched {
                self.history.push((self.revision, key.clone(), keys.get(&key).cloned()));
            }
            self.keys = keys;
        }
        v1::CommandReply { revision: self.revision, reply: Some(reply) }
    }

    /// The keys as they were.
    pub(super) fn at(&self, revision: u64) -> Keys {
        let mut keys = Keys::new();
        for (_, key, kv) in self.history.iter().filter(|(at, ..)| *at <= revision) {
            match kv {
                Some(kv) => keys.insert(key.clone(), kv.clone()),
                None => keys.remove(key),
            };
        }
        keys
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
    let mut keys = keys.clone();
    let mut touched = Vec::new();
    let answer = Step { keys: &mut keys, touched: &mut touched, revision: 0, page: Page::default() }.txn(txn);
    assert!(touched.is_empty());
    (bytes_of_txn(&answer) <= limits::ANSWER_BYTES_MAX).then_some(answer)
}

struct Step<'a> {
    keys: &'a mut Keys,
    touched: &'a mut Vec<Bytes>,
    revision: u64,
    page: Page,
}

impl Step<'_> {
    fn put(&mut self, put: &v1::PutRequest) -> v1::PutResponse {
        let held = self.keys.get(&put.key).cloned();
        self.touched.push(put.key.clone());
        let kv = v1::KeyValue {
            key: put.key.clone(),
            value: put.value.clone(),
            create_revision: held.as_ref().map_or(self.revision, |held| held.create_revision),
            mod_revision: self.revision,
            version: held.as_ref().map_or(0, |held| held.version) + 1,
            lease: 0,
        };
        self.keys.insert(put.key.clone(), kv);
        v1::PutResponse { previous: if put.return_previous { held } else { None }, ..Default::default() }
    }

    fn delete(&mut self, delete: &v1::DeleteRequest) -> v1::DeleteResponse {
        let held = self.keys.remove(&delete.key);
        let deleted = held.is_some();
        if deleted {
            self.touched.push(delete.key.clone());
        }
        v1::DeleteResponse { header: None, deleted, previous: if delete.return_previous { held } else { None } }
    }

    fn delete_range(&mut self, delete: &v1::DeleteRangeRequest) -> v1::DeleteRangeResponse {
        let bounds = delete.range.clone().unwrap();
        let held: Vec<_> = self.keys.values().filter(|kv| within(&bounds, &kv.key)).cloned().collect();
        for kv in &held {
            self.keys.remove(&kv.key);
            self.touched.push(kv.key.clone());
        }
        let deleted = held.len() as u64;
        let previous = if delete.return_previous { held } else { Vec::new() };
        v1::DeleteRangeResponse { header: None, deleted, previous }
    }

    fn txn(&mut self, txn: &v1::TxnRequest) -> v1::TxnResponse {
        let succeeded = txn.compare.iter().all(|compare| holds(compare, self.keys.get(&compare.key)));
        let mut results = Vec::new();
        for operation in if succeeded { &txn.then } else { &txn.otherwise } {
            let result = match operation.operation.as_ref().unwrap() {
                Operation::Put(put) => txn_result::Result::Put(self.put(put)),
                Operation::Get(request) => txn_result::Result::Get(get(self.keys, request)),
                Operation::Range(request) => txn_result::Result::Range(range(self.keys, request, &mut self.page)),
                Operation::Delete(delete) => txn_result::Result::Delete(self.delete(delete)),
                Operation::DeleteRange(delete) => txn_result::Result::DeleteRange(self.delete_range(delete)),
                Operation::Txn(nested) => txn_result::Result::Txn(self.txn(nested)),
            };
            results.push(v1::TxnResult { result: Some(result) });
        }
        v1::TxnResponse { header: None, succeeded, results }
    }
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
                    valid_key(&put.key)
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
