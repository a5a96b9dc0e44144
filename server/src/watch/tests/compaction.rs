//! Compaction while watches read the history: each gets everything, or is told what is left; never a gap.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use d_engine_proto::v1::{self, command::Command, compact_request::Target};
use d_engine_proto::{ErrorCode, Revision};

use super::fixture::{Fixture, random_commands, random_watch, tiny};
use super::validator::Validator;
use super::{seeded, within};
use crate::state_machine::kv::KvError;
use crate::watch::{Lane, Update, WatchError};

fn compact(revision: Revision) -> Command {
    Command::Compact(v1::CompactRequest { target: Some(Target::Revision(revision.get())) })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_watch_that_a_compaction_overtakes_is_complete_or_told_where_to_begin() {
    let mut random = seeded();
    let mut fixture = Fixture::new(tiny(), 2 << 10);
    let told = Arc::new(AtomicUsize::new(0));
    let (over, last) = tokio::sync::watch::channel(None);
    let watchers: Vec<_> = (0..24)
        .map(|_| {
            let (hub, truth, mut random) = (fixture.hub.clone(), fixture.truth.clone(), random.fork());
            let (mut last, told, kv) = (last.clone(), told.clone(), Arc::downgrade(&fixture.kv));
            tokio::spawn(async move {
                loop {
                    let oldest = kv.upgrade().unwrap().current().compacted().max(Revision(1));
                    let mut validator = Validator::new(random_watch(&mut random), oldest);
                    let mut watch = match hub.watch(&validator.resume(), &Lane::default()) {
                        Ok(watch) => watch,
                        Err(error) => {
                            assert_eq!(error.code(), ErrorCode::Compacted);
                            continue;
                        }
                    };
                    let updates = random.usize(1..40);
                    for _ in 0..updates {
                        let known = *last.borrow_and_update();
                        if known.is_some_and(|last| validator.through() >= last) {
                            return;
                        }
                        let update = tokio::select! {
                            update = watch.next() => update.unwrap(),
                            _ = last.changed() => continue,
                        };
                        match update {
                            Ok(Update::Events(delivery)) => {
                                validator.events(delivery.events(), false, &truth.read());
                            }
                            Ok(Update::Bookmark(revision)) => validator.bookmark(revision, &truth.read()),
                            Err(WatchError::Refused(KvError::Compacted { requested, minimum })) => {
                                assert!(validator.through() < requested && requested < minimum);
                                told.fetch_add(1, Ordering::Relaxed);
                                break;
                            }
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            })
        })
        .collect();
    let writer = tokio::task::spawn_blocking(move || {
        for entry in 0..600 {
            fixture.apply(random_commands(&mut random));
            if entry % 5 == 4 {
                let revision = fixture.revision().get();
                fixture.apply(vec![compact(Revision(revision.saturating_sub(random.u64(..40)).max(1)))]);
            }
        }
        fixture
    });
    let fixture = writer.await.unwrap();
    over.send_replace(Some(fixture.revision()));
    for watcher in watchers {
        within(watcher).await.unwrap();
    }
    println!("told {}, reads {}", told.load(Ordering::Relaxed), fixture.count("watch_history_reads_total"));
    assert!(fixture.count("watch_history_reads_total") > 0, "the test is too tame");
}

#[tokio::test]
async fn a_start_that_is_compacted_is_refused_with_the_oldest_revision_left() {
    let mut fixture = Fixture::new(tiny(), 1 << 20);
    for _ in 0..5 {
        fixture.apply(vec![super::fixture::put("a", "")]);
    }
    fixture.apply(vec![compact(Revision(3))]);
    let watch = |from_revision| {
        let create = v1::WatchCreate { from_revision, ..super::fixture::watch(b"a", b"b") };
        fixture.hub.watch(&create, &Lane::default()).map(drop)
    };
    watch(3).unwrap();
    let refused = watch(2).unwrap_err();
    let WatchError::Refused(KvError::Compacted { minimum, .. }) = refused else { panic!("{refused}") };
    assert_eq!(minimum, Revision(3));
}
