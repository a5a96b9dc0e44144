//! Sessions by example: a call is applied once and answered as often as it is repeated.

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, command_reply::Reply};
use d_engine_proto::{ErrorCode, Revision, SessionId, limits};

use super::{apply, apply_at, decode, delete, delete_range, put};
use crate::state_machine::kv::{KvError, Store};

fn register(ttl_ms: u64) -> Command {
    Command::SessionRegister(v1::SessionRegisterRequest { ttl_ms })
}

/// A store with session 1, of a second.
fn store() -> Store {
    let mut store = Store::default();
    let response = v1::SessionRegisterResponse { header: None, session: 1, ttl_ms: 1000 };
    assert_eq!(apply(&mut store, register(1000)).reply, Some(Reply::SessionRegister(response)));
    store
}

fn call(sequence: u64, acknowledged_through: u64, command: Command) -> v1::Command {
    let session = Some(v1::SessionCall { session: 1, sequence, acknowledged_through });
    v1::Command { command: Some(command), session, payload_hash: 7, trace: None }
}

fn put_k() -> Command {
    Command::Put(put(b"k", b"v"))
}

/// Applies a command at the store time of the last entry.
fn answer(store: &mut Store, command: v1::Command) -> Bytes {
    let now = u64::try_from(store.state().store_time.as_millis()).unwrap();
    apply_at(store, now, &[command]).answers.remove(0)
}

fn error(answer: &Bytes) -> (ErrorCode, v1::Outcome) {
    match decode(std::slice::from_ref(answer)).remove(0).reply {
        Some(Reply::Error(error)) => {
            assert!(!error.message.is_empty());
            (ErrorCode::from_number(i32::try_from(error.code).unwrap()).unwrap(), error.outcome())
        }
        other => panic!("{other:?}"),
    }
}

fn is_error(answer: &Bytes) -> bool {
    matches!(decode(std::slice::from_ref(answer))[0].reply, Some(Reply::Error(_)))
}

/// `NOT_APPLIED`, as errors leave it out.
const NOT_APPLIED: v1::Outcome = v1::Outcome::Unspecified;

#[test]
fn a_span_is_handed_out_and_has_no_effect() {
    let span = |id| v1::TraceContext::new([7; 16], [id; 8], 1);
    let under = |trace| v1::Command { trace, ..call(1, 0, put_k()) };
    let (mut traced, mut plain) = (store(), store());
    let with = apply_at(&mut traced, 10, &[under(span(1)), under(span(2))]);
    let without = apply_at(&mut plain, 10, &[under(None), under(None)]);
    assert_eq!(with.answers, without.answers, "the second is a repetition of the first");
    assert_eq!(format!("{:?}", traced.state()), format!("{:?}", plain.state()));
    let handed_out: Vec<_> = with.traced.into_iter().map(|traced| (Some(traced.context), traced.revision)).collect();
    assert_eq!(handed_out, [(span(1), Revision(1)), (span(2), Revision(1))]);
    assert_eq!(without.traced, []);
}

#[test]
fn a_repetition_gets_the_first_answer_byte_by_byte_and_is_not_applied() {
    let mut store = store();
    let commands = [
        put_k(),
        Command::Delete(delete(b"k")),
        put_k(),
        Command::DeleteRange(delete_range(b"", b"")),
        Command::CompareAndSwap(v1::CompareAndSwapRequest { key: Bytes::from_static(b"k"), ..Default::default() }),
        Command::Txn(super::txn(vec![v1::txn_operation::Operation::Delete(delete(b"k"))])),
        Command::LeaseGrant(v1::LeaseGrantRequest { ttl_ms: 100, ..Default::default() }),
        Command::LeaseRevoke(v1::LeaseRevokeRequest { lease: 1, session: None }),
        Command::LeaseRevoke(v1::LeaseRevokeRequest { lease: 1, session: None }),
    ];
    let calls: Vec<_> = (1..).zip(commands).map(|(sequence, command)| call(sequence, 0, command)).collect();
    let first: Vec<_> = calls.iter().map(|call| answer(&mut store, call.clone())).collect();
    assert!(is_error(&first[8]), "a refusal is an answer too");
    let revision = store.revision();
    apply(&mut store, Command::LeaseGrant(v1::LeaseGrantRequest { ttl_ms: 100, lease: 1, session: None }));
    let again: Vec<_> = calls.iter().rev().map(|call| answer(&mut store, call.clone())).collect();
    assert!(again.iter().rev().eq(&first));
    assert_eq!((store.revision(), store.lease_count()), (revision, 1));
}

