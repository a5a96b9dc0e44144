//! Writes under a session: answers that get lost, leaders that change, sessions that expire, callers that go away.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use d_engine_client::{ErrorKind, LeaseId, NodeId, Outcome};
use d_engine_proto::{ErrorCode, v1};
use futures_util::future::join_all;
use support::{Behaviour, PATIENCE, builder, client, cluster, elect, eventually, refusal};

#[tokio::test]
async fn a_write_whose_answers_are_lost_is_applied_once() {
    let nodes = cluster(1);
    let store = nodes[0].store();
    let client = client(&[&nodes[0]], PATIENCE);
    nodes[0].behave(Behaviour::Garble);
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "v").return_previous().await }
    });
    eventually("it was sent again and again", || nodes[0].puts() > 2).await;
    nodes[0].behave(Behaviour::Serve);
    let answer = pending.await.unwrap().unwrap();
    assert_eq!(answer.previous, None, "the first answer, not that of a second put");
    let store = store.lock();
    assert_eq!(store.version("k"), 1);
    assert!(store.repeats > 1);
    let calls: BTreeSet<_> = store.calls.iter().map(|call| (call.sequence, call.acknowledged_through)).collect();
    assert_eq!(calls, BTreeSet::from([(1, 0)]), "every copy is the same");
    let stats = client.stats();
    assert_eq!((stats.sessions, stats.failures, stats.repeats), (1, 0, stats.retries));
}

#[tokio::test]
async fn every_unknown_outcome_is_settled_by_the_next_leader() {
    let unknown = |code| Behaviour::ApplyAndRefuse(refusal(code, v1::Outcome::Unknown, false));
    for behaviour in [
        unknown(ErrorCode::LeadershipLost),
        unknown(ErrorCode::Internal),
        unknown(ErrorCode::DeadlineExceeded),
        Behaviour::ApplyAndHang,
        Behaviour::Silent,
        Behaviour::Garble,
    ] {
        let nodes = cluster(3);
        let client = client(&[&nodes[0]], Duration::from_secs(12));
        client.put("k", "1").await.unwrap();
        nodes[0].behave(behaviour.clone());
        let pending = tokio::spawn({
            let client = client.clone();
            async move { client.put("k", "2").await }
        });
        eventually("the write has arrived", || nodes[0].puts() >= 2).await;
        elect(&nodes, 1, 2);
        let answer = pending.await.unwrap().unwrap_or_else(|error| panic!("{behaviour:?}: {error}"));
        assert_eq!(answer.header.node_id, NodeId(2), "{behaviour:?}");
        assert_eq!(nodes[0].store().lock().version("k"), 2, "{behaviour:?}");
    }
}

#[tokio::test]
async fn calls_at_once_share_one_registration_and_have_their_own_numbers() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    let answers = join_all((0..100).map(|_| client.put("k", "v").into_future())).await;
    assert!(answers.iter().all(Result::is_ok));
    let store = nodes[0].store();
    let store = store.lock();
    assert_eq!((store.registered, store.version("k")), (1, 100));
    let numbers: BTreeSet<_> = store.calls.iter().map(|call| call.sequence).collect();
    assert_eq!(numbers, (1..=100).collect());
}

#[tokio::test]
async fn a_session_that_expired_before_sending_is_replaced_unnoticed() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    nodes[0].store().lock().sessions.clear();
    client.put("k", "2").await.unwrap();
    let stats = client.stats();
    assert_eq!((stats.sessions, stats.failures), (2, 0));
    assert_eq!(nodes[0].store().lock().version("k"), 2);
}

#[tokio::test]
async fn a_session_that_expired_after_sending_leaves_the_write_unknown_and_the_next_one_well() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    nodes[0].behave(Behaviour::Garble);
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "2").await }
    });
    eventually("the write has arrived", || nodes[0].store().lock().version("k") == 2).await;
    {
        // At once, so that no copy comes between.
        let mut script = nodes[0].script.lock();
        script.store.lock().sessions.clear();
        script.behaviour = Behaviour::Serve;
    }
    let error = pending.await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::SessionExpired, Outcome::Unknown), "{error}");
    assert_eq!(nodes[0].store().lock().version("k"), 2, "not applied a second time");
    client.put("k", "3").await.unwrap();
    assert_eq!((nodes[0].store().lock().version("k"), client.stats().sessions), (3, 2));
}

#[tokio::test]
async fn a_session_that_may_have_expired_while_idle_is_replaced_before_use() {
    let nodes = cluster(1);
    nodes[0].store().lock().session_ttl_ms = 40;
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    let writing = async {
        while client.stats().sessions < 2 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            client.put("k", "2").await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, writing).await.unwrap();
    assert_eq!(client.stats().retries, 0, "no call under a session that is over was tried");
}

#[tokio::test]
async fn a_session_is_renewed_while_a_call_under_it_is_not_answered() {
    let nodes = cluster(1);
    nodes[0].store().lock().session_ttl_ms = 300;
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    nodes[0].behave(Behaviour::ApplyAndHang);
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "2").await }
    });
    eventually("the session was renewed", || nodes[0].store().lock().session_renewals > 3).await;
    nodes[0].behave(Behaviour::Serve);
    pending.await.unwrap().unwrap();
    assert_eq!(nodes[0].store().lock().version("k"), 2);
}

