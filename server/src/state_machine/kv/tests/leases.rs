//! Leases by example: what attaches a key, what detaches it, when it ends.

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, command_reply::Reply, txn_operation::Operation, txn_result};
use d_engine_proto::{ErrorCode, LeaseId, Revision};

use super::{apply, apply_at, apply_txn, decode, delete, delete_range, get, put, range, txn};
use crate::limits::EXPIRIES_PER_ENTRY_MAX;
use crate::state_machine::StoreTime;
use crate::state_machine::kv::{KvError, Store};

fn grant(lease: u64, ttl_ms: u64) -> Command {
    Command::LeaseGrant(v1::LeaseGrantRequest { ttl_ms, lease, session: None })
}

fn revoke(lease: u64) -> Command {
    Command::LeaseRevoke(v1::LeaseRevokeRequest { lease, session: None })
}

fn renew(leases: &[u64]) -> Command {
    Command::LeaseRenewals(v1::LeaseRenewals { leases: leases.to_vec() })
}

fn leased(key: &[u8], lease: u64) -> v1::PutRequest {
    v1::PutRequest { lease, ..put(key, b"v") }
}

fn with_ttl(key: &[u8], ttl_ms: u64) -> v1::PutRequest {
    v1::PutRequest { ttl_ms, ..put(key, b"v") }
}

fn granted(reply: v1::CommandReply) -> u64 {
    match reply.reply {
        Some(Reply::LeaseGrant(grant)) => grant.lease,
        other => panic!("{other:?}"),
    }
}

fn lease_of(reply: v1::CommandReply) -> u64 {
    match reply.reply {
        Some(Reply::Put(put)) => put.lease,
        other => panic!("{other:?}"),
    }
}

fn refusal(error: KvError) -> Option<Reply> {
    Some(Reply::Error(error.into()))
}

fn keys_of(store: &Store, lease: u64) -> Vec<Bytes> {
    store.lease(LeaseId(lease)).map(|lease| lease.keys().cloned().collect()).unwrap_or_default()
}

fn exists(store: &Store, key: &[u8]) -> bool {
    store.get(&get(key)).unwrap().kv.is_some()
}

fn tick(store: &mut Store, milliseconds: u64) {
    apply_at(store, milliseconds, &[v1::Command::from(Command::Tick(v1::Tick {}))]);
}

#[test]
fn ids_are_counted_and_one_that_was_chosen_is_never_given() {
    let mut store = Store::default();
    assert_eq!(granted(apply(&mut store, grant(0, 100))), 1);
    assert_eq!(granted(apply(&mut store, grant(7, 100))), 7);
    assert_eq!(granted(apply(&mut store, grant(3, 100))), 3);
    apply(&mut store, revoke(7));
    assert_eq!(granted(apply(&mut store, grant(0, 100))), 8);
    let taken = apply(&mut store, grant(3, 100));
    assert_eq!(taken.reply, refusal(KvError::LeaseExists { lease: LeaseId(3) }));
    assert_eq!(KvError::LeaseExists { lease: LeaseId(3) }.code(), ErrorCode::LeaseExists);
    assert_eq!(granted(apply(&mut store, grant(7, 100))), 7, "free again");
    assert_eq!(store.leases(LeaseId(1)).map(|lease| lease.id.get()).collect::<Vec<_>>(), [3, 7, 8]);
    assert_eq!(store.revision(), Revision(0));
}