#[test]
fn sequences_arrive_in_any_order_within_the_window() {
    let mut store = store();
    let last = limits::SESSION_WINDOW_CALLS;
    for sequence in [last, 2, 1, 3] {
        assert!(!is_error(&answer(&mut store, call(sequence, 0, put_k()))));
    }
    let beyond = answer(&mut store, call(last + 1, 0, put_k()));
    assert_eq!(error(&beyond), (ErrorCode::ResourceExhausted, NOT_APPLIED));
    assert!(!is_error(&answer(&mut store, call(last + 1, 1, put_k()))), "the window moves with what is acknowledged");
    assert_eq!(store.revision(), Revision(5));
}

#[test]
fn what_is_acknowledged_is_forgotten_by_the_greatest_sequence_told() {
    let mut store = store();
    for sequence in 1..=3 {
        answer(&mut store, call(sequence, 0, put_k()));
    }
    assert!(!is_error(&answer(&mut store, call(3, 2, put_k()))), "the repetition acknowledges the others");
    for (sequence, acknowledged_through) in [(1, 0), (2, 0), (4, 4), (4, 0)] {
        let gone = answer(&mut store, call(sequence, acknowledged_through, put_k()));
        assert_eq!(error(&gone), (ErrorCode::AlreadyAcknowledged, v1::Outcome::Unknown), "{sequence}");
    }
    assert!(!is_error(&answer(&mut store, call(5, 1, put_k()))), "what was told once is not taken back");
    assert_eq!(error(&answer(&mut store, call(3, 0, put_k()))).0, ErrorCode::AlreadyAcknowledged);
    assert_eq!(store.revision(), Revision(4));
}

#[test]
fn a_sequence_stands_for_one_command() {
    let mut store = store();
    let first = answer(&mut store, call(1, 0, put_k()));
    let other = v1::Command { payload_hash: 8, ..call(1, 0, put_k()) };
    assert_eq!(error(&answer(&mut store, other)), (ErrorCode::InvalidArgument, NOT_APPLIED));
    assert_eq!(answer(&mut store, call(1, 0, put_k())), first);
    let zero = answer(&mut store, call(0, 0, put_k()));
    assert_eq!(error(&zero), (ErrorCode::InvalidArgument, NOT_APPLIED));
}

#[test]
fn of_an_answer_that_is_too_large_it_is_known_that_it_was_applied() {
    let mut store = store();
    let large = vec![b'v'; usize::try_from(limits::SESSION_ANSWER_BYTES_MAX).unwrap()];
    apply(&mut store, Command::Put(put(b"k", &large)));
    let delete = || call(1, 0, Command::Delete(v1::DeleteRequest { return_previous: true, ..delete(b"k") }));
    assert!(!is_error(&answer(&mut store, delete())));
    let again = answer(&mut store, delete());
    assert_eq!(error(&again), (ErrorCode::AlreadyAcknowledged, v1::Outcome::Applied));
    let other = answer(&mut store, v1::Command { payload_hash: 8, ..delete() });
    assert_eq!(error(&other), (ErrorCode::InvalidArgument, NOT_APPLIED));
}

