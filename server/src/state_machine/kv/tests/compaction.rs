//! Compaction as the store sees it: which revisions may be asked for.

use d_engine_proto::v1::{self, command::Command, command_reply::Reply, compact_request::Target};
use d_engine_proto::{ErrorCode, Revision};

use super::{apply, contents, entry, put};
use crate::state_machine::StateMachine;
use crate::state_machine::kv::{KvError, KvStateMachine, ReadPoint, Store};

fn compact(revision: u64) -> Command {
    Command::Compact(v1::CompactRequest { target: Some(Target::Revision(revision)) })
}

fn compacted(revision: u64) -> Option<Reply> {
    Some(Reply::Compact(v1::CompactResponse { header: None, compacted_revision: revision }))
}

#[test]
fn a_compaction_names_the_oldest_revision_left_and_never_goes_back() {
    let mut store = Store::default();
    for _ in 0..4 {
        apply(&mut store, Command::Put(put(b"k", b"v")));
    }
    let keys = contents(&store);
    assert_eq!(apply(&mut store, compact(3)), v1::CommandReply { revision: 4, reply: compacted(3) });
    assert_eq!(apply(&mut store, compact(3)).reply, compacted(3), "as it is already");
    let gone = KvError::Compacted { requested: Revision(2), minimum: Revision(3) };
    assert_eq!(apply(&mut store, compact(2)).reply, Some(Reply::Error(gone.into())));
    let future = KvError::FutureRevision { requested: Revision(5), current: Revision(4) };
    assert_eq!(apply(&mut store, compact(5)).reply, Some(Reply::Error(future.into())));
    assert_eq!(apply(&mut store, compact(4)).reply, compacted(4), "up to the current one");
    assert_eq!((store.compacted(), contents(&store)), (Revision(4), keys));
}

#[test]
fn the_log_takes_revisions_only() {
    let mut store = Store::default();
    let by_age = Command::Compact(v1::CompactRequest { target: Some(Target::OlderThanMs(1)) });
    assert_eq!(apply(&mut store, by_age).reply, Some(Reply::Error(KvError::CompactByAge.into())));
    assert_eq!(KvError::CompactByAge.code(), ErrorCode::InvalidArgument);
    let unset = apply(&mut store, Command::Compact(v1::CompactRequest::default())).reply;
    assert_eq!(unset, Some(Reply::Error(KvError::Missing { field: "target" }.into())));
}

#[test]
fn a_revision_that_was_compacted_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let machine = KvStateMachine::open(directory.path()).unwrap();
    let put = || Command::Put(put(b"k", b"v"));
    machine.apply(&entry(1, &[put(), put(), put(), compact(2)].map(v1::Command::from))).unwrap();
    let gone = KvError::Compacted { requested: Revision(1), minimum: Revision(2) };
    assert_eq!(machine.at(Revision(1)).err(), Some(gone));
    assert!(matches!(machine.at(Revision(2)), Ok(ReadPoint::Past(_))));
    assert!(matches!(machine.at(Revision(3)), Ok(ReadPoint::Current(_))));
}
