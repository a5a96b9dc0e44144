//! Transactions: comparisons, nesting, and what operations see of each other.

use bytes::Bytes;
use d_engine_proto::Revision;
use d_engine_proto::v1::compare::{Relation, Target};
use d_engine_proto::v1::{self, command::Command, txn_operation::Operation, txn_result};

use super::{apply, apply_txn, contents, delete, delete_range, entry, get, operations, put, range, txn};
use crate::state_machine::kv::Store;

fn compare(key: &'static [u8], relation: Relation, target: Target) -> v1::Compare {
    v1::Compare { key: Bytes::from_static(key), relation: relation as i32, target: Some(target) }
}

fn value(value: &'static [u8]) -> Target {
    Target::Value(Bytes::from_static(value))
}

fn holds(store: &Store, compare: v1::Compare) -> bool {
    store.txn(&v1::TxnRequest { compare: vec![compare], ..Default::default() }).unwrap().succeeded
}

/// The key that a get within a transaction found.
fn found(answer: &v1::TxnResponse, index: usize) -> Option<&v1::KeyValue> {
    match &answer.results[index].result {
        Some(txn_result::Result::Get(get)) => get.kv.as_ref(),
        other => panic!("{other:?}"),
    }
}

/// Which relations hold for a target that is smaller than, equal to and larger than what the key has.
fn relations(store: &Store, key: &'static [u8], target: &Target) -> Vec<Relation> {
    [Relation::Equal, Relation::NotEqual, Relation::Less, Relation::Greater]
        .into_iter()
        .filter(|relation| holds(store, compare(key, *relation, target.clone())))
        .collect()
}

#[test]
fn comparisons_read_as_what_the_key_has_relation_target() {
    let mut store = Store::default();
    apply(&mut store, Command::Put(put(b"other", b"")));
    for text in [b"4", b"5"] {
        apply(&mut store, Command::Put(put(b"k", text)));
    }
    // Value "5", version 2, created at 2, modified at 3, no lease.
    type Number = fn(u64) -> Target;
    let numbers: [Number; 4] = [Target::Version, Target::CreateRevision, Target::ModRevision, Target::Lease];
    for (target, has) in numbers.into_iter().zip([2, 2, 3, 0]) {
        assert_eq!(relations(&store, b"k", &target(has)), [Relation::Equal]);
        assert_eq!(relations(&store, b"k", &target(has + 1)), [Relation::NotEqual, Relation::Less]);
        if has > 0 {
            assert_eq!(relations(&store, b"k", &target(has - 1)), [Relation::NotEqual, Relation::Greater]);
        }
    }
    assert_eq!(relations(&store, b"k", &value(b"5")), [Relation::Equal]);
    assert_eq!(relations(&store, b"k", &value(b"50")), [Relation::NotEqual, Relation::Less]);
    assert_eq!(relations(&store, b"k", &value(b"")), [Relation::NotEqual, Relation::Greater]);
}

#[test]
fn a_key_that_does_not_exist_has_zeros_and_no_value() {
    let store = Store::default();
    for target in [Target::Version, Target::CreateRevision, Target::ModRevision, Target::Lease] {
        assert_eq!(relations(&store, b"k", &target(0)), [Relation::Equal]);
        assert_eq!(relations(&store, b"k", &target(1)), [Relation::NotEqual, Relation::Less]);
    }
    assert_eq!(relations(&store, b"k", &value(b"")), [Relation::NotEqual]);
}

#[test]
fn all_comparisons_must_hold_for_the_first_branch() {
    let mut store = Store::default();
    let absent = || compare(b"k", Relation::Equal, Target::Version(0));
    let branches = |compare: Vec<v1::Compare>| v1::TxnRequest {
        compare,
        then: operations(vec![Operation::Put(put(b"k", b"then"))]),
        otherwise: operations(vec![Operation::Get(get(b"k"))]),
        ..Default::default()
    };
    let first = apply_txn(&mut store, branches(vec![absent(), absent()]));
    assert!(first.succeeded);
    assert_eq!(first.results, [v1::TxnResult { result: Some(txn_result::Result::Put(v1::PutResponse::default())) }]);

    let second = apply_txn(&mut store, branches(vec![compare(b"k", Relation::Equal, value(b"then")), absent()]));
    assert!(!second.succeeded);
    assert_eq!(found(&second, 0).unwrap().value, "then");
    assert_eq!(store.revision(), Revision(1));
}

