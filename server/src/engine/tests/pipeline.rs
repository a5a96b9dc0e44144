//! Pipelines of a cluster, without a wire in between.

use std::future::poll_fn;
use std::task::Poll;

use d_engine_proto::v1::answer::Reply;
use d_engine_proto::v1::operation::Request as Asked;

use super::*;
use crate::engine::Pipeline;
use crate::limits::PIPELINE_BATCH_BYTES_MAX;

/// Begins operations that arrive together, with ids from 1 on, and waits for their answers.
async fn ask(pipeline: &mut Pipeline, requests: Vec<Asked>) -> Vec<Reply> {
    pipeline.arrive();
    let count = requests.len();
    for (id, request) in (1..).zip(requests) {
        let operation = v1::Operation { id, request: Some(request), ..Default::default() };
        pipeline.begin(operation, 1, PATIENCE).unwrap();
    }
    let mut answers = Vec::new();
    while answers.len() < count {
        let more = poll_fn(|context| {
            pipeline.poll(context);
            let taken: Vec<_> = pipeline.take_answers().map(|answered| answered.answer).collect();
            if taken.is_empty() { Poll::Pending } else { Poll::Ready(taken) }
        });
        answers.extend(within(more).await);
    }
    answers.sort_by_key(|answer| answer.id);
    answers.into_iter().map(|answer| answer.reply.unwrap()).collect()
}

fn get(key: &'static str, consistency: Consistency) -> Asked {
    let read = v1::ReadOptions { consistency: consistency.into(), ..Default::default() };
    Asked::Get(v1::GetRequest { key: key.into(), read: Some(read) })
}