#[test]
fn revoking_a_lease_deletes_its_keys_in_byte_order_as_one_revision() {
    let mut store = Store::default();
    apply(&mut store, grant(0, 100));
    for key in [&b"b"[..], b"a", b"c"] {
        apply(&mut store, Command::Put(leased(key, 1)));
    }
    apply(&mut store, Command::Put(put(b"free", b"v")));
    assert_eq!(keys_of(&store, 1), ["a", "b", "c"]);
    let effects = apply_at(&mut store, 10, &[v1::Command::from(revoke(1))]);
    let answer = v1::LeaseRevokeResponse { header: None, deleted: 3 };
    assert_eq!(decode(&effects.answers)[0], v1::CommandReply { revision: 5, reply: Some(Reply::LeaseRevoke(answer)) });
    let changes: Vec<_> = effects.changes.iter().map(|change| (&change.key[..], change.revision.get())).collect();
    assert_eq!(changes, [(&b"a"[..], 5), (b"b", 5), (b"c", 5)]);
    assert!(effects.changes.iter().all(|change| change.after.is_none() && change.before.is_some()));
    assert_eq!((store.key_count(), store.lease_count(), store.due()), (1, 0, None));
    let again = apply(&mut store, revoke(1));
    assert_eq!(again.reply, refusal(KvError::LeaseNotFound { lease: LeaseId(1) }));
}

#[test]
fn revoking_a_lease_without_keys_raises_no_revision() {
    let mut store = Store::default();
    apply(&mut store, grant(0, 100));
    assert_eq!(apply(&mut store, revoke(1)).revision, 0);
}

#[test]
fn a_lease_ends_when_its_time_to_live_is_over_and_not_before() {
    let mut store = Store::default();
    apply_at(&mut store, 1000, &[grant(0, 100), Command::Put(leased(b"k", 1))].map(v1::Command::from));
    let view = store.lease(LeaseId(1)).unwrap();
    assert_eq!((view.ttl.as_millis(), view.deadline, view.key_count), (100, StoreTime::default().after_ms(1100), 1));
    assert_eq!(store.due(), Some(view.deadline));
    tick(&mut store, 1099);
    assert!(exists(&store, b"k"));
    // It is gone before the commands of the entry are applied.
    let effects = apply_at(&mut store, 1100, &[v1::Command::from(Command::Put(put(b"k", b"new")))]);
    let changes: Vec<_> =
        effects.changes.iter().map(|change| (change.revision.get(), change.after.is_some())).collect();
    assert_eq!(changes, [(2, false), (3, true)]);
    assert_eq!((store.due(), store.lease_count()), (None, 0));
}

#[test]
fn a_renewal_gives_the_full_time_to_live_and_names_leases_that_are_gone() {
    let mut store = Store::default();
    apply_at(&mut store, 0, &[grant(0, 100), grant(0, 200)].map(v1::Command::from));
    let effects = apply_at(&mut store, 90, &[v1::Command::from(renew(&[2, 9, 1, 1]))]);
    let renewed = v1::LeaseRenewed { ttl_ms: vec![200, 0, 100, 100] };
    assert_eq!(decode(&effects.answers)[0].reply, Some(Reply::LeaseRenewed(renewed)));
    tick(&mut store, 189);
    assert_eq!(store.lease_count(), 2);
    let effects = apply_at(&mut store, 190, &[v1::Command::from(renew(&[1, 2]))]);
    let renewed = v1::LeaseRenewed { ttl_ms: vec![0, 200] };
    assert_eq!(decode(&effects.answers)[0].reply, Some(Reply::LeaseRenewed(renewed)));
}

#[test]
fn what_is_due_ends_in_the_order_of_deadlines_then_ids_each_as_one_revision() {
    let mut store = Store::default();
    let opened = [grant(5, 300), grant(4, 300), grant(6, 200)].map(v1::Command::from);
    let attached =
        [(&b"a"[..], 5), (b"z", 4), (b"b", 4), (b"y", 6)].map(|(key, lease)| Command::Put(leased(key, lease)));
    apply_at(&mut store, 0, &opened);
    apply_at(&mut store, 0, &attached.map(v1::Command::from));
    let effects = apply_at(&mut store, 5000, &[]);
    let changes: Vec<_> = effects.changes.iter().map(|change| (change.revision.get(), &change.key[..])).collect();
    assert_eq!(changes, [(5, &b"y"[..]), (6, b"b"), (6, b"z"), (7, b"a")]);
}

