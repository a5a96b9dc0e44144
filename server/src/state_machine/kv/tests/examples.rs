//! Single commands: what they answer, and which of them raise the revision.

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, command_reply::Reply};
use d_engine_proto::{ErrorCode, Revision};
use prost::Message;

use super::{apply, contents, decode, delete, delete_range, entry, get, position, put, range};
use crate::state_machine::kv::{KvError, KvStateMachine, ReadError, ReadPoint, Store};
use crate::state_machine::{CommittedEntry, EntryContent, StateMachine};

fn key_value(key: &'static [u8], value: &'static [u8], revisions: (u64, u64), version: u64) -> v1::KeyValue {
    v1::KeyValue {
        key: Bytes::from_static(key),
        value: Bytes::from_static(value),
        create_revision: revisions.0,
        mod_revision: revisions.1,
        version,
        lease: 0,
    }
}

fn held(store: &Store, key: &[u8]) -> Option<v1::KeyValue> {
    store.get(&get(key)).unwrap().kv
}

fn swap(key: &[u8], expected: Option<&'static [u8]>, value: &'static [u8]) -> Command {
    Command::CompareAndSwap(v1::CompareAndSwapRequest {
        key: Bytes::copy_from_slice(key),
        expected: expected.map(Bytes::from_static),
        value: Bytes::from_static(value),
        ..Default::default()
    })
}

#[test]
fn an_empty_store_has_revision_zero_and_answers_every_read() {
    let store = Store::default();
    assert_eq!((store.revision(), store.compacted(), store.key_count()), (Revision(0), Revision(0), 0));
    assert_eq!(held(&store, b"a"), None);
    let many = v1::GetManyRequest { keys: vec![Bytes::from_static(b"a")], read: None };
    assert_eq!(store.get_many(&many).unwrap().kvs, []);
    let nothing = v1::RangeResponse { count: Some(0), ..Default::default() };
    assert_eq!(store.range(&range(b"", b"")).unwrap(), nothing);
    assert!(store.txn(&v1::TxnRequest::default()).unwrap().succeeded);
    store.validate().unwrap();
}

#[test]
fn a_put_creates_changes_and_after_a_deletion_creates_anew() {
    let mut store = Store::default();
    assert_eq!(apply(&mut store, Command::Put(put(b"other", b""))).revision, 1);

    let created = apply(&mut store, Command::Put(v1::PutRequest { return_previous: true, ..put(b"k", b"1") }));
    assert_eq!(created, v1::CommandReply { revision: 2, reply: Some(Reply::Put(v1::PutResponse::default())) });
    let changed = apply(&mut store, Command::Put(v1::PutRequest { return_previous: true, ..put(b"k", b"2") }));
    let previous = Some(key_value(b"k", b"1", (2, 2), 1));
    assert_eq!(changed.reply, Some(Reply::Put(v1::PutResponse { previous, ..Default::default() })));
    assert_eq!(held(&store, b"k"), Some(key_value(b"k", b"2", (2, 3), 2)));

    let deleted = apply(&mut store, Command::Delete(v1::DeleteRequest { return_previous: true, ..delete(b"k") }));
    let previous = Some(key_value(b"k", b"2", (2, 3), 2));
    let answer = v1::DeleteResponse { header: None, deleted: true, previous };
    assert_eq!(deleted, v1::CommandReply { revision: 4, reply: Some(Reply::Delete(answer)) });
    assert_eq!(held(&store, b"k"), None);

    apply(&mut store, Command::Put(put(b"k", b"3")));
    assert_eq!(held(&store, b"k"), Some(key_value(b"k", b"3", (5, 5), 1)));
    assert_eq!(store.key_count(), 2);
}