#[track_caller]
fn value(reply: &Reply) -> Option<&v1::KeyValue> {
    let Reply::Get(get) = reply else { panic!("{reply:?}") };
    get.kv.as_ref()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_answers_the_reads_it_may_and_names_the_leader_for_the_rest() {
    let cluster = Cluster::start(3).await;
    let (leader, followers) = cluster.roles().await;
    leader.put("k").await;
    let mut pipeline = Pipeline::new(followers[0].engine.clone());
    let requests = vec![
        Asked::Put(put("k")),
        get("k", Consistency::Linearizable),
        get("k", Consistency::Lease),
        Asked::LeaseRenew(v1::LeaseRenewRequest { lease: 1 }),
        get("k", Consistency::Eventual),
    ];
    let replies = ask(&mut pipeline, requests).await;
    assert!(value(&replies[1]).is_some(), "what was acknowledged is read everywhere");
    assert!(matches!(replies[4], Reply::Get(_)));
    for refused in [&replies[0], &replies[2], &replies[3]] {
        let Reply::Error(error) = refused else { panic!("{refused:?}") };
        let detail = error.detail.as_ref().unwrap();
        assert_eq!(ErrorCode::from_number(detail.code), Some(ErrorCode::NotLeader));
        assert_eq!(detail.leader.as_ref().unwrap().node_id, leader.engine.consensus().node_id().get());
    }
    assert!(pipeline.is_idle());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_the_revision_it_asks_for_and_others_do_not_wait_for_it() {
    let cluster = Cluster::start(1).await;
    let (leader, _) = cluster.roles().await;
    let read = Some(v1::ReadOptions { consistency: Consistency::Eventual.into(), min_revision: 2, revision: 0 });
    let mut pipeline = Pipeline::new(leader.engine.clone());
    let late = Asked::Get(v1::GetRequest { key: "b".into(), read });
    // The second write makes the revision the read waits for, or the other one does.
    let requests = vec![late, Asked::Put(put("a")), Asked::Put(put("b")), get("none", Consistency::Eventual)];
    let replies = ask(&mut pipeline, requests).await;
    assert!(value(&replies[0]).is_some());
    assert_eq!(value(&replies[3]), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_is_never_read_in_a_pipeline_by_a_read_that_promises_the_present() {
    let cluster = Cluster::start(3).await;
    let (leader, followers) = cluster.roles().await;
    let last_deadline = leader.put_what_ends_together().await;
    let count = |consistency: Consistency| {
        let read = Some(v1::ReadOptions { consistency: consistency.into(), ..Default::default() });
        let range = Some(v1::KeyRange::default());
        Asked::Range(v1::RangeRequest { range, read, count_only: true, ..Default::default() })
    };
    let watch_it_end = |node: &'static str, reader: &Node, policies: Vec<Consistency>| {
        let (leader, mut pipeline) = (leader.engine.clone(), Pipeline::new(reader.engine.clone()));
        async move {
            loop {
                // A leader that the machine kept waiting is deposed: others go on, and it has nothing to show.
                let Some(before) = leader.consensus().store_time() else { return };
                let replies = ask(&mut pipeline, policies.iter().map(|policy| count(*policy)).collect()).await;
                let counts = replies.iter().map(|reply| match reply {
                    Reply::Range(range) => range.count,
                    _ => None,
                });
                let Some(counts) = counts.collect::<Option<Vec<u64>>>() else { continue };
                let left = counts.iter().sum::<u64>();
                assert!(left == 0 || before < last_deadline, "{node} shows {counts:?} keys that were due");
                if left == 0 {
                    return;
                }
            }
        }
    };
    let all = async {
        tokio::join!(
            watch_it_end("the leader", leader, vec![Consistency::Linearizable]),
            watch_it_end("the leader's lease", leader, vec![Consistency::Lease]),
            watch_it_end("a follower", followers[0], vec![Consistency::Linearizable]),
        )
    };
    within(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_never_pile_up_beyond_a_message() {
    const VALUE_BYTES: usize = 300_000;
    let cluster = Cluster::start(1).await;
    let (leader, _) = cluster.roles().await;
    leader.engine.put(v1::PutRequest { value: vec![0; VALUE_BYTES].into(), ..put("k") }, soon()).await.unwrap();
    let mut pipeline = Pipeline::new(leader.engine.clone());
    let at_most = PIPELINE_BATCH_BYTES_MAX / VALUE_BYTES + 1;
    pipeline.arrive();
    let begin = |pipeline: &mut Pipeline, id, consistency| {
        let request = Some(get("k", consistency));
        pipeline.begin(v1::Operation { id, request, ..Default::default() }, 1, PATIENCE).unwrap();
    };
    let mut begun = 0;
    while pipeline.has_room() {
        begun += 1;
        begin(&mut pipeline, begun, Consistency::Eventual);
        assert!(begun <= at_most as u64, "{begun} answers wait to be sent");
    }
    // Those for which there is no room wait in the table, or for the right to be read.
    for id in 100..200 {
        begin(&mut pipeline, id, [Consistency::Eventual, Consistency::Linearizable][usize::from(id % 2 == 0)]);
    }
    let mut answered = 0;
    while answered < begun + 100 {
        let taken = poll_fn(|context| {
            pipeline.poll(context);
            let bytes: Vec<_> = pipeline.take_answers().map(|answered| answered.bytes).collect();
            assert!(bytes.len() <= at_most && bytes.iter().sum::<usize>() <= PIPELINE_BATCH_BYTES_MAX);
            if bytes.is_empty() { Poll::Pending } else { Poll::Ready(bytes.len()) }
        });
        answered += within(taken).await as u64;
    }
    assert!(pipeline.is_idle());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_that_is_dropped_leaves_nothing_pending() {
    let cluster = Cluster::start(1).await;
    let (leader, _) = cluster.roles().await;
    let mut pipeline = Pipeline::new(leader.engine.clone());
    pipeline.arrive();
    for id in 1..=1000 {
        let request = if id % 2 == 0 { Asked::Put(put("k")) } else { get("k", Consistency::Linearizable) };
        pipeline.begin(v1::Operation { id, request: Some(request), ..Default::default() }, 1, PATIENCE).unwrap();
    }
    poll_fn(|context| {
        pipeline.poll(context);
        Poll::Ready(())
    })
    .await;
    drop(pipeline);
    leader.put("other").await;
    within(async {
        while leader.engine.consensus().pending_bytes() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
