//! The store against a naive model, by example and under random commands; then killed and reopened.

mod answers;
mod compaction;
mod crash;
mod examples;
mod formats;
mod leases;
mod model;
mod random;
mod ranges;
mod refusals;
mod replay;
mod restore;
mod sessions;
mod txns;

use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::v1::{self, command, command_reply::Reply, txn_operation};
use d_engine_proto::{LogIndex, Term};
use prost::Message;

use super::Store;
use super::store::Effects;
use crate::state_machine::{CommittedEntry, EntryContent, StoreTime};
use crate::storage::LogPosition;

fn position(index: u64) -> LogPosition {
    LogPosition { term: Term(1 + index / 10), index: LogIndex(index) }
}

/// An entry of one batch, a millisecond after the one before it.
fn entry(index: u64, commands: &[v1::Command]) -> CommittedEntry {
    entry_at(index, Duration::from_millis(index), commands)
}

fn entry_at(index: u64, store_time: Duration, commands: &[v1::Command]) -> CommittedEntry {
    let commands = commands.iter().map(|command| command.encode_to_vec().into()).collect();
    let content = EntryContent::Commands { store_time: StoreTime(store_time), commands };
    CommittedEntry { position: position(index), content }
}

fn decode(answers: &[Bytes]) -> Vec<v1::CommandReply> {
    answers.iter().map(|answer| v1::CommandReply::decode(answer.clone()).unwrap()).collect()
}

/// Applies one command as an entry of its own and checks the invariants.
fn apply(store: &mut Store, command: command::Command) -> v1::CommandReply {
    let index = store.state().position.map_or(1, |position| position.index.get() + 1);
    let effects = store.apply(&entry(index, &[v1::Command::from(command)]));
    store.validate().unwrap();
    decode(&effects.answers).remove(0)
}

/// Applies commands as the next entry, at a store time of its own, and checks the invariants.
fn apply_at(store: &mut Store, milliseconds: u64, commands: &[v1::Command]) -> Effects {
    let index = store.state().position.map_or(1, |position| position.index.get() + 1);
    let effects = store.apply(&entry_at(index, Duration::from_millis(milliseconds), commands));
    store.validate().unwrap();
    effects
}

/// Applies a transaction that must be accepted.
fn apply_txn(store: &mut Store, txn: v1::TxnRequest) -> v1::TxnResponse {
    match apply(store, command::Command::Txn(txn)).reply {
        Some(Reply::Txn(txn)) => txn,
        other => panic!("{other:?}"),
    }
}

fn put(key: &[u8], value: &[u8]) -> v1::PutRequest {
    v1::PutRequest { key: Bytes::copy_from_slice(key), value: Bytes::copy_from_slice(value), ..Default::default() }
}

fn get(key: &[u8]) -> v1::GetRequest {
    v1::GetRequest { key: Bytes::copy_from_slice(key), read: None }
}

fn delete(key: &[u8]) -> v1::DeleteRequest {
    v1::DeleteRequest { key: Bytes::copy_from_slice(key), ..Default::default() }
}

fn key_range(start: &[u8], end: &[u8]) -> v1::KeyRange {
    v1::KeyRange { start: Bytes::copy_from_slice(start), end: Bytes::copy_from_slice(end) }
}

fn range(start: &[u8], end: &[u8]) -> v1::RangeRequest {
    v1::RangeRequest { range: Some(key_range(start, end)), ..Default::default() }
}

fn delete_range(start: &[u8], end: &[u8]) -> v1::DeleteRangeRequest {
    v1::DeleteRangeRequest { range: Some(key_range(start, end)), ..Default::default() }
}

fn txn(then: Vec<txn_operation::Operation>) -> v1::TxnRequest {
    v1::TxnRequest { then: operations(then), ..Default::default() }
}

fn operations(operations: Vec<txn_operation::Operation>) -> Vec<v1::TxnOperation> {
    operations.into_iter().map(|operation| v1::TxnOperation { operation: Some(operation) }).collect()
}

/// The keys of a store with all they hold.
fn contents(store: &Store) -> Vec<v1::KeyValue> {
    all_pages(|request| store.range(request).unwrap())
}

/// The keys of all pages of the whole interval.
fn all_pages(read: impl Fn(&v1::RangeRequest) -> v1::RangeResponse) -> Vec<v1::KeyValue> {
    let (mut kvs, mut request) = (Vec::new(), range(b"", b""));
    loop {
        let page = read(&request);
        kvs.extend(page.kvs);
        if !page.more {
            return kvs;
        }
        request = range(&page.next, b"");
    }
}
