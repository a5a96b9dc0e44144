//! What a watch refuses, and how it ends.

use d_engine_proto::{ErrorCode, Revision, v1};

use super::fixture::{Fixture, put, tiny, watch};
use super::within;
use crate::watch::{HubSettings, Lane, Update, WatchError};

#[tokio::test]
async fn a_watch_that_makes_no_sense_is_refused_by_name() {
    let fixture = Fixture::new(tiny(), 1 << 20);
    let refused = |create: v1::WatchCreate| {
        let error = fixture.hub.watch(&create, &Lane::default()).map(drop).unwrap_err();
        (error.code(), error.to_string())
    };
    for (create, said) in [
        (v1::WatchCreate::default(), "range is missing"),
        (watch(b"b", b"a"), "range ends at \"a\""),
        (watch(b"a", b"a"), "range ends at \"a\""),
        (v1::WatchCreate { no_puts: true, no_deletes: true, ..watch(b"a", b"") }, "no_puts and no_deletes"),
    ] {
        let (code, message) = refused(create);
        assert_eq!(code, ErrorCode::InvalidArgument);
        assert!(message.contains(said), "{message}");
    }
    assert_eq!(fixture.hub.size().0, 0);
}

#[tokio::test]
async fn a_watch_too_many_is_refused_until_another_one_ends() {
    let fixture = Fixture::new(HubSettings { watches_max: 2, ..tiny() }, 1 << 20);
    let create = || fixture.hub.watch(&watch(b"a", b"b"), &Lane::default());
    let (_first, second) = (create().unwrap(), create().unwrap());
    let refused = create().map(drop).unwrap_err();
    assert_eq!(refused.code(), ErrorCode::ResourceExhausted);
    assert!(refused.to_string().contains("watches_max"), "{refused}");
    drop(second);
    create().unwrap();
}

#[tokio::test]
async fn a_watch_from_the_future_is_silent_until_then() {
    let mut fixture = Fixture::new(tiny(), 1 << 20);
    let create = v1::WatchCreate { from_revision: 4, ..watch(b"", b"") };
    let mut watch = fixture.hub.watch(&create, &Lane::default()).unwrap();
    assert_eq!((watch.applied(), watch.from()), (Revision(0), Revision(4)));
    // The fourth revision shares its entry with the third.
    fixture.apply(vec![put("a", "1"), put("b", "2")]);
    fixture.apply(vec![put("c", "3"), put("d", "4"), put("e", "5")]);
    let Some(Ok(Update::Events(delivery))) = within(watch.next()).await else { panic!("no events") };
    assert_eq!((delivery.first_revision(), delivery.last_revision()), (Revision(4), Revision(5)));
}

#[tokio::test]
async fn a_hub_that_stops_ends_every_watch() {
    let fixture = Fixture::new(tiny(), 1 << 20);
    let mut waiting = fixture.hub.watch(&watch(b"a", b"b"), &Lane::default()).unwrap();
    let stopped = tokio::spawn(fixture.hub.stopped());
    let ended = tokio::spawn(async move { (waiting.next().await, waiting.next().await.is_none()) });
    tokio::task::yield_now().await;
    fixture.hub.stop();
    let (last, silent) = within(ended).await.unwrap();
    assert!(matches!(last, Some(Err(WatchError::Stopping))) && silent);
    within(stopped).await.unwrap();
    let refused = fixture.hub.watch(&watch(b"a", b"b"), &Lane::default()).map(drop);
    assert!(matches!(refused, Err(WatchError::Stopping)));
    assert_eq!(fixture.hub.size().0, 0);
}

/// The directory can be opened again, so nothing kept the state machine.
#[tokio::test]
async fn a_hub_that_is_dropped_lets_go_of_the_store() {
    let Fixture { kv, hub, .. } = Fixture::new(tiny(), 1 << 20);
    let left = std::sync::Arc::downgrade(&kv);
    drop((kv, hub));
    within(async {
        while left.upgrade().is_some() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
