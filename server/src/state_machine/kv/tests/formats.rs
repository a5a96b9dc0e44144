//! Commands as earlier versions wrote them to the log, kept beside this file: they are read as what they were.

use d_engine_proto::v1::command::Command;

use super::*;

/// Lines of a name and the bytes in hexadecimal. Never written again: lines are added for what is new.
const COMMANDS_1: &str = include_str!("commands-1.txt");

fn commands() -> Vec<(&'static str, v1::Command)> {
    let key = Bytes::from_static(b"key");
    let value = Bytes::from_static(b"value");
    let session = None;
    let put =
        v1::PutRequest { key: key.clone(), value: value.clone(), lease: 7, return_previous: true, ttl_ms: 0, session };
    let delete = v1::DeleteRequest { key: key.clone(), return_previous: true, session };
    let interval = v1::KeyRange { start: key.clone(), end: Bytes::from_static(b"kez") };
    let range = v1::DeleteRangeRequest { range: Some(interval), ..Default::default() };
    let swap = v1::CompareAndSwapRequest {
        key: key.clone(),
        expected: Some(Bytes::from_static(b"old")),
        value: value.clone(),
        ..Default::default()
    };
    let operation = |operation| v1::TxnOperation { operation: Some(operation) };
    let compare = v1::Compare {
        key: key.clone(),
        relation: v1::compare::Relation::Greater.into(),
        target: Some(v1::compare::Target::Version(3)),
    };
    let txn = v1::TxnRequest {
        compare: vec![compare],
        then: vec![operation(txn_operation::Operation::Put(put.clone()))],
        otherwise: vec![operation(txn_operation::Operation::Delete(delete.clone()))],
        ..Default::default()
    };
    let plain = |command| v1::Command { command: Some(command), ..Default::default() };
    let exactly_once = v1::Command {
        command: Some(Command::Put(put.clone())),
        session: Some(v1::SessionCall { session: 5, sequence: 6, acknowledged_through: 4 }),
        payload_hash: 0x0123_4567_89ab_cdef,
        ..Default::default()
    };
    vec![
        ("put", plain(Command::Put(put))),
        ("delete", plain(Command::Delete(delete))),
        ("delete_range", plain(Command::DeleteRange(range))),
        ("compare_and_swap", plain(Command::CompareAndSwap(swap))),
        ("txn", plain(Command::Txn(txn))),
        ("lease_grant", plain(Command::LeaseGrant(v1::LeaseGrantRequest { ttl_ms: 9000, lease: 7, session }))),
        ("lease_revoke", plain(Command::LeaseRevoke(v1::LeaseRevokeRequest { lease: 7, session }))),
        ("lease_renewals", plain(Command::LeaseRenewals(v1::LeaseRenewals { leases: vec![7, 300] }))),
        ("session_register", plain(Command::SessionRegister(v1::SessionRegisterRequest { ttl_ms: 9000 }))),
        ("session_renew", plain(Command::SessionRenew(v1::SessionRenewRequest { session: 5 }))),
        ("session_close", plain(Command::SessionClose(v1::SessionCloseRequest { session: 5 }))),
        (
            "compact",
            plain(Command::Compact(v1::CompactRequest { target: Some(v1::compact_request::Target::Revision(11)) })),
        ),
        ("tick", plain(Command::Tick(v1::Tick {}))),
        ("exactly_once", exactly_once),
    ]
}

fn line(name: &str, command: &v1::Command) -> String {
    let hex: String = command.encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{name} {hex}\n")
}

#[test]
fn commands_of_format_1_are_read_and_written() {
    let commands = commands();
    assert_eq!(COMMANDS_1.lines().count(), commands.len());
    for (kept, (name, command)) in COMMANDS_1.lines().zip(commands) {
        let hex = kept.strip_prefix(name).unwrap_or_else(|| panic!("{kept:?} is not {name}")).trim();
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
        assert_eq!(v1::Command::decode(&bytes[..]).unwrap(), command, "{name}");
        assert_eq!(line(name, &command).trim(), kept, "{name} is written differently now");
    }
}

#[test]
#[ignore = "writes the fixture, once per format"]
fn writes_the_fixture() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/state_machine/kv/tests/commands-1.txt");
    let lines: String = commands().iter().map(|(name, command)| line(name, command)).collect();
    std::fs::write(path, lines).unwrap();
}
