//! Many watches of anything, from anywhere, each at a pace of its own, while the store changes all the time.

use std::sync::Arc;

use d_engine_proto::{Revision, v1};
use fastrand::Rng;
use parking_lot::RwLock;
use tokio::sync::watch;

use super::fixture::{Fixture, random_commands, random_watch, tiny};
use super::validator::Validator;
use super::{seeded, within};
use crate::storage::versions::Change;
use crate::watch::{Hub, Lane, Update, Watch};

const ENTRIES: usize = 600;
const WATCHERS: usize = 48;

struct Watcher {
    hub: Hub,
    lane: Lane,
    truth: Arc<RwLock<Vec<Change>>>,
    revisions: watch::Receiver<Revision>,
    /// The last revision of the test, once known.
    last: watch::Receiver<Option<Revision>>,
    random: Rng,
}

impl Watcher {
    /// Watches until everything was handed out, then begins anew from somewhere.
    async fn run(mut self) {
        loop {
            let create = self.begin();
            let watch = self.hub.watch(&create, &self.lane).unwrap();
            let validator = Validator::new(create, watch.from());
            self.follow(watch, validator).await;
            if self.last.borrow().is_some() && self.random.bool() {
                return;
            }
        }
    }

    fn begin(&mut self) -> v1::WatchCreate {
        let mut create = random_watch(&mut self.random);
        let now = self.revisions.borrow().get();
        create.from_revision = match self.random.u32(..4) {
            0 => 0,
            1 => now + self.random.u64(1..20),
            2 => 1,
            _ => self.random.u64(1..now + 2),
        };
        create
    }

    async fn follow(&mut self, mut watch: Watch, mut validator: Validator) {
        let until = self.random.u64(1..200) + validator.through().get();
        loop {
            let known = *self.last.borrow();
            if known.map_or(validator.through().get() >= until, |last| validator.through() >= last) {
                return;
            }
            if self.random.u32(..10) == 0 {
                watch = self.hub.watch(&validator.resume(), &self.lane).unwrap();
            }
            if self.random.u32(..6) == 0 {
                self.dawdle().await;
                // What it waited for may have been the end.
                continue;
            }
            tokio::select! {
                update = watch.next() => match update.unwrap().unwrap() {
                    Update::Events(delivery) => {
                        validator.events(delivery.events(), false, &self.truth.read());
                        assert_eq!(delivery.last_revision(), validator.through());
                    }
                    Update::Bookmark(revision) => validator.bookmark(revision, &self.truth.read()),
                },
                // A start in the future may lie beyond the end.
                _ = self.last.changed() => {}
            }
            assert!(watch.cursor() >= validator.through());
        }
    }

    /// Until the store is some revisions further, or comes no further.
    async fn dawdle(&mut self) {
        let target = Revision(self.revisions.borrow().get() + self.random.u64(1..60));
        tokio::select! {
            _ = self.revisions.wait_for(|revision| *revision >= target) => {}
            _ = self.last.wait_for(Option::is_some) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_watch_gets_everything_once_and_in_order_however_slow_it_is_and_wherever_it_begins() {
    let mut random = seeded();
    let mut fixture = Fixture::new(tiny(), 6 << 10);
    let (over, last) = watch::channel(None);
    let lanes: Vec<Lane> = (0..WATCHERS / 4).map(|_| Lane::default()).collect();
    let watchers: Vec<_> = (0..WATCHERS)
        .map(|number| {
            let watcher = Watcher {
                hub: fixture.hub.clone(),
                lane: lanes[number % lanes.len()].clone(),
                truth: fixture.truth.clone(),
                revisions: fixture.kv.revisions(),
                last: last.clone(),
                random: random.fork(),
            };
            tokio::spawn(watcher.run())
        })
        .collect();
    let writer = tokio::task::spawn_blocking(move || {
        for _ in 0..ENTRIES {
            fixture.apply(random_commands(&mut random));
            std::thread::yield_now();
        }
        fixture
    });
    let fixture = writer.await.unwrap();
    over.send_replace(Some(fixture.revision()));
    for watcher in watchers {
        within(watcher).await.unwrap();
    }
    for metric in ["watch_overruns_total", "watch_history_reads_total", "watch_bookmarks_total", "watch_events_total"] {
        assert!(fixture.count(metric) > 0, "no {metric}: the test is too tame");
        println!("{metric} {}", fixture.count(metric));
    }
    assert_eq!((fixture.hub.size().0, fixture.count("watches")), (0, 0), "watches were left behind");
}

/// A watch is given up after each number of updates in turn and resumed: nothing is lost, nothing comes twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_can_be_resumed_after_every_update() {
    let mut random = seeded();
    for recent_bytes in [2 << 10, 1 << 20] {
        let mut fixture = Fixture::new(tiny(), recent_bytes);
        for _ in 0..40 {
            fixture.apply(random_commands(&mut random));
        }
        let last = fixture.revision();
        for updates_before_break in 1..12 {
            let create = v1::WatchCreate { from_revision: 1, ..random_watch(&mut random) };
            let mut validator = Validator::new(create, Revision(1));
            let mut watch = fixture.hub.watch(&validator.resume(), &Lane::default()).unwrap();
            let mut updates = 0;
            while validator.through() < last {
                match within(watch.next()).await.unwrap().unwrap() {
                    Update::Events(delivery) => validator.events(delivery.events(), false, &fixture.truth.read()),
                    Update::Bookmark(revision) => validator.bookmark(revision, &fixture.truth.read()),
                }
                updates += 1;
                if updates % updates_before_break == 0 {
                    watch = fixture.hub.watch(&validator.resume(), &Lane::default()).unwrap();
                }
                // Bookmarks follow what changes.
                if updates == 1 {
                    fixture.apply(vec![super::fixture::put("zz", "")]);
                }
            }
        }
    }
}