#[tokio::test]
async fn a_dropped_call_gives_its_number_back() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    nodes[0].behave(Behaviour::Silent);
    let abandoned = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "2").await }
    });
    eventually("the write has arrived", || nodes[0].puts() == 2).await;
    abandoned.abort();
    assert!(abandoned.await.unwrap_err().is_cancelled());
    nodes[0].behave(Behaviour::Serve);
    client.put("k", "3").await.unwrap();
    let last = *nodes[0].store().lock().calls.last().unwrap();
    assert_eq!((last.sequence, last.acknowledged_through), (3, 2), "no late copy of 2 is applied any more");
}

#[tokio::test]
async fn a_full_window_makes_calls_wait_and_says_so_at_their_deadline() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    // One call that does not end holds the window back, however many others do.
    nodes[0].behave(Behaviour::Silent);
    let slow = tokio::spawn({
        let client = client.clone();
        async move { client.put("slow", "v").timeout(PATIENCE).await }
    });
    eventually("the slow write has arrived", || nodes[0].puts() == 2).await;
    let window = d_engine_proto::limits::SESSION_WINDOW_CALLS;
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..window {
        let client = client.clone();
        waiting.spawn(async move { client.put("k", "v").timeout(Duration::from_secs(5)).await });
    }
    eventually("all have begun", || client.stats().calls == window + 2).await;
    let error = client.put("late", "v").timeout(Duration::from_millis(700)).await.unwrap_err();
    waiting.abort_all();
    slow.abort();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::ResourceExhausted, Outcome::NotApplied), "{error}");
    assert!(error.to_string().contains("session_window_calls"), "{error}");
    nodes[0].behave(Behaviour::Serve);
    client.put("late", "v").await.unwrap();
}

#[tokio::test]
async fn servers_without_sessions_are_written_to_as_before() {
    let nodes = cluster(1);
    nodes[0].script.lock().no_sessions = Some(refusal(ErrorCode::Unsupported, v1::Outcome::NotApplied, false));
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    assert!(nodes[0].store().lock().calls.is_empty());
    nodes[0].behave(Behaviour::Garble);
    let error = client.put("k", "2").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::Unknown), "{error}");
    assert_eq!(nodes[0].puts(), 2);
}

#[tokio::test]
async fn a_refused_registration_is_a_write_that_was_not_applied() {
    let nodes = cluster(1);
    nodes[0].script.lock().no_sessions = Some(refusal(ErrorCode::ResourceExhausted, v1::Outcome::Unknown, false));
    let client = client(&[&nodes[0]], PATIENCE);
    let error = client.put("k", "v").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::ResourceExhausted, Outcome::NotApplied), "{error}");
    assert_eq!(error.operation(), "put");
    assert_eq!(nodes[0].puts(), 0);
}

#[tokio::test]
async fn a_client_told_to_uses_no_session() {
    let nodes = cluster(1);
    let client = builder(&[&nodes[0]], PATIENCE).sessions(false).build().unwrap();
    client.put("k", "v").await.unwrap();
    let store = nodes[0].store();
    let store = store.lock();
    assert_eq!((store.registered, store.calls.len()), (0, 0));
}

#[tokio::test]
async fn a_later_refusal_does_not_hide_that_the_write_may_have_been_applied() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    for (code, outcome) in [
        (ErrorCode::FailedPrecondition, Outcome::Unknown),
        (ErrorCode::InvalidArgument, Outcome::Unknown),
        // The store says these to the first copy too.
        (ErrorCode::LeaseNotFound, Outcome::NotApplied),
        (ErrorCode::LeaseExists, Outcome::NotApplied),
    ] {
        nodes[0].behave(Behaviour::Garble);
        let before = nodes[0].puts();
        let pending = tokio::spawn({
            let client = client.clone();
            async move { client.put("k", "2").await }
        });
        eventually("the write has arrived", || nodes[0].puts() > before).await;
        nodes[0].behave(Behaviour::Refuse(refusal(code, v1::Outcome::NotApplied, false)));
        let error = pending.await.unwrap().unwrap_err();
        assert_eq!(error.outcome(), outcome, "{error}");
    }
}

#[tokio::test]
async fn an_answer_that_was_not_kept_keeps_its_outcome() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    for (told, outcome) in [(v1::Outcome::Unknown, Outcome::Unknown), (v1::Outcome::Applied, Outcome::Applied)] {
        nodes[0].behave(Behaviour::Refuse(refusal(ErrorCode::AlreadyAcknowledged, told, false)));
        let error = client.put("k", "2").await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::AlreadyAcknowledged, outcome), "{error}");
    }
}

#[tokio::test]
async fn grants_and_revocations_of_leases_are_made_once_too() {
    let nodes = cluster(1);
    let store = nodes[0].store();
    let client = client(&[&nodes[0]], PATIENCE);
    nodes[0].behave(Behaviour::Garble);
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.grant_lease(Duration::from_secs(5)).await }
    });
    eventually("the answer was lost", || store.lock().repeats > 0).await;
    nodes[0].behave(Behaviour::Serve);
    assert_eq!(pending.await.unwrap().unwrap().lease, LeaseId(1));
    assert_eq!(store.lock().leases.len(), 1);
    client.put("k", "v").lease(LeaseId(1)).await.unwrap();
    let before = store.lock().repeats;
    nodes[0].behave(Behaviour::Garble);
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.revoke_lease(LeaseId(1)).await }
    });
    eventually("the answer was lost", || store.lock().repeats > before).await;
    nodes[0].behave(Behaviour::Serve);
    assert_eq!(pending.await.unwrap().unwrap().deleted, 1);
}