#[test]
fn an_entry_ends_only_so_much_and_the_next_goes_on() {
    let mut store = Store::default();
    let leases = 2 * EXPIRIES_PER_ENTRY_MAX + 500;
    let puts: Vec<_> = (0..leases as u64)
        .map(|number| v1::Command::from(Command::Put(with_ttl(&number.to_be_bytes(), 100))))
        .collect();
    apply_at(&mut store, 0, &puts);
    let mut left = vec![];
    for _ in 0..4 {
        let effects = apply_at(&mut store, 100, &[v1::Command::from(Command::Put(put(b"other", b"")))]);
        assert_eq!(decode(&effects.answers).len(), 1, "commands are applied all the same");
        left.push(store.lease_count());
        assert_eq!(store.due().is_some(), store.lease_count() > 0);
    }
    assert_eq!(left, [1500, 500, 0, 0]);
    assert_eq!(store.revision(), Revision(leases as u64 * 2 + 4));
}

#[test]
fn a_put_without_a_lease_or_with_another_one_detaches_the_key() {
    let mut store = Store::default();
    apply(&mut store, grant(0, 100));
    apply(&mut store, grant(0, 100));
    assert_eq!(lease_of(apply(&mut store, Command::Put(leased(b"k", 1)))), 1);
    assert_eq!(lease_of(apply(&mut store, Command::Put(leased(b"k", 2)))), 2);
    assert_eq!((keys_of(&store, 1), keys_of(&store, 2)), (vec![], vec![Bytes::from("k")]));
    assert_eq!(lease_of(apply(&mut store, Command::Put(put(b"k", b"")))), 0);
    assert_eq!(store.lease(LeaseId(2)).unwrap().key_count, 0);
    apply(&mut store, Command::Put(leased(b"k", 1)));
    apply(&mut store, Command::Delete(delete(b"k")));
    assert_eq!((keys_of(&store, 1), store.lease_count()), (vec![], 2));
}

#[test]
fn a_time_to_live_is_a_lease_that_ends_with_the_next_put_or_deletion() {
    let mut store = Store::default();
    assert_eq!(lease_of(apply(&mut store, Command::Put(with_ttl(b"a", 100)))), 1);
    assert_eq!(store.get(&get(b"a")).unwrap().kv.unwrap().lease, 1);
    assert_eq!(store.leases(LeaseId(0)).count(), 0, "not listed");
    assert_eq!(lease_of(apply(&mut store, Command::Put(with_ttl(b"a", 100)))), 2);
    assert!(store.lease(LeaseId(1)).is_none() && store.lease(LeaseId(2)).is_some());
    apply(&mut store, Command::Put(put(b"a", b"")));
    assert_eq!((store.lease_count(), store.due()), (0, None));

    apply(&mut store, Command::Put(with_ttl(b"b", 100)));
    apply(&mut store, Command::Put(with_ttl(b"c", 100)));
    apply(&mut store, Command::Delete(delete(b"b")));
    apply(&mut store, Command::DeleteRange(delete_range(b"c", b"")));
    assert_eq!((store.lease_count(), store.due()), (0, None));

    apply_at(&mut store, 1000, &[v1::Command::from(Command::Put(with_ttl(b"a", 100)))]);
    tick(&mut store, 1099);
    assert!(exists(&store, b"a"));
    tick(&mut store, 1100);
    assert!(!exists(&store, b"a"));
}

#[test]
fn no_other_key_is_attached_to_the_lease_of_a_time_to_live() {
    let mut store = Store::default();
    apply(&mut store, Command::Put(with_ttl(b"a", 100)));
    for key in [b"a", b"b"] {
        let refused = apply(&mut store, Command::Put(leased(key, 1)));
        assert_eq!(refused.reply, refusal(KvError::LeaseNotFound { lease: LeaseId(1) }));
    }
    let renewed = apply(&mut store, renew(&[1])).reply;
    assert_eq!(renewed, Some(Reply::LeaseRenewed(v1::LeaseRenewed { ttl_ms: vec![100] })));
    assert_eq!(apply(&mut store, grant(1, 100)).reply, refusal(KvError::LeaseExists { lease: LeaseId(1) }));
    apply(&mut store, revoke(1));
    assert!(!exists(&store, b"a"));
}

