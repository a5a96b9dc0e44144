//! Every rule at the door: what breaks it, the message, and what is just within it.

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, compare, txn_operation::Operation};
use d_engine_proto::{ErrorCode, LeaseId, limits};

use super::{delete, delete_range, get, operations, put, range, txn};
use crate::state_machine::kv::{
    KvError, is_read_only, validate, validate_compact, validate_get, validate_get_many, validate_lease_list,
    validate_lease_renew, validate_lease_time_to_live, validate_range, validate_txn,
};

fn check(command: Command) -> Result<(), KvError> {
    validate(&v1::Command::from(command))
}

fn check_put(put: v1::PutRequest) -> Result<(), KvError> {
    check(Command::Put(put))
}

fn check_txn(txn: v1::TxnRequest) -> Result<(), KvError> {
    assert_eq!(validate_txn(&txn), check(Command::Txn(txn.clone())), "the same as a command");
    validate_txn(&txn)
}

fn compare_version(key: &[u8]) -> v1::Compare {
    v1::Compare { key: Bytes::copy_from_slice(key), relation: 0, target: Some(compare::Target::Version(0)) }
}

fn longest_key() -> Vec<u8> {
    vec![b'k'; usize::try_from(limits::KEY_BYTES_MAX).unwrap()]
}

fn read_at(revision: u64) -> Option<v1::ReadOptions> {
    Some(v1::ReadOptions { revision, ..Default::default() })
}

#[test]
fn keys_have_at_least_one_and_at_most_the_bound_of_bytes_everywhere() {
    let too_long = [longest_key(), vec![b'k']].concat();
    let bad: [(&[u8], &str); 2] =
        [(b"", "is empty: a key has 1 to 65536 bytes"), (&too_long, "has 65537 bytes: a key has 1 to 65536 bytes")];
    for (key, message) in bad {
        let swap = v1::CompareAndSwapRequest { key: Bytes::copy_from_slice(key), ..Default::default() };
        let compare = v1::TxnRequest { compare: vec![compare_version(key)], ..Default::default() };
        let refusals = [
            check_put(put(key, b"")),
            check(Command::Delete(delete(key))),
            check(Command::CompareAndSwap(swap)),
            check_txn(compare),
            check_txn(txn(vec![Operation::Put(put(key, b""))])),
            check_txn(txn(vec![Operation::Get(get(key))])),
            check_txn(txn(vec![Operation::Delete(delete(key))])),
            validate_get(&get(key)),
            validate_get_many(&v1::GetManyRequest { keys: vec![Bytes::copy_from_slice(key)], read: None }),
        ];
        for refusal in refusals {
            let refusal = refusal.unwrap_err();
            assert!(refusal.to_string().ends_with(message), "{refusal}");
            assert_eq!(refusal.code(), ErrorCode::InvalidArgument);
        }
    }
    assert_eq!(check_put(put(&longest_key(), b"")), Ok(()));
    assert_eq!(validate_get(&get(&longest_key())), Ok(()));
}

