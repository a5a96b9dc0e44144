//! Random entries and reads over few keys, so that they meet each other; now and then one that must be refused.

use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, compare, txn_operation::Operation};
use fastrand::Rng;

use super::{entry_at, operations, position};
use crate::state_machine::{CommittedEntry, EntryContent};

/// Keys that are prefixes of each other, not UTF-8, and full of the bytes that encodings trip over.
const KEYS: &[&[u8]] = &[
    b"\0",
    b"\0\0",
    b"\0\x01",
    b"\0\xff",
    b"\x01",
    b"a",
    b"a\0",
    b"a\0\x01",
    b"a\0\xff",
    b"a\x01",
    b"aa",
    b"ab",
    b"b",
    b"\xc3\x28",
    b"\xfe",
    b"\xff",
    b"\xff\0",
    b"\xff\xff",
];
const VALUES: &[&[u8]] = &[b"", b"\0", b"1", b"2", b"10", b"\xff\xfe", b"a longer value that tells its bytes apart"];

/// A seed that the test's output shows, or the one that the environment gives to see a failure again.
pub(super) fn seed() -> u64 {
    let seed = std::env::var("D_ENGINE_TEST_SEED").ok().map(|seed| seed.parse().expect("a number"));
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("D_ENGINE_TEST_SEED={seed}");
    seed
}

