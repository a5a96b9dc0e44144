//! The bound of an answer, whatever it is put together from: what just fits, and what is refused without a trace.

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, command_reply::Reply, txn_operation::Operation};
use d_engine_proto::{ErrorCode, limits};
use prost::Message;

use super::ranges::Both;
use super::{apply, contents, decode, delete, delete_range, entry, get, put, range, txn};
use crate::state_machine::kv::{KvError, ReadError, Store};

/// Three keys that fill an answer to its last byte, and a number of bytes more.
fn pairs(bytes_more: usize) -> Vec<(Bytes, Bytes)> {
    let max = usize::try_from(limits::ANSWER_BYTES_MAX).unwrap();
    let value = |bytes| Bytes::from(vec![b'v'; bytes]);
    let kv = |value| v1::KeyValue {
        key: Bytes::from_static(b"k"),
        value,
        create_revision: 1,
        mod_revision: 1,
        version: 1,
        lease: 0,
    };
    let third = max / 3;
    let two = v1::GetManyResponse { header: None, kvs: vec![kv(value(third)), kv(value(third))] }.encoded_len();
    let rest = third + max - two - two / 2 + bytes_more;
    vec![
        (Bytes::from_static(b"a"), value(third)),
        (Bytes::from_static(b"b"), value(third)),
        (Bytes::from_static(b"c"), value(rest)),
    ]
}

fn store(pairs: &[(Bytes, Bytes)]) -> Store {
    let mut store = Store::default();
    for (key, value) in pairs {
        apply(&mut store, Command::Put(put(key, value)));
    }
    store
}

fn refused<T>(answer: Result<T, ReadError>) -> KvError {
    match answer {
        Err(ReadError::Refused(refusal)) => refusal,
        _ => panic!("it must be refused"),
    }
}

/// Ways to read the three keys in one transaction.
fn reads() -> Vec<Vec<Operation>> {
    let nest = |operations| Operation::Txn(txn(operations));
    let get = |key| Operation::Get(get(key));
    vec![
        vec![get(b"a"), get(b"b"), get(b"c")],
        vec![get(b"a"), Operation::Range(range(b"b", b"c")), get(b"c")],
        vec![get(b"a"), nest(vec![get(b"b"), nest(vec![get(b"c")])])],
    ]
}

/// Ways to write the three keys and have what they held before in one answer.
fn writes() -> Vec<Vec<Operation>> {
    let put = |key| Operation::Put(v1::PutRequest { return_previous: true, ..put(key, b"") });
    let delete = |key| Operation::Delete(v1::DeleteRequest { return_previous: true, ..delete(key) });
    let delete_range = |start, end| {
        Operation::DeleteRange(v1::DeleteRangeRequest { return_previous: true, ..delete_range(start, end) })
    };
    vec![
        vec![put(b"a"), put(b"b"), put(b"c")],
        vec![delete(b"c"), delete(b"b"), delete(b"a")],
        vec![delete_range(b"", b"d")],
        vec![put(b"a"), Operation::Txn(txn(vec![delete(b"b"), delete_range(b"c", b"d")]))],
    ]
}

#[test]
fn get_many_answers_up_to_the_bound_and_names_it_beyond() {
    let request = v1::GetManyRequest { keys: [&b"a"[..], b"b", b"c"].map(Bytes::from_static).to_vec(), read: None };
    let both = Both::new(&pairs(0));
    let answer = both.memory.get_many(&request).unwrap();
    assert_eq!(answer.encoded_len() as u64, limits::ANSWER_BYTES_MAX);
    assert!(both.past.get_many(&request).unwrap() == answer);

    let both = Both::new(&pairs(1));
    let refusal = both.memory.get_many(&request).unwrap_err();
    assert_eq!(refused(both.past.get_many(&request)), refusal);
    assert_eq!((&refusal, refusal.code()), (&KvError::AnswerTooLarge, ErrorCode::InvalidArgument));
    let message = refusal.to_string();
    assert!(message.contains("4128768 bytes (answer_bytes_max): ask for fewer keys"), "{message}");
}

#[test]
fn what_a_transaction_reads_is_bounded_together() {
    let (fits, too_large) = (Both::new(&pairs(0)), Both::new(&pairs(1)));
    for reads in reads() {
        let request = txn(reads);
        let answer = fits.memory.txn(&request).unwrap();
        assert!(answer.encoded_len() as u64 > limits::ANSWER_BYTES_MAX, "headers of fields come on top");
        assert!(answer.encoded_len() < 4 << 20);
        assert!(fits.past.txn(&request).unwrap() == answer);
        assert_eq!(too_large.memory.txn(&request).err(), Some(KvError::AnswerTooLarge));
        assert_eq!(refused(too_large.past.txn(&request)), KvError::AnswerTooLarge);
    }
}

#[test]
fn a_transaction_that_would_answer_too_much_changes_nothing() {
    let (fits, too_large) = (store(&pairs(0)), store(&pairs(1)));
    let before = contents(&too_large);
    let changed = || Operation::Put(put(b"z", b"1"));
    for operations in reads().into_iter().chain(writes()) {
        let command = Command::Txn(txn([vec![changed()], operations].concat()));
        let answer = apply(&mut fits.clone(), command.clone());
        assert!(matches!(answer.reply, Some(Reply::Txn(_))) && answer.revision == 4);

        let mut store = too_large.clone();
        let effects = store.apply(&entry(4, &[v1::Command::from(command)]));
        let refusal = v1::CommandReply { revision: 3, reply: Some(Reply::Error(KvError::AnswerTooLarge.into())) };
        assert_eq!(decode(&effects.answers), [refusal]);
        assert_eq!(effects.changes, []);
        assert!(contents(&store) == before);
    }
}

#[test]
fn deleting_a_range_returns_what_it_held_up_to_the_bound() {
    let delete = Command::DeleteRange(v1::DeleteRangeRequest { return_previous: true, ..delete_range(b"", b"") });
    let Some(Reply::DeleteRange(answer)) = apply(&mut store(&pairs(0)), delete.clone()).reply else { panic!() };
    assert_eq!((answer.deleted, answer.previous.len()), (3, 3));
    let mut store = store(&pairs(1));
    let refused = apply(&mut store, delete);
    assert_eq!(refused.reply, Some(Reply::Error(KvError::AnswerTooLarge.into())));
    assert_eq!((refused.revision, store.key_count()), (3, 3));
    let Some(Reply::DeleteRange(answer)) = apply(&mut store, Command::DeleteRange(delete_range(b"", b""))).reply else {
        panic!()
    };
    assert_eq!((answer.deleted, answer.previous), (3, vec![]));
}

#[test]
fn keys_at_which_ranges_continue_take_room_too() {
    let longest = Bytes::from(vec![b'k'; usize::try_from(limits::KEY_BYTES_MAX).unwrap()]);
    let both = Both::new(&[(Bytes::from_static(b"a"), Bytes::new()), (longest, Bytes::new())]);
    let request = |ranges| txn(vec![Operation::Range(v1::RangeRequest { limit: 1, ..range(b"", b"") }); ranges]);
    let most = usize::try_from(limits::ANSWER_BYTES_MAX / limits::KEY_BYTES_MAX).unwrap();
    assert!(both.memory.txn(&request(most - 1)).is_ok() && both.past.txn(&request(most - 1)).is_ok());
    assert_eq!(both.memory.txn(&request(most)).err(), Some(KvError::AnswerTooLarge));
    assert_eq!(refused(both.past.txn(&request(most))), KvError::AnswerTooLarge);
}
