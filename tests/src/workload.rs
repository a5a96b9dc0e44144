//! Random operations from many clients, recorded for the judge.
//!
//! Few keys at a time, so that clients collide, and each key for a few hundred operations only, so that judging stays
//! cheap. Every value is written at most once, and every comparison that fails shows what it found.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use d_engine_client::{Client, Compare, Consistency, Op, Outcome as ClientOutcome, Txn, TxnResult};
use d_engine_proto::{Revision, v1};
use fastrand::Rng;

use crate::direct::DirectNode;
use crate::history::{Answer, Operation, Outcome, Recorder};

/// Groups of keys in use at one time.
const GROUPS: usize = 4;
/// Keys of a group; transactions join keys of one group.
const GROUP_KEYS: usize = 3;
/// Operations on a group before a fresh one takes its place.
const GROUP_OPERATIONS: usize = 300;

/// Budget of every call.
pub const CALL_TIMEOUT: Duration = Duration::from_millis(1_500);
/// How far past its deadline a call may end: a machine whose disks are filled and slowed wakes tasks late. Far less than
/// what a call that hangs would take.
pub const DEADLINE_MARGIN: Duration = Duration::from_secs(3);
/// Pause between the operations of one client.
const PACE: Duration = Duration::from_millis(3);

/// The keys in use, shared by all clients.
#[derive(Debug)]
pub struct Keys {
    prefix: String,
    state: Mutex<KeysState>,
}

#[derive(Debug)]
struct KeysState {
    /// Number of each group, and the operations it has left.
    groups: [(usize, usize); GROUPS],
    next: usize,
}

impl Keys {
    /// Fresh keys, all below `prefix`.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let groups = std::array::from_fn(|index| (index, GROUP_OPERATIONS));
        Self { prefix: prefix.to_owned(), state: Mutex::new(KeysState { groups, next: GROUPS }) }
    }

    /// Two different keys of a random group.
    fn pair(&self, rng: &mut Rng) -> (String, String) {
        let mut state = self.state.lock().expect("no holder panics");
        let next = state.next;
        let (number, left) = &mut state.groups[rng.usize(..GROUPS)];
        let group = *number;
        *left -= 1;
        if *left == 0 {
            (*number, *left) = (next, GROUP_OPERATIONS);
            state.next += 1;
        }
        let one = rng.usize(..GROUP_KEYS);
        let other = (one + rng.usize(1..GROUP_KEYS)) % GROUP_KEYS;
        (self.key(group, one), self.key(group, other))
    }

    /// Every key used so far.
    #[must_use]
    pub fn used(&self) -> Vec<String> {
        let groups = self.state.lock().expect("no holder panics").next;
        (0..groups).flat_map(|group| (0..GROUP_KEYS).map(move |key| self.key(group, key))).collect()
    }

    fn key(&self, group: usize, key: usize) -> String {
        format!("{}/{group}/{key}", self.prefix)
    }
}

/// One client of the load.
#[derive(Debug)]
pub struct Worker {
    client: Client,
    nodes: Vec<DirectNode>,
    keys: Arc<Keys>,
    rng: Rng,
    recorder: Recorder,
    number: usize,
    written: usize,
    /// The last value seen of some key: what a compare-and-swap that wants to succeed expects.
    seen: Option<(String, Option<String>)>,
    /// The highest revision seen; eventual reads ask for no less.
    revision: u64,
    /// Calls that ended later than their deadline and its margin.
    late: Vec<String>,
}

/// What a worker leaves.
#[derive(Debug)]
pub struct Work {
    /// Its operations.
    pub operations: Vec<Operation>,
    /// Calls that ended later than their deadline allows.
    pub late: Vec<String>,
}

impl Worker {
    /// Worker `number` of a load: its operations follow from `rng`, its times count from `start`.
    #[must_use]
    pub fn new(
        number: usize,
        client: Client,
        nodes: Vec<DirectNode>,
        keys: Arc<Keys>,
        rng: Rng,
        start: Instant,
    ) -> Self {
        Self {
            client,
            nodes,
            keys,
            rng,
            recorder: Recorder::new(number, start),
            number,
            written: 0,
            seen: None,
            revision: 0,
            late: Vec::new(),
        }
    }

    /// Works until `end`.
    pub async fn run(mut self, end: Instant) -> Work {
        let mut pace = tokio::time::interval(PACE);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while Instant::now() < end {
            pace.tick().await;
            self.one().await;
        }
        self.finish()
    }

    /// Reads every key once, linearizably: what the history has come to.
    pub async fn read_all(mut self) -> Work {
        for key in self.keys.used() {
            self.get("get", key, Consistency::Linearizable).await;
        }
        self.finish()
    }

    fn finish(self) -> Work {
        Work { operations: self.recorder.into_operations(), late: self.late }
    }

    async fn one(&mut self) {
        let (key, other) = self.keys.pair(&mut self.rng);
        match self.rng.u8(..100) {
            0..22 => self.put(key).await,
            22..40 => self.get("get", key, Consistency::Linearizable).await,
            40..58 => self.get("lease", key, Consistency::Lease).await,
            58..64 => self.direct("follower", key, v1::Consistency::Linearizable).await,
            64..70 => self.direct("lease at a node", key, v1::Consistency::Lease).await,
            70..74 => self.direct("eventual", key, v1::Consistency::Eventual).await,
            74..88 => self.compare_and_swap(key).await,
            88..97 => self.transaction(key, other).await,
            _ => self.delete(key).await,
        }
    }

