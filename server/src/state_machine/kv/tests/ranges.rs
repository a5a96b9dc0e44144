//! Ranges: bounds, order, parts, counts, and pages in both directions, from memory and from the history.

use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::v1::{self, RangeOrder, command::Command, txn_operation::Operation, txn_result};
use d_engine_proto::{Revision, limits};

use super::{delete_range, entry, put, range, txn};
use crate::state_machine::StateMachine;
use crate::state_machine::kv::{KvStateMachine, PastStore, ReadPoint, Store};

/// A store in memory and the same one in the history: after the keys were put, all of them were deleted.
pub(super) struct Both {
    _directory: tempfile::TempDir,
    pub(super) memory: std::sync::Arc<Store>,
    pub(super) past: PastStore,
}

impl Both {
    pub(super) fn new(pairs: &[(Bytes, Bytes)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let machine = KvStateMachine::open(directory.path()).unwrap();
        let puts: Vec<_> = pairs.iter().map(|(key, value)| v1::Command::from(Command::Put(put(key, value)))).collect();
        machine.apply(&entry(1, &puts)).unwrap();
        let memory = machine.current();
        let clear = Command::DeleteRange(delete_range(b"", b""));
        machine.apply(&entry(2, &[v1::Command::from(clear)])).unwrap();
        machine.flush().unwrap();
        let Ok(ReadPoint::Past(past)) = machine.at(memory.revision()) else { panic!("it is past") };
        let past = past.wait(Duration::ZERO).unwrap();
        Self { _directory: directory, memory, past }
    }

    fn of_keys(keys: &[&'static [u8]]) -> Self {
        Self::new(&keys.iter().map(|key| (Bytes::from_static(key), Bytes::from_static(b"v"))).collect::<Vec<_>>())
    }

    /// The answer, which both must give.
    fn range(&self, request: &v1::RangeRequest) -> v1::RangeResponse {
        let answer = self.memory.range(request).unwrap();
        assert_eq!(self.past.range(request).unwrap(), answer, "{request:?}");
        answer
    }

    /// The keys of all pages, one after the other, and the number of pages.
    fn pages(&self, mut request: v1::RangeRequest) -> (Vec<Bytes>, usize) {
        let (mut keys, mut pages) = (Vec::new(), 0);
        loop {
            let page = self.range(&request);
            keys.extend(page.kvs.into_iter().map(|kv| kv.key));
            pages += 1;
            if !page.more {
                assert_eq!(page.next, Bytes::new());
                return (keys, pages);
            }
            let descending = request.order() == RangeOrder::Descending;
            let bounds = request.range.as_mut().unwrap();
            *(if descending { &mut bounds.end } else { &mut bounds.start }) = page.next;
        }
    }
}

fn keys(answer: &v1::RangeResponse) -> Vec<&[u8]> {
    answer.kvs.iter().map(|kv| kv.key.as_ref()).collect()
}

fn descending(request: v1::RangeRequest) -> v1::RangeRequest {
    v1::RangeRequest { order: RangeOrder::Descending as i32, ..request }
}

#[test]
fn the_start_belongs_to_a_range_and_the_end_does_not() {
    let both = Both::of_keys(&[b"\0", b"a", b"a\0", b"b", b"\xff", b"\xff\xff"]);
    type Case = (&'static [u8], &'static [u8], &'static [&'static [u8]]);
    let cases: [Case; 7] = [
        (b"", b"", &[b"\0", b"a", b"a\0", b"b", b"\xff", b"\xff\xff"]),
        (b"a", b"b", &[b"a", b"a\0"]),
        (b"a\0", b"", &[b"a\0", b"b", b"\xff", b"\xff\xff"]),
        (b"", b"a\0", &[b"\0", b"a"]),
        (b"a", b"a\0", &[b"a"]),
        (b"\xff", b"", &[b"\xff", b"\xff\xff"]),
        (b"c", b"d", &[]),
    ];
    for (start, end, expected) in cases {
        let answer = both.range(&range(start, end));
        assert_eq!(keys(&answer), expected, "{start:?} {end:?}");
        assert_eq!((answer.count, answer.more), (Some(expected.len() as u64), false));
        let answer = both.range(&descending(range(start, end)));
        assert_eq!(keys(&answer), expected.iter().rev().copied().collect::<Vec<_>>(), "{start:?} {end:?}");
    }
}

#[test]
fn keys_are_counted_unless_some_are_left_out() {
    let both = Both::of_keys(&[b"a", b"b", b"c"]);
    let only_keys = both.range(&v1::RangeRequest { keys_only: true, limit: 2, ..range(b"", b"") });
    assert_eq!(keys(&only_keys), [b"a", b"b"]);
    assert!(only_keys.kvs.iter().all(|kv| kv.value.is_empty() && kv.version == 1));
    assert_eq!((only_keys.count, only_keys.more, only_keys.next.as_ref()), (None, true, &b"c"[..]));

    let count = v1::RangeResponse { count: Some(2), ..Default::default() };
    assert_eq!(both.range(&v1::RangeRequest { count_only: true, limit: 1, ..range(b"b", b"") }), count);
    let exact = both.range(&v1::RangeRequest { limit: 3, ..range(b"", b"") });
    assert_eq!((exact.kvs.len(), exact.count, exact.more), (3, Some(3), false));
}

#[test]
fn pages_by_limit_join_to_the_whole_in_both_orders() {
    let all: Vec<&'static [u8]> = vec![b"\0", b"\0\xff", b"a", b"a\0", b"a\0\0", b"b", b"\xff"];
    let both = Both::of_keys(&all);
    for limit in 1..=8 {
        let request = v1::RangeRequest { limit, ..range(b"", b"") };
        let pages_expected = 7_usize.div_ceil(usize::try_from(limit).unwrap());
        let (ascending, pages) = both.pages(request.clone());
        assert_eq!((ascending, pages), (all.iter().map(|key| Bytes::from_static(key)).collect(), pages_expected));
        let (descending, pages) = both.pages(descending(request));
        let reversed = all.iter().rev().map(|key| Bytes::from_static(key)).collect();
        assert_eq!((descending, pages), (reversed, pages_expected));
    }
}

#[test]
fn a_page_ends_at_its_bound_of_bytes_but_holds_at_least_one_key() {
    let value = |kib: usize| Bytes::from(vec![b'v'; kib << 10]);
    let sizes = [("a", 1400), ("b", 500), ("c", 500), ("d", 500), ("e", 1), ("f", 1200)];
    let both = Both::new(&sizes.map(|(key, kib)| (Bytes::from_static(key.as_bytes()), value(kib))));
    let (keys, pages) = both.pages(range(b"", b""));
    assert_eq!((keys.concat(), pages), (b"abcdef".to_vec(), 4));
    let (keys, pages) = both.pages(descending(range(b"", b"")));
    assert_eq!((keys.concat(), pages), (b"fedcba".to_vec(), 4));
    let (_, pages) = both.pages(v1::RangeRequest { keys_only: true, ..range(b"", b"") });
    assert_eq!(pages, 1);
}

#[test]
fn a_page_ends_at_its_bound_of_keys() {
    let count = usize::try_from(limits::RANGE_PAGE_KEYS_MAX).unwrap() + 1;
    let pairs: Vec<_> = (0..count).map(|number| (Bytes::from(format!("{number:06}")), Bytes::new())).collect();
    let both = Both::new(&pairs);
    for request in [range(b"", b""), descending(v1::RangeRequest { limit: u64::MAX, ..range(b"", b"") })] {
        let page = both.range(&request);
        assert_eq!((page.kvs.len(), page.count, page.more), (count - 1, None, true));
        let (keys, pages) = both.pages(request);
        assert_eq!((keys.len(), pages), (count, 2));
    }
}

#[test]
fn ranges_of_one_transaction_share_a_page() {
    let value = Bytes::from(vec![b'v'; 700 << 10]);
    let both = Both::new(&[(Bytes::from_static(b"a"), value.clone()), (Bytes::from_static(b"b"), value)]);
    let request = txn(vec![
        Operation::Range(range(b"a", b"b")),
        Operation::Range(range(b"a", b"")),
        Operation::Range(descending(range(b"a", b""))),
        Operation::Range(v1::RangeRequest { keys_only: true, ..range(b"a", b"") }),
    ]);
    let answer = both.memory.txn(&request).unwrap();
    assert_eq!(both.past.txn(&request).unwrap(), answer);
    let ranges: Vec<_> = answer
        .results
        .into_iter()
        .map(|result| match result.result {
            Some(txn_result::Result::Range(range)) => (range.kvs.len(), range.count, range.more, range.next),
            other => panic!("{other:?}"),
        })
        .collect();
    let next = Bytes::from_static;
    assert_eq!(
        ranges,
        [
            (1, Some(1), false, next(b"")),
            (0, None, true, next(b"a")),
            (0, None, true, next(b"")),
            (2, Some(2), false, next(b""))
        ]
    );
    assert_eq!(both.memory.revision(), Revision(2));
}