#[test]
fn later_operations_and_nested_comparisons_see_earlier_writes_under_one_revision() {
    let mut store = Store::default();
    apply(&mut store, Command::Put(put(b"a", b"old")));
    let nested = v1::TxnRequest {
        compare: vec![
            compare(b"a", Relation::Equal, value(b"new")),
            compare(b"a", Relation::Equal, Target::ModRevision(2)),
            compare(b"b", Relation::Equal, Target::Version(0)),
        ],
        then: operations(vec![Operation::Put(put(b"b", b"nested")), Operation::Get(get(b"b"))]),
        ..Default::default()
    };
    let answer = apply_txn(
        &mut store,
        txn(vec![
            Operation::Get(get(b"a")),
            Operation::Put(put(b"a", b"new")),
            Operation::Get(get(b"a")),
            Operation::Txn(nested),
            Operation::Range(range(b"", b"")),
            Operation::Delete(delete(b"a")),
            Operation::Get(get(b"a")),
        ]),
    );
    assert_eq!(found(&answer, 0).unwrap().value, "old");
    let changed = found(&answer, 2).unwrap();
    assert_eq!((changed.value.as_ref(), changed.mod_revision, changed.version), (&b"new"[..], 2, 2));
    let Some(txn_result::Result::Txn(inner)) = &answer.results[3].result else { panic!("{answer:?}") };
    assert!(inner.succeeded);
    assert_eq!(found(inner, 1).unwrap().mod_revision, 2);
    let Some(txn_result::Result::Range(both)) = &answer.results[4].result else { panic!("{answer:?}") };
    assert_eq!((both.count, both.kvs.len()), (Some(2), 2));
    assert_eq!(found(&answer, 6), None);
    assert_eq!(store.revision(), Revision(2));
    assert_eq!(contents(&store).len(), 1);
}

#[test]
fn a_key_deleted_and_put_in_one_transaction_begins_a_new_life() {
    let mut store = Store::default();
    apply(&mut store, Command::Put(put(b"k", b"1")));
    apply(&mut store, Command::Put(put(b"k", b"2")));
    apply_txn(&mut store, txn(vec![Operation::Delete(delete(b"k")), Operation::Put(put(b"k", b"3"))]));
    let kv = &contents(&store)[0];
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (3, 3, 1));
}

#[test]
fn changes_name_each_key_once_with_its_last_state() {
    let mut store = Store::default();
    apply(&mut store, Command::Put(put(b"b", b"1")));
    let mixed = txn(vec![
        Operation::Put(put(b"c", b"1")),
        Operation::Put(put(b"a", b"1")),
        Operation::DeleteRange(delete_range(b"", b"c")),
        Operation::Put(put(b"b", b"2")),
    ]);
    let changes = store.apply(&entry(2, &[v1::Command::from(Command::Txn(mixed))])).changes;
    let summary: Vec<_> = changes
        .iter()
        .map(|change| (change.key.clone(), change.after.as_ref().map(|after| after.value.clone()), change.revision))
        .collect();
    let bytes = Bytes::from_static;
    assert_eq!(
        summary,
        [
            (bytes(b"a"), None, Revision(2)),
            (bytes(b"b"), Some(bytes(b"2")), Revision(2)),
            (bytes(b"c"), Some(bytes(b"1")), Revision(2)),
        ]
    );
}

#[test]
fn a_transaction_whose_writes_cancel_out_still_uses_its_revision() {
    let mut store = Store::default();
    let fleeting =
        txn(vec![Operation::Put(put(b"k", b"1")), Operation::Get(get(b"k")), Operation::Delete(delete(b"k"))]);
    let answer = apply_txn(&mut store, fleeting);
    assert_eq!(found(&answer, 1).unwrap().mod_revision, 1);
    assert_eq!((store.revision(), store.key_count()), (Revision(1), 0));
}