#[test]
fn an_unknown_lease_refuses_the_command_and_nothing_changes() {
    let mut store = Store::default();
    apply(&mut store, grant(0, 100));
    apply(&mut store, Command::Put(leased(b"a", 1)));
    apply(&mut store, Command::Put(with_ttl(b"b", 100)));
    let before = store.clone();
    let swap = |expected: Option<&'static [u8]>| {
        let expected = expected.map(Bytes::from_static);
        let key = Bytes::from_static(b"a");
        Command::CompareAndSwap(v1::CompareAndSwapRequest { key, expected, lease: 9, ..Default::default() })
    };
    let halfway = txn(vec![
        Operation::Put(put(b"a", b"")),
        Operation::Put(with_ttl(b"new", 100)),
        Operation::Delete(delete(b"b")),
        Operation::Txn(txn(vec![Operation::Put(leased(b"c", 9))])),
    ]);
    for command in [Command::Put(leased(b"a", 9)), swap(Some(b"v")), Command::Txn(halfway)] {
        let effects = apply_at(&mut store, 5, &[v1::Command::from(command)]);
        let reply = decode(&effects.answers).remove(0).reply;
        assert_eq!(reply, refusal(KvError::LeaseNotFound { lease: LeaseId(9) }));
        assert!(effects.changes.is_empty() && effects.records.is_empty());
        assert_eq!((keys_of(&store, 1), keys_of(&store, 2)), (vec![Bytes::from("a")], vec![Bytes::from("b")]));
        assert_eq!((store.revision(), store.state().last_lease), (before.revision(), before.state().last_lease));
        assert_eq!(store.range(&range(b"", b"")), before.range(&range(b"", b"")));
    }
    let lost = apply(&mut store, swap(None)).reply;
    assert!(matches!(lost, Some(Reply::CompareAndSwap(_))), "a lost comparison attaches nothing: {lost:?}");
}

#[test]
fn a_transaction_that_fails_for_its_size_takes_its_leases_back() {
    let mut store = Store::default();
    let large = vec![b'v'; 1_400_000];
    for key in [b"a", b"b", b"c"] {
        apply(&mut store, Command::Put(put(key, &large)));
    }
    apply(&mut store, Command::Put(with_ttl(b"t", 60_000)));
    let operations = vec![
        Operation::Put(put(b"t", b"")),
        Operation::Put(with_ttl(b"u", 100)),
        Operation::Get(get(b"a")),
        Operation::Get(get(b"b")),
        Operation::Get(get(b"c")),
    ];
    assert_eq!(apply(&mut store, Command::Txn(txn(operations))).reply, refusal(KvError::AnswerTooLarge));
    assert_eq!((keys_of(&store, 1), store.lease_count()), (vec![Bytes::from("t")], 1));
    assert_eq!(lease_of(apply(&mut store, Command::Put(with_ttl(b"u", 100)))), 2, "its id is free again");
}

#[test]
fn only_the_last_put_of_a_key_in_a_transaction_decides_on_its_lease() {
    let mut store = Store::default();
    let answer = apply_txn(
        &mut store,
        txn(vec![
            Operation::Put(with_ttl(b"a", 100)),
            Operation::Delete(delete(b"a")),
            Operation::Put(with_ttl(b"b", 100)),
        ]),
    );
    let Some(txn_result::Result::Put(second)) = &answer.results[2].result else { panic!("{answer:?}") };
    assert_eq!((second.lease, store.lease_count()), (2, 1));
    assert_eq!(keys_of(&store, 2), ["b"]);
}