#[test]
fn a_range_must_be_given_and_end_after_its_start() {
    for (start, end) in [(&b"b"[..], &b"a"[..]), (b"a", b"a"), (b"a\0", b"a")] {
        let refusals = [
            validate_range(&range(start, end)),
            check(Command::DeleteRange(delete_range(start, end))),
            check_txn(txn(vec![Operation::Range(range(start, end))])),
            check_txn(txn(vec![Operation::DeleteRange(delete_range(start, end))])),
        ];
        for refusal in refusals {
            assert!(matches!(refusal, Err(KvError::RangeReversed { .. })), "{refusal:?}");
        }
    }
    let both_ends = validate_range(&range(b"b\xff", b"a")).unwrap_err().to_string();
    assert_eq!(both_ends, r#"range ends at "a", which is not after its start "b\xff""#);

    let missing = Err(KvError::Missing { field: "range" });
    assert_eq!(validate_range(&v1::RangeRequest::default()), missing);
    assert_eq!(check(Command::DeleteRange(v1::DeleteRangeRequest::default())), missing);
    for (start, end) in [(&b""[..], &b""[..]), (b"a", b""), (b"", b"a"), (b"a", b"a\0")] {
        assert_eq!(validate_range(&range(start, end)), Ok(()));
    }
}

#[test]
fn a_long_key_is_cut_in_messages() {
    let message = validate_range(&range(&longest_key(), b"a")).unwrap_err().to_string();
    assert!(message.len() < 200 && message.contains("(65536 bytes)"), "{message}");
}

#[test]
fn options_that_exclude_each_other_and_unknown_numbers_are_refused() {
    let both = v1::RangeRequest { keys_only: true, count_only: true, ..range(b"", b"") };
    assert_eq!(validate_range(&both), Err(KvError::KeysOrCount));
    let order = v1::RangeRequest { order: 2, ..range(b"", b"") };
    assert_eq!(validate_range(&order), Err(KvError::UnknownValue { field: "order", number: 2 }));
    let consistency =
        v1::GetRequest { read: Some(v1::ReadOptions { consistency: 9, ..Default::default() }), ..get(b"a") };
    assert_eq!(validate_get(&consistency), Err(KvError::UnknownValue { field: "consistency", number: 9 }));
    let relation = v1::Compare { relation: 4, ..compare_version(b"a") };
    let relation = check_txn(v1::TxnRequest { compare: vec![relation], ..Default::default() });
    assert_eq!(relation, Err(KvError::UnknownValue { field: "relation", number: 4 }));
}

#[test]
fn what_is_not_there_is_named() {
    assert_eq!(validate(&v1::Command::default()), Err(KvError::Missing { field: "command" }));
    let operation = v1::TxnRequest { then: vec![v1::TxnOperation { operation: None }], ..Default::default() };
    assert_eq!(check_txn(operation), Err(KvError::Missing { field: "operation" }));
    let target = v1::Compare { target: None, ..compare_version(b"a") };
    let target = v1::TxnRequest { compare: vec![target], ..Default::default() };
    assert_eq!(check_txn(target), Err(KvError::Missing { field: "target of a comparison" }));
}

#[test]
fn get_many_is_bounded_in_keys() {
    let request = |keys: u64| v1::GetManyRequest { keys: (0..keys).map(|_| get(b"a").key).collect(), read: None };
    assert_eq!(validate_get_many(&request(limits::GET_MANY_KEYS_MAX)), Ok(()));
    let keys = limits::GET_MANY_KEYS_MAX + 1;
    assert_eq!(validate_get_many(&request(keys)), Err(KvError::TooManyKeys { keys }));
}

#[test]
fn operations_of_a_transaction_are_counted_with_comparisons_and_nested_ones() {
    // A comparison, the nested transaction itself, and within it a comparison and the rest.
    let request = |gets: usize| v1::TxnRequest {
        compare: vec![compare_version(b"a")],
        otherwise: operations(vec![Operation::Txn(v1::TxnRequest {
            compare: vec![compare_version(b"a")],
            then: operations(vec![Operation::Get(get(b"a")); gets]),
            ..Default::default()
        })]),
        ..Default::default()
    };
    let most = usize::try_from(limits::TXN_OPERATIONS_MAX).unwrap();
    assert_eq!(check_txn(request(most - 3)), Ok(()));
    let refusal = check_txn(request(most - 2)).unwrap_err();
    assert_eq!(refusal, KvError::TooManyOperations { operations: limits::TXN_OPERATIONS_MAX + 1 });
    assert!(refusal.to_string().contains("129 operations"), "{refusal}");
}

#[test]
fn nesting_is_bounded() {
    let nested =
        |depth: u64| (1..depth).fold(txn(vec![Operation::Get(get(b"a"))]), |inner, _| txn(vec![Operation::Txn(inner)]));
    assert_eq!(check_txn(nested(limits::TXN_DEPTH_MAX)), Ok(()));
    assert_eq!(check_txn(nested(limits::TXN_DEPTH_MAX + 1)), Err(KvError::NestedTooDeep));
}

#[test]
fn two_puts_of_a_key_are_refused_unless_only_one_can_take_effect() {
    let put_a = || Operation::Put(put(b"a", b""));
    let put_b = || Operation::Put(put(b"b", b""));
    let either = || {
        let (then, otherwise) = (operations(vec![put_a()]), operations(vec![put_a(), put_b()]));
        Operation::Txn(v1::TxnRequest { then, otherwise, ..Default::default() })
    };
    let refused = [
        vec![put_a(), put_a()],
        vec![put_a(), Operation::Delete(delete(b"a")), put_a()],
        vec![put_a(), either()],
        vec![put_b(), either()],
        vec![either(), either()],
        vec![either(), Operation::Txn(txn(vec![Operation::Txn(txn(vec![put_b()]))]))],
    ];
    for branch in refused {
        let refusal = check_txn(txn(branch.clone()));
        assert!(matches!(refusal, Err(KvError::TwoPuts { .. })), "{branch:?}");
        let otherwise = v1::TxnRequest { otherwise: operations(branch), ..Default::default() };
        assert_eq!(check_txn(otherwise), refusal);
    }
    assert_eq!(check_txn(txn(vec![put_a(), put_a()])).unwrap_err().to_string(), r#"the transaction puts "a" twice"#);

    let both_branches = v1::TxnRequest {
        then: operations(vec![put_a(), put_b()]),
        otherwise: operations(vec![either()]),
        ..Default::default()
    };
    assert_eq!(check_txn(both_branches), Ok(()));
    assert_eq!(check_txn(txn(vec![Operation::Delete(delete(b"a")), put_a(), Operation::Delete(delete(b"a"))])), Ok(()));
}

#[test]
fn read_options_belong_to_reads_that_stand_alone() {
    let past_get = || Operation::Get(v1::GetRequest { read: read_at(1), ..get(b"a") });
    let past_range = Operation::Range(v1::RangeRequest { read: read_at(1), ..range(b"", b"") });
    let past_txn = Operation::Txn(v1::TxnRequest { read: read_at(1), ..Default::default() });
    for misplaced in [past_get(), past_range, past_txn, Operation::Txn(txn(vec![past_get()]))] {
        assert_eq!(check_txn(txn(vec![misplaced])), Err(KvError::MisplacedReadOptions));
    }
    let writes = v1::TxnRequest { read: read_at(1), ..txn(vec![Operation::Put(put(b"a", b""))]) };
    assert_eq!(check_txn(writes), Err(KvError::MisplacedReadOptions));

    let reads = v1::TxnRequest { read: read_at(1), ..txn(vec![Operation::Get(get(b"a"))]) };
    assert_eq!(validate_txn(&reads), Ok(()));
    assert_eq!(check(Command::Txn(reads)), Err(KvError::MisplacedReadOptions));
    let says_nothing = Operation::Get(v1::GetRequest { read: read_at(0), ..get(b"a") });
    assert_eq!(check_txn(txn(vec![says_nothing])), Ok(()));
}

#[test]
fn a_key_is_attached_to_one_lease_and_times_to_live_have_bounds() {
    let both = v1::PutRequest { lease: 7, ttl_ms: 100, ..put(b"a", b"") };
    assert_eq!(check_put(both.clone()), Err(KvError::LeaseAndTtl));
    assert_eq!(check_txn(txn(vec![Operation::Put(both)])), Err(KvError::LeaseAndTtl));
    let with_ttl = |ttl_ms| check_put(v1::PutRequest { ttl_ms, ..put(b"a", b"") });
    let grant = |ttl_ms, lease| check(Command::LeaseGrant(v1::LeaseGrantRequest { ttl_ms, lease, session: None }));
    let register = |ttl_ms| check(Command::SessionRegister(v1::SessionRegisterRequest { ttl_ms }));
    let (min, max) = (limits::LEASE_TTL_MS_MIN, limits::LEASE_TTL_MS_MAX);
    for ttl_ms in [0, min, max] {
        assert_eq!(with_ttl(ttl_ms), Ok(()));
        assert_eq!(grant(ttl_ms, 0).is_ok(), ttl_ms != 0, "a grant without a time to live means nothing");
    }
    for ttl_ms in [min - 1, max + 1] {
        let refused = Err(KvError::TtlOutOfBounds { ttl_ms, min_ms: min, max_ms: max });
        assert_eq!((with_ttl(ttl_ms), grant(ttl_ms, 0)), (refused.clone(), refused));
    }
    let (min, max) = (limits::SESSION_TTL_MS_MIN, limits::SESSION_TTL_MS_MAX);
    for (ttl_ms, fits) in [(0, true), (min - 1, false), (min, true), (max, true), (max + 1, false)] {
        assert_eq!(register(ttl_ms).is_ok(), fits, "{ttl_ms}");
    }
    assert_eq!(grant(100, u64::MAX / 2), Ok(()));
    let lease = u64::MAX / 2 + 1;
    assert_eq!(grant(100, lease), Err(KvError::LeaseIdTooLarge { lease: LeaseId(lease) }));
}

#[test]
fn leases_and_sessions_are_named() {
    let missing = |field| Err(KvError::Missing { field });
    assert_eq!(check(Command::LeaseRevoke(v1::LeaseRevokeRequest::default())), missing("lease"));
    assert_eq!(validate_lease_renew(&v1::LeaseRenewRequest::default()), missing("lease"));
    assert_eq!(validate_lease_time_to_live(&v1::LeaseTimeToLiveRequest::default()), missing("lease"));
    assert_eq!(check(Command::SessionRenew(v1::SessionRenewRequest::default())), missing("session"));
    assert_eq!(check(Command::SessionClose(v1::SessionCloseRequest::default())), missing("session"));
    assert_eq!(validate_compact(&v1::CompactRequest::default()), missing("target"));
}

#[test]
fn leases_are_read_as_of_now() {
    let time_to_live = |read| validate_lease_time_to_live(&v1::LeaseTimeToLiveRequest { lease: 1, keys: true, read });
    let list = |read| validate_lease_list(&v1::LeaseListRequest { read, ..Default::default() });
    assert_eq!((time_to_live(read_at(1)), list(read_at(1))), (Err(KvError::PastLeases), Err(KvError::PastLeases)));
    assert_eq!((time_to_live(read_at(0)), list(None)), (Ok(()), Ok(())));
}

#[test]
fn a_session_belongs_beside_a_command_that_may_be_repeated() {
    let call = |session, sequence| Some(v1::SessionCall { session, sequence, acknowledged_through: 0 });
    let under = |command, session| validate(&v1::Command { command: Some(command), session, ..v1::Command::default() });
    let put_a = || Command::Put(put(b"a", b""));
    assert_eq!(under(put_a(), call(1, 1)), Ok(()));
    assert_eq!(under(put_a(), call(0, 1)), Err(KvError::Missing { field: "session" }));
    assert_eq!(under(put_a(), call(1, 0)), Err(KvError::Missing { field: "sequence" }));
    let repeatable = [
        Command::LeaseGrant(v1::LeaseGrantRequest { ttl_ms: 100, ..Default::default() }),
        Command::LeaseRevoke(v1::LeaseRevokeRequest { lease: 1, session: None }),
    ];
    for command in repeatable {
        assert_eq!(under(command, call(1, 1)), Ok(()));
    }
    let target = Some(v1::compact_request::Target::Revision(1));
    let others = [
        Command::LeaseRenewals(v1::LeaseRenewals::default()),
        Command::SessionRegister(v1::SessionRegisterRequest::default()),
        Command::SessionRenew(v1::SessionRenewRequest { session: 1 }),
        Command::SessionClose(v1::SessionCloseRequest { session: 1 }),
        Command::Compact(v1::CompactRequest { target }),
        Command::Tick(v1::Tick {}),
    ];
    for command in others {
        assert_eq!(under(command.clone(), call(1, 1)), Err(KvError::MisplacedSession));
        assert_eq!(under(command, None), Ok(()));
    }

    let session = call(1, 1);
    let within = [
        Operation::Put(v1::PutRequest { session, ..put(b"a", b"") }),
        Operation::Delete(v1::DeleteRequest { session, ..delete(b"a") }),
        Operation::DeleteRange(v1::DeleteRangeRequest { session, ..delete_range(b"", b"") }),
        Operation::Txn(v1::TxnRequest { session, ..Default::default() }),
    ];
    for operation in within {
        assert_eq!(check_txn(txn(vec![operation.clone()])), Err(KvError::MisplacedSession));
        assert_eq!(check_txn(txn(vec![Operation::Txn(txn(vec![operation]))])), Err(KvError::MisplacedSession));
    }
    let left_in_the_request = check_put(v1::PutRequest { session, ..put(b"a", b"") });
    assert_eq!(left_in_the_request, Err(KvError::MisplacedSession));
}

#[test]
fn a_transaction_is_read_only_when_no_branch_can_write() {
    let nest = |operation: Operation| txn(vec![Operation::Txn(txn(vec![operation]))]);
    let delete_all = delete_range(b"", b"");
    assert!(is_read_only(&v1::TxnRequest::default()));
    assert!(is_read_only(&nest(Operation::Get(get(b"a")))));
    assert!(is_read_only(&nest(Operation::Range(range(b"", b"")))));
    for write in [Operation::Put(put(b"a", b"")), Operation::Delete(delete(b"a")), Operation::DeleteRange(delete_all)] {
        assert!(!is_read_only(&nest(write.clone())));
        assert!(!is_read_only(&v1::TxnRequest { otherwise: operations(vec![write]), ..Default::default() }));
    }
}
