//! What slow watches cost: themselves time, nobody else anything.

use d_engine_proto::Revision;

use super::fixture::{Fixture, put, tiny, watch};
use super::validator::Validator;
use super::within;
use crate::watch::{HubSettings, Lane, Update};

const FAST: usize = 10_000;

#[tokio::test(flavor = "multi_thread")]
async fn one_slow_watch_among_ten_thousand_fast_ones_holds_up_nobody_and_loses_nothing() {
    let settings = HubSettings { watches_max: FAST + 1, ..tiny() };
    let bytes_max = settings.window_bytes_max;
    let mut fixture = Fixture::new(settings, 8 << 10);
    let create = watch(b"k", b"l");
    let mut slow = fixture.hub.watch(&create, &Lane::default()).unwrap();
    assert!(fixture.hub.size().1 <= bytes_max);
    let mut fast: Vec<_> = (0..FAST)
        .map(|_| (fixture.hub.watch(&create, &Lane::default()).unwrap(), Validator::new(create.clone(), Revision(1))))
        .collect();
    for round in 0..60_u32 {
        fixture.apply(vec![put(format!("k{}", round % 7), vec![b'v'; 100]), put("other", "")]);
        let last = Revision(u64::from(round) * 2 + 1);
        for (watch, validator) in &mut fast {
            while validator.through() < last {
                match within(watch.next()).await.unwrap().unwrap() {
                    Update::Events(delivery) => validator.events(delivery.events(), false, &fixture.truth.read()),
                    Update::Bookmark(revision) => validator.bookmark(revision, &fixture.truth.read()),
                }
            }
        }
        assert!(fixture.hub.size().1 <= bytes_max, "{:?}", fixture.hub.size());
    }
    assert_eq!(fixture.count("watch_overruns_total"), 0, "fast ones were taken for slow");
    let mut validator = Validator::new(create, Revision(1));
    while validator.through() < Revision(119) {
        match within(slow.next()).await.unwrap().unwrap() {
            Update::Events(delivery) => validator.events(delivery.events(), false, &fixture.truth.read()),
            Update::Bookmark(revision) => validator.bookmark(revision, &fixture.truth.read()),
        }
    }
    assert!(fixture.count("watch_history_reads_total") > 0);
    drop((slow, fast));
    assert_eq!(fixture.hub.size().0, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_watches_share_one_delivery_and_its_encoding() {
    let mut fixture = Fixture::new(HubSettings { window_bytes_max: 1 << 20, ..tiny() }, 1 << 20);
    let create = watch(b"k", b"l");
    let mut watches: Vec<_> = (0..3).map(|_| fixture.hub.watch(&create, &Lane::default()).unwrap()).collect();
    fixture.apply(vec![put("k", "v")]);
    let mut frames = Vec::new();
    for watch in &mut watches {
        let Update::Events(delivery) = within(watch.next()).await.unwrap().unwrap() else { panic!("no events") };
        frames.push(delivery.frames()[0].as_ptr());
    }
    frames.dedup();
    assert_eq!(frames.len(), 1);
}
