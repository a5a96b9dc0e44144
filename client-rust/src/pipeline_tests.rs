use super::*;

fn queued(bytes: usize, deadline: Instant) -> (Queued, oneshot::Receiver<Word>) {
    let (slot, word) = oneshot::channel();
    let pending = Pending { slot, begun: deadline - Duration::from_millis(10), deadline, cancelled: false };
    let submission = Submission { request: operation::Request::Put(v1::PutRequest::default()), bytes, trace: None };
    (Queued { submission, pending }, word)
}

fn ids(batch: Option<v1::OperationBatch>) -> Vec<u64> {
    batch.map(|batch| batch.operations.iter().map(|operation| operation.id).collect()).unwrap_or_default()
}

#[test]
fn a_message_takes_what_waits_up_to_its_bytes_and_a_larger_operation_alone() {
    let now = Instant::now();
    let mut state = LinkState::default();
    let max = usize::try_from(limits::PIPELINE_BATCH_BYTES_MAX).unwrap();
    let half = max / 2;
    for (id, bytes) in [(1, half), (2, half), (3, 1), (4, max + 1), (5, 1), (6, 1)] {
        state.queue.insert(id, queued(bytes, now).0);
    }
    assert_eq!(ids(state.take(now)), [1, 2]);
    assert_eq!(ids(state.take(now)), [3]);
    assert_eq!(ids(state.take(now)), [4]);
    assert_eq!(ids(state.take(now)), [5, 6]);
    assert!(state.take(now).is_none());
    assert_eq!(state.flight.len(), 6);
}

#[test]
fn the_time_that_is_left_travels_and_is_never_none() {
    let now = Instant::now();
    let mut state = LinkState::default();
    state.queue.insert(1, queued(1, now + Duration::from_millis(3)).0);
    state.queue.insert(2, queued(1, now - Duration::from_millis(3)).0);
    let batch = state.take(now).unwrap();
    assert_eq!(batch.operations.iter().map(|operation| operation.timeout_us).collect::<Vec<_>>(), [3000, 1]);
}

#[test]
fn what_is_out_of_time_is_told_whether_it_was_sent_and_the_next_deadline_is_known() {
    let now = Instant::now();
    let soon = now + Duration::from_millis(100);
    let mut state = LinkState::default();
    state.queue.insert(1, queued(1, now).0);
    state.queue.insert(2, queued(1, soon).0);
    state.flight.insert(3, queued(1, now).0.pending);
    state.flight.insert(4, queued(1, soon + SUSPECT_AFTER).0.pending);
    let (late, overdue) = state.sweep(now);
    assert_eq!(late.iter().map(|(_, sent)| *sent).collect::<Vec<_>>(), [false, true]);
    assert!(!overdue);
    assert_eq!(state.sweep_at, Some(soon));
    assert_eq!((state.queue.len(), state.flight.len()), (1, 1));
}

#[test]
fn an_answer_that_is_overdue_is_noticed_now_and_then() {
    let now = Instant::now();
    let far = now + Duration::from_secs(60);
    let mut state = LinkState::default();
    let mut pending = queued(1, far).0.pending;
    pending.begun = now;
    state.flight.insert(1, pending);
    assert!(!state.sweep(now).1);
    assert_eq!(state.sweep_at, Some(now + SUSPECT_AFTER));
    assert!(state.sweep(now + SUSPECT_AFTER).1);
    assert_eq!(state.sweep_at, Some(now + SUSPECT_AFTER * 2));
    state.flight.clear();
    assert!(!state.sweep(far).1);
    assert_eq!(state.sweep_at, None, "an idle link wakes nobody");
}

#[test]
fn an_answer_to_what_was_not_sent_or_not_asked_changes_nothing() {
    let link = Link::default();
    let (operation, mut word) = queued(1, Instant::now());
    link.state.lock().queue.insert(1, operation);
    let answer = |id| v1::Answer { id, reply: Some(answer::Reply::Put(v1::PutResponse::default())) };
    link.deliver(vec![answer(1), answer(7)]);
    assert!(word.try_recv().is_err());
    link.state.lock().take(Instant::now());
    link.deliver(vec![answer(1), answer(1)]);
    assert!(matches!(word.try_recv(), Ok(Word::Answer(_))));
}

#[test]
fn the_end_of_a_link_tells_what_was_sent_from_what_was_not() {
    let link = Link::default();
    let (sent, mut sent_word) = queued(1, Instant::now());
    let (waiting, mut waiting_word) = queued(1, Instant::now());
    {
        let mut state = link.state.lock();
        state.queue.insert(1, sent);
        state.take(Instant::now());
        state.queue.insert(2, waiting);
    }
    link.fail(&Failure::NotSent(Cause::text("broken")), &Failure::Lost(Cause::text("broken")));
    assert!(matches!(sent_word.try_recv(), Ok(Word::Failed(Failure::Lost(_)))));
    assert!(matches!(waiting_word.try_recv(), Ok(Word::Failed(Failure::NotSent(_)))));
}