    fn value(&mut self) -> String {
        self.written += 1;
        format!("{}-{}", self.number, self.written)
    }

    async fn put(&mut self, key: String) {
        let value = self.value();
        let mut operation = self.recorder.begin("put");
        operation.write.insert(key.clone(), Some(value.clone()));
        let result = self.client.put(&key, &value).await.map(|put| Answer::at(put.header.revision.get()));
        self.end(operation, result.map_err(outcome));
    }

    async fn delete(&mut self, key: String) {
        let mut operation = self.recorder.begin("delete");
        operation.write.insert(key.clone(), None);
        let result = self.client.delete(&key).return_previous().await;
        let result = result.map(|d| Answer::at(d.header.revision.get()).showing(&key, found(d.previous)));
        self.end(operation, result.map_err(outcome));
    }

    async fn get(&mut self, kind: &'static str, key: String, consistency: Consistency) {
        let operation = self.recorder.begin(kind);
        let result = self.client.get(&key).consistency(consistency).await;
        let result = result.map(|get| Answer::at(get.header.revision.get()).showing(&key, found(get.kv)));
        self.end(operation, result.map_err(outcome));
    }

    /// A read at a node of our choice, leader or not.
    async fn direct(&mut self, kind: &'static str, key: String, consistency: v1::Consistency) {
        let node = self.rng.choice(&self.nodes).expect("a cluster has nodes").clone();
        let mut operation = self.recorder.begin(kind);
        if consistency == v1::Consistency::Eventual {
            operation.min_revision = self.revision;
        }
        let result = node.get(&key, consistency, operation.min_revision).await;
        let result = result.map(|get| {
            let found = get.kv.map(|kv| (text(&kv.value), kv.mod_revision));
            Answer::at(get.header.unwrap_or_default().revision).showing(&key, found)
        });
        self.end(operation, result.map_err(|_| Outcome::NotApplied));
    }

    async fn compare_and_swap(&mut self, key: String) {
        let value = self.value();
        let expected = match &self.seen {
            Some((seen, value)) if *seen == key => value.clone(),
            _ => None,
        };
        let mut operation = self.recorder.begin("cas");
        operation.compare.insert(key.clone(), expected.clone());
        operation.write.insert(key.clone(), Some(value.clone()));
        let result = self.client.compare_and_swap(&key, expected.as_deref(), &value).await;
        let result = result.map(|cas| {
            let mut answer = Answer::at(cas.header.revision.get());
            answer.succeeded = cas.succeeded;
            if cas.succeeded { answer } else { answer.showing(&key, found(cas.current)) }
        });
        self.end(operation, result.map_err(outcome));
    }

    /// Compares one key and writes both; shows both as they were before.
    async fn transaction(&mut self, key: String, other: String) {
        let (one, two) = (self.value(), self.value());
        let expected = match &self.seen {
            Some((seen, value)) if *seen == key => Some(value.clone()),
            _ => self.rng.bool().then_some(None),
        };
        let mut operation = self.recorder.begin("txn");
        let mut txn = Txn::new();
        if let Some(expected) = expected {
            txn = txn.when(match &expected {
                Some(value) => Compare::value_equal(&key, value),
                None => Compare::missing(&key),
            });
            operation.compare.insert(key.clone(), expected);
        }
        for shown in [&key, &other] {
            txn = txn.then(Op::get(shown)).otherwise(Op::get(shown));
        }
        txn = txn.then(Op::put(&key, &one)).then(Op::put(&other, &two));
        operation.write.insert(key.clone(), Some(one));
        operation.write.insert(other.clone(), Some(two));
        let result = self.client.txn(txn).await.map(|txn| {
            let mut answer = Answer::at(txn.header.revision.get());
            answer.succeeded = txn.succeeded;
            for (shown, result) in [&key, &other].into_iter().zip(txn.results) {
                if let TxnResult::Get(get) = result {
                    answer = answer.showing(shown, found(get.kv));
                }
            }
            answer
        });
        self.end(operation, result.map_err(outcome));
    }

    fn end(&mut self, operation: Operation, result: Result<Answer, Outcome>) {
        let took = Duration::from_nanos(self.recorder.now() - operation.call);
        if took > CALL_TIMEOUT + DEADLINE_MARGIN {
            self.late.push(format!("{} took {took:?} with a deadline of {CALL_TIMEOUT:?}", operation.kind));
        }
        if let Ok(answer) = &result {
            self.revision = self.revision.max(answer.revision);
            let written = operation.write.iter().next().filter(|_| answer.succeeded);
            let shown = written.or_else(|| answer.observed.iter().next());
            self.seen = shown.map(|(key, value)| (key.clone(), value.clone()));
        }
        self.recorder.end(operation, result);
    }
}

fn outcome(error: d_engine_client::Error) -> Outcome {
    match error.outcome() {
        ClientOutcome::NotApplied => Outcome::NotApplied,
        ClientOutcome::Applied | ClientOutcome::Unknown => Outcome::Unknown,
    }
}

fn found(kv: Option<d_engine_client::KeyValue>) -> Option<(String, u64)> {
    kv.map(|kv| (text(&kv.value), Revision::get(kv.mod_revision)))
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).into_owned()
}