#[test]
fn what_changes_nothing_raises_no_revision() {
    let mut store = Store::default();
    apply(&mut store, Command::Put(put(b"k", b"1")));
    let idle = [
        (Command::Delete(delete(b"absent")), Reply::Delete(v1::DeleteResponse::default())),
        (Command::DeleteRange(delete_range(b"l", b"")), Reply::DeleteRange(v1::DeleteRangeResponse::default())),
        (
            swap(b"k", None, b"2"),
            Reply::CompareAndSwap(v1::CompareAndSwapResponse {
                header: None,
                succeeded: false,
                current: Some(key_value(b"k", b"1", (1, 1), 1)),
            }),
        ),
        (swap(b"absent", Some(b""), b"2"), Reply::CompareAndSwap(v1::CompareAndSwapResponse::default())),
    ];
    for (command, reply) in idle {
        assert_eq!(apply(&mut store, command), v1::CommandReply { revision: 1, reply: Some(reply) });
    }
    assert_eq!(contents(&store), [key_value(b"k", b"1", (1, 1), 1)]);
}

#[test]
fn compare_and_swap_writes_when_the_key_is_as_expected() {
    let mut store = Store::default();
    let won = v1::CompareAndSwapResponse { header: None, succeeded: true, current: None };
    for (revision, expected, value) in [(1, None, &b"1"[..]), (2, Some(&b"1"[..]), b"2"), (3, Some(b"2"), b"2")] {
        let reply = Some(Reply::CompareAndSwap(won.clone()));
        assert_eq!(apply(&mut store, swap(b"k", expected, value)), v1::CommandReply { revision, reply });
    }
    assert_eq!(held(&store, b"k"), Some(key_value(b"k", b"2", (1, 3), 3)));
}

#[test]
fn a_range_is_deleted_under_one_revision() {
    let mut store = Store::default();
    for key in [&b"a"[..], b"b", b"b\0", b"c"] {
        apply(&mut store, Command::Put(put(key, b"v")));
    }
    let reply = apply(
        &mut store,
        Command::DeleteRange(v1::DeleteRangeRequest { return_previous: true, ..delete_range(b"b", b"c") }),
    );
    let previous = vec![key_value(b"b", b"v", (2, 2), 1), key_value(b"b\0", b"v", (3, 3), 1)];
    let answer = v1::DeleteRangeResponse { header: None, deleted: 2, previous };
    assert_eq!(reply, v1::CommandReply { revision: 5, reply: Some(Reply::DeleteRange(answer)) });
    assert_eq!(store.key_count(), 2);
}

#[test]
fn get_many_answers_in_the_order_asked_for_and_leaves_out_what_is_not_there() {
    let mut store = Store::default();
    apply(&mut store, Command::Put(put(b"a", b"1")));
    apply(&mut store, Command::Put(put(b"\xff\xfe", b"2")));
    let keys = [&b"\xff\xfe"[..], b"absent", b"a", b"a"].map(Bytes::from_static).to_vec();
    let kvs = store.get_many(&v1::GetManyRequest { keys, read: None }).unwrap().kvs;
    let (first, second) = (key_value(b"\xff\xfe", b"2", (2, 2), 1), key_value(b"a", b"1", (1, 1), 1));
    assert_eq!(kvs, [first, second.clone(), second]);
}

#[test]
fn commands_of_an_entry_fail_independently_and_bytes_that_are_no_command_are_answered() {
    let mut store = Store::default();
    let mut entry = entry(
        1,
        &[
            v1::Command::from(Command::Put(put(b"a", b"1"))),
            v1::Command::from(Command::Put(put(b"", b"1"))),
            v1::Command::default(),
            v1::Command::from(Command::Put(put(b"b", b"2"))),
        ],
    );
    if let EntryContent::Commands { commands, .. } = &mut entry.content {
        commands.insert(1, Bytes::from_static(b"\xff\xff\xff"));
    }
    let replies = decode(&store.apply(&entry).answers);
    assert_eq!(replies.iter().map(|reply| reply.revision).collect::<Vec<_>>(), [1, 1, 1, 1, 2]);
    let refused: Vec<_> = replies.iter().map(|reply| matches!(&reply.reply, Some(Reply::Error(_)))).collect();
    assert_eq!(refused, [false, true, true, true, false]);
    for reply in &replies[1..4] {
        let Some(Reply::Error(error)) = &reply.reply else { panic!("{reply:?}") };
        assert_eq!(error.code, ErrorCode::InvalidArgument.number().unsigned_abs());
    }
    assert_eq!(store.key_count(), 2);
}