#[test]
fn a_session_that_keeps_too_many_bytes_takes_no_further_call_until_some_are_acknowledged() {
    let mut store = store();
    let value = vec![b'v'; usize::try_from(limits::SESSION_ANSWER_BYTES_MAX).unwrap() - 100];
    apply(&mut store, Command::Put(put(b"k", &value)));
    let swap = |sequence, acknowledged_through| {
        let key = Bytes::from_static(b"k");
        let swap = v1::CompareAndSwapRequest { key, expected: None, ..Default::default() };
        call(sequence, acknowledged_through, Command::CompareAndSwap(swap))
    };
    let mut sequence = 1;
    while !is_error(&answer(&mut store, swap(sequence, 0))) {
        sequence += 1;
    }
    // Each answer has almost the bytes of the largest, and there must be room for another one.
    assert_eq!(sequence - 1, limits::SESSION_ANSWERS_BYTES_MAX / limits::SESSION_ANSWER_BYTES_MAX);
    let refused = answer(&mut store, swap(sequence, 0));
    assert_eq!(error(&refused), (ErrorCode::ResourceExhausted, NOT_APPLIED));
    assert!(!is_error(&answer(&mut store, swap(1, 0))), "repetitions are answered");
    assert!(!is_error(&answer(&mut store, swap(sequence, 1))));
}

#[test]
fn a_session_lives_on_with_every_call_and_expires_without() {
    let mut store = store();
    apply_at(&mut store, 900, &[call(1, 0, put_k())]);
    apply_at(&mut store, 1800, &[call(1, 0, put_k())]);
    apply_at(&mut store, 2700, &[call(9999, 0, put_k())]);
    apply_at(&mut store, 3699, &[]);
    assert_eq!(store.session_count(), 1);
    let effects = apply_at(&mut store, 3700, &[call(1, 0, put_k())]);
    assert_eq!(error(&effects.answers[0]), (ErrorCode::SessionExpired, NOT_APPLIED));
    assert_eq!((store.session_count(), store.due(), store.revision()), (0, None, Revision(1)));
}

#[test]
fn sessions_are_renewed_and_closed() {
    let mut store = store();
    let renew = || v1::Command::from(Command::SessionRenew(v1::SessionRenewRequest { session: 1 }));
    let close = || v1::Command::from(Command::SessionClose(v1::SessionCloseRequest { session: 1 }));
    let renewed = Reply::SessionRenew(v1::SessionRenewResponse { header: None, ttl_ms: 1000 });
    assert_eq!(decode(&apply_at(&mut store, 900, &[renew()]).answers)[0].reply, Some(renewed));
    apply_at(&mut store, 1899, &[]);
    assert_eq!(store.session_count(), 1);
    for _ in 0..2 {
        let closed = decode(&[answer(&mut store, close())]).remove(0).reply;
        assert_eq!(closed, Some(Reply::SessionClose(v1::SessionCloseResponse::default())));
        assert_eq!(store.session_count(), 0);
    }
    assert_eq!(error(&answer(&mut store, renew())), (ErrorCode::SessionExpired, NOT_APPLIED));
    let next = v1::SessionRegisterResponse { header: None, session: 2, ttl_ms: 60_000 };
    assert_eq!(apply(&mut store, register(0)).reply, Some(Reply::SessionRegister(next)));
    assert_eq!(store.revision(), Revision(0));
}

#[test]
fn there_are_no_more_sessions_than_the_bound() {
    let mut store = Store::default();
    let registers: Vec<_> = (0..=limits::SESSIONS_MAX).map(|_| v1::Command::from(register(1000))).collect();
    let effects = apply_at(&mut store, 0, &registers);
    let (last, others) = effects.answers.split_last().unwrap();
    assert_eq!(error(last), (ErrorCode::ResourceExhausted, NOT_APPLIED));
    assert!(!others.iter().any(is_error));
    answer(&mut store, v1::Command::from(Command::SessionClose(v1::SessionCloseRequest { session: 1 })));
    let next = decode(&[answer(&mut store, v1::Command::from(register(1000)))]).remove(0).reply;
    let session = limits::SESSIONS_MAX + 1;
    let response = v1::SessionRegisterResponse { header: None, session, ttl_ms: 1000 };
    assert_eq!(next, Some(Reply::SessionRegister(response)), "no id is given twice or lost");
    assert_eq!(KvError::SessionExpired { session: SessionId(1) }.outcome(), v1::Outcome::NotApplied);
}