/// The entry at `index` of the log that a seed stands for.
pub(super) fn log_entry(seed: u64, index: u64) -> CommittedEntry {
    let mut rng = Rng::with_seed(seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let content = match rng.u32(..16) {
        _ if index.is_multiple_of(ENTRIES_PER_SESSION) => {
            let register = v1::SessionRegisterRequest { ttl_ms: rng.u64(1000..4000) };
            let rest = (0..rng.usize(..4)).map(|_| command(&mut rng, index));
            let commands: Vec<_> =
                std::iter::once(v1::Command::from(Command::SessionRegister(register))).chain(rest).collect();
            return entry_at(index, time(&mut rng, index), &commands);
        }
        0 => EntryContent::Blank,
        1 => EntryContent::Membership(Bytes::from(format!("members as of {index}"))),
        _ => {
            let commands: Vec<_> = (0..rng.usize(1..6)).map(|_| command(&mut rng, index)).collect();
            return entry_at(index, time(&mut rng, index), &commands);
        }
    };
    CommittedEntry { position: position(index), content }
}

/// One session is registered each so many entries, so that the newest id at any entry is known here.
const ENTRIES_PER_SESSION: u64 = 7;

/// Small steps, now and then back, and a few that are longer than a session lives.
fn time(rng: &mut Rng, index: u64) -> Duration {
    Duration::from_millis(40 * index + rng.u64(..150) + 2500 * (index / 30))
}

fn command(rng: &mut Rng, index: u64) -> v1::Command {
    let command = match rng.u32(..20) {
        0..6 => Command::Put(put(rng)),
        6 => Command::Delete(delete(rng)),
        7 => Command::DeleteRange(delete_range(rng)),
        8 | 9 => Command::CompareAndSwap(v1::CompareAndSwapRequest {
            key: key(rng),
            expected: rng.bool().then(|| value(rng)),
            value: value(rng),
            lease: if rng.u32(..4) == 0 { lease(rng) } else { 0 },
            ..Default::default()
        }),
        10..13 => Command::Txn(txn(rng, 0, true)),
        13 | 14 => Command::LeaseGrant(v1::LeaseGrantRequest {
            ttl_ms: ttl_ms(rng),
            lease: if rng.u32(..3) == 0 { 0 } else { lease(rng) },
            ..Default::default()
        }),
        15 => Command::LeaseRevoke(v1::LeaseRevokeRequest { lease: lease(rng), ..Default::default() }),
        16 => Command::LeaseRenewals(v1::LeaseRenewals { leases: (0..rng.usize(..5)).map(|_| lease(rng)).collect() }),
        17 => Command::Compact(v1::CompactRequest { target: compact_target(rng, index) }),
        18 => Command::Tick(v1::Tick {}),
        _ => match rng.u32(..8) {
            0 => Command::SessionRegister(v1::SessionRegisterRequest { ttl_ms: 999 }),
            1 | 2 => Command::SessionClose(v1::SessionCloseRequest { session: session(rng, index) }),
            _ => Command::SessionRenew(v1::SessionRenewRequest { session: session(rng, index) }),
        },
    };
    let session = (rng.u32(..3) == 0).then(|| session_call(rng, index));
    v1::Command { command: Some(command), session, payload_hash: u64::from(rng.u32(..8) == 0), trace: None }
}

/// Mostly one that is alive.
fn session(rng: &mut Rng, index: u64) -> u64 {
    (index / ENTRIES_PER_SESSION + 1).saturating_sub(rng.u64(..6))
}

/// Few sequences, so that they meet again; some out of the window, acknowledged before, or acknowledging themselves.
fn session_call(rng: &mut Rng, index: u64) -> v1::SessionCall {
    let session = session(rng, index);
    let age = index.saturating_sub(session * ENTRIES_PER_SESSION);
    let sequence = if rng.u32(..16) == 0 { 4090 + rng.u64(..20) } else { rng.u64(..6 + age / 2) };
    let acknowledged_through = match rng.u32(..16) {
        0 => sequence,
        1 => sequence + rng.u64(..3),
        2..6 => rng.u64(..2 + age / 3),
        _ => 0,
    };
    v1::SessionCall { session, sequence, acknowledged_through }
}

/// Few ids, so that they meet again; the last ones are too large to be chosen.
fn lease(rng: &mut Rng) -> u64 {
    match rng.u32(..60) {
        0 => 0,
        1 => u64::MAX / 2 + rng.u64(..2),
        2..6 => 1000 + rng.u64(..3),
        6..16 => rng.u64(1..200),
        _ => rng.u64(1..8),
    }
}

fn ttl_ms(rng: &mut Rng) -> u64 {
    if rng.u32(..30) == 0 { 99 } else { rng.u64(100..1500) }
}

fn compact_target(rng: &mut Rng, index: u64) -> Option<v1::compact_request::Target> {
    match rng.u32(..8) {
        0 => None,
        1 => Some(v1::compact_request::Target::OlderThanMs(1)),
        // There is about one revision for each entry.
        _ => Some(v1::compact_request::Target::Revision(rng.u64(..=index))),
    }
}

pub(super) fn get(rng: &mut Rng) -> v1::GetRequest {
    v1::GetRequest { key: good_key(rng), read: None }
}

pub(super) fn get_many(rng: &mut Rng) -> v1::GetManyRequest {
    v1::GetManyRequest { keys: (0..rng.usize(..6)).map(|_| good_key(rng)).collect(), read: None }
}

pub(super) fn range(rng: &mut Rng) -> v1::RangeRequest {
    let part = rng.u32(..4);
    v1::RangeRequest {
        range: Some(interval(rng)),
        read: None,
        limit: rng.u64(..6),
        order: rng.i32(0..2),
        keys_only: part == 0,
        count_only: part == 1,
    }
}

pub(super) fn read_txn(rng: &mut Rng) -> v1::TxnRequest {
    txn(rng, 0, false)
}

pub(super) fn put_of(rng: &mut Rng, value: Bytes) -> v1::Command {
    let put = v1::PutRequest { key: good_key(rng), value, ..v1::PutRequest::default() };
    v1::Command::from(Command::Put(put))
}

/// A transaction that writes one key and reads many.
pub(super) fn greedy_txn(rng: &mut Rng) -> v1::Command {
    let mut then = vec![Operation::Delete(v1::DeleteRequest {
        key: good_key(rng),
        return_previous: rng.bool(),
        ..Default::default()
    })];
    then.extend((0..4).map(|_| Operation::Get(get(rng))));
    then.push(Operation::Txn(read_txn(rng)));
    v1::Command::from(Command::Txn(super::txn(then)))
}

fn txn(rng: &mut Rng, depth: u32, writes: bool) -> v1::TxnRequest {
    let compare = (0..rng.usize(..3)).map(|_| compare(rng, writes)).collect();
    let then = branch(rng, depth, writes);
    v1::TxnRequest { compare, then, otherwise: branch(rng, depth, writes), ..Default::default() }
}

/// At most three operations and one nested transaction, three levels deep: 120 operations in all, within the bound.
fn branch(rng: &mut Rng, depth: u32, writes: bool) -> Vec<v1::TxnOperation> {
    let mut branch = Vec::new();
    let mut may_nest = depth < 3;
    for _ in 0..rng.usize(..4) {
        branch.push(match rng.u32(..if writes { 8 } else { 3 }) {
            0 => Operation::Get(get(rng)),
            1 => Operation::Range(range(rng)),
            2 if may_nest => {
                may_nest = false;
                Operation::Txn(txn(rng, depth + 1, writes))
            }
            2 => Operation::Get(get(rng)),
            3 => Operation::Delete(delete(rng)),
            4 => Operation::DeleteRange(delete_range(rng)),
            _ => Operation::Put(put(rng)),
        });
    }
    operations(branch)
}

fn compare(rng: &mut Rng, any_key: bool) -> v1::Compare {
    let target = match rng.u32(..5) {
        0 => compare::Target::Value(value(rng)),
        1 => compare::Target::Version(rng.u64(..4)),
        2 => compare::Target::CreateRevision(rng.u64(..40)),
        3 => compare::Target::ModRevision(rng.u64(..40)),
        _ => compare::Target::Lease(rng.u64(..8)),
    };
    let key = if any_key { key(rng) } else { good_key(rng) };
    v1::Compare { key, relation: rng.i32(0..4), target: Some(target) }
}

fn put(rng: &mut Rng) -> v1::PutRequest {
    let (lease, ttl_ms) = match rng.u32(..40) {
        0 => (lease(rng), ttl_ms(rng)),
        1..8 => (lease(rng), 0),
        8..16 => (0, ttl_ms(rng)),
        _ => (0, 0),
    };
    v1::PutRequest { key: key(rng), value: value(rng), lease, return_previous: rng.bool(), ttl_ms, session: None }
}

fn delete(rng: &mut Rng) -> v1::DeleteRequest {
    v1::DeleteRequest { key: key(rng), return_previous: rng.bool(), ..Default::default() }
}

fn delete_range(rng: &mut Rng) -> v1::DeleteRangeRequest {
    // Mostly small: else nothing would live long.
    let start = good_key(rng);
    let end = [&start[..], b"\0"].concat().into();
    let range = match rng.u32(..24) {
        0 => v1::KeyRange { start: end, end: start },
        1 => interval(rng),
        _ => v1::KeyRange { start, end },
    };
    v1::DeleteRangeRequest { range: Some(range), return_previous: rng.bool(), ..Default::default() }
}

fn interval(rng: &mut Rng) -> v1::KeyRange {
    let mut ends = [good_key(rng), good_key(rng)];
    ends.sort();
    let [start, mut end] = ends;
    if start == end || rng.u32(..4) == 0 {
        end = Bytes::new();
    }
    v1::KeyRange { start: if rng.u32(..4) == 0 { Bytes::new() } else { start }, end }
}

fn key(rng: &mut Rng) -> Bytes {
    if rng.u32(..100) == 0 { Bytes::new() } else { good_key(rng) }
}

fn good_key(rng: &mut Rng) -> Bytes {
    Bytes::from_static(KEYS[rng.usize(..KEYS.len())])
}

fn value(rng: &mut Rng) -> Bytes {
    Bytes::from_static(VALUES[rng.usize(..VALUES.len())])
}