#[test]
fn store_time_does_not_go_back() {
    let mut store = Store::default();
    store.apply(&entry(7, &[]));
    let late = store.state().store_time;
    store.apply(&CommittedEntry { position: position(8), content: entry(1, &[]).content });
    assert_eq!(store.state().store_time, late);
}

#[test]
fn what_a_reader_holds_does_not_move() {
    let directory = tempfile::tempdir().unwrap();
    let machine = KvStateMachine::open(directory.path()).unwrap();
    let put_one = |value: &[u8]| v1::Command::from(Command::Put(put(b"k", value)));
    machine.apply(&entry(1, &[put_one(b"1")])).unwrap();
    let before = machine.current();
    machine.apply(&entry(2, &[put_one(b"2")])).unwrap();
    assert_eq!(held(&before, b"k").unwrap().value, "1");
    assert_eq!(held(&machine.current(), b"k").unwrap().value, "2");
}

#[test]
fn revisions_that_cannot_be_read_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let machine = KvStateMachine::open(directory.path()).unwrap();
    assert!(matches!(machine.at(Revision(0)), Ok(ReadPoint::Current(_))));
    let future = |requested, current| KvError::FutureRevision { requested: Revision(requested), current };
    assert_eq!(machine.at(Revision(1)).err(), Some(future(1, Revision(0))));

    let command = v1::Command::from(Command::Put(put(b"k", b"1")));
    machine.apply(&entry(1, &[command.clone(), command])).unwrap();
    assert!(matches!(machine.at(Revision(2)), Ok(ReadPoint::Current(_))));
    assert!(matches!(machine.at(Revision(1)), Ok(ReadPoint::Past(_))));
    let refused = machine.at(Revision(3)).err().unwrap();
    assert_eq!(refused, future(3, Revision(2)));
    assert_eq!((refused.code(), refused.revision()), (ErrorCode::FutureRevision, Some(Revision(2))));
}

#[test]
fn a_past_transaction_that_writes_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let machine = KvStateMachine::open(directory.path()).unwrap();
    let command = v1::Command::from(Command::Put(put(b"k", b"1")));
    machine.apply(&entry(1, &[command.clone(), command])).unwrap();
    machine.flush().unwrap();
    let Ok(ReadPoint::Past(past)) = machine.at(Revision(1)) else { panic!("revision 1 is past") };
    let past = past.wait(std::time::Duration::ZERO).unwrap();
    let writes = super::txn(vec![v1::txn_operation::Operation::Delete(delete(b"k"))]);
    assert!(matches!(past.txn(&writes), Err(ReadError::Refused(KvError::NotReadOnly))));
    assert_eq!(machine.current().txn(&writes), Err(KvError::NotReadOnly));
}

#[test]
fn opaque_queries_are_answered_as_unsupported() {
    let directory = tempfile::tempdir().unwrap();
    let machine = KvStateMachine::open(directory.path()).unwrap();
    let reply = v1::CommandReply::decode(machine.query(Bytes::from_static(b"?")).unwrap()).unwrap();
    let Some(Reply::Error(error)) = reply.reply else { panic!("{reply:?}") };
    assert_eq!(error.code, ErrorCode::Unsupported.number().unsigned_abs());
}

#[test]
fn an_unset_range_does_not_delete_the_store() {
    let mut store = Store::default();
    apply(&mut store, Command::Put(put(b"k", b"1")));
    let reply = apply(&mut store, Command::DeleteRange(v1::DeleteRangeRequest::default()));
    assert!(matches!(reply.reply, Some(Reply::Error(_))));
    assert_eq!(store.key_count(), 1);
    let all = delete_range(b"", b"");
    apply(&mut store, Command::DeleteRange(all));
    assert_eq!(store.key_count(), 0);
}
