//! Random entries and reads over few keys, so that they meet each other; now and then one that must be refused.

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, compare, txn_operation::Operation};
use fastrand::Rng;

use super::{entry, operations, position};
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

/// The entry at `index` of the log that a seed stands for, with its commands.
pub(super) fn log_entry(seed: u64, index: u64) -> (CommittedEntry, Vec<v1::Command>) {
    let mut rng = Rng::with_seed(seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let content = match rng.u32(..16) {
        0 => EntryContent::Blank,
        1 => EntryContent::Membership(Bytes::from(format!("members as of {index}"))),
        _ => {
            let commands: Vec<_> = (0..rng.usize(1..6)).map(|_| command(&mut rng)).collect();
            return (entry(index, &commands), commands);
        }
    };
    (CommittedEntry { position: position(index), content }, Vec::new())
}

fn command(rng: &mut Rng) -> v1::Command {
    let command = match rng.u32(..10) {
        0..4 => Command::Put(put(rng)),
        4 => Command::Delete(delete(rng)),
        5 => Command::DeleteRange(delete_range(rng)),
        6 | 7 => Command::CompareAndSwap(v1::CompareAndSwapRequest {
            key: key(rng),
            expected: rng.bool().then(|| value(rng)),
            value: value(rng),
            ..Default::default()
        }),
        _ => Command::Txn(txn(rng, 0, true)),
    };
    v1::Command::from(command)
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
        _ => compare::Target::Lease(rng.u64(..2)),
    };
    let key = if any_key { key(rng) } else { good_key(rng) };
    v1::Compare { key, relation: rng.i32(0..4), target: Some(target) }
}

fn put(rng: &mut Rng) -> v1::PutRequest {
    v1::PutRequest { key: key(rng), value: value(rng), return_previous: rng.bool(), ..Default::default() }
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
