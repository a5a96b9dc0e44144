//! One stream of appends to one peer: requests out, answers in, in the same order.
//!
//! openraft credits an answer that matches up to X with the send time of the *newest* request that ends at X, and takes
//! that time as the moment until which the peer is known to follow this leader. A request that only tells a new commit
//! position ends where the one before it ends, so that an old answer would vouch for a newer request:
//! ```text
//! leader A                                 peer B
//! R1: entries up to X        ────────────► stores them, answers, then follows leader C
//! R2: commit, still up to X  ──────╮
//! answer to R1 arrives             │       "heard from B after R2 was sent": the lease is renewed,
//!                                  ╰─────► a read is confirmed, both wrongly
//! ```
//! Hence an answer is passed on only once no unanswered request ends where it does; the last of them says the same.
//! And requests are taken from openraft only while it polls for an answer, in one task, so that none can slip in between
//! this decision and openraft's own accounting.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use d_engine_proto::v1;
use futures_util::{Stream, StreamExt, ready};
use openraft::errors::RPCError;
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::PollSender;
use tonic::Status;

use super::network::{ToldCommit, append_result_from_wire, append_to_wire, unreachable};
use super::raft_types::{LogId, Types};

type Answer = Result<StreamAppendResult<Types>, RPCError<Types>>;

/// The answers, as openraft wants them; polling it sends the requests.
pub(super) struct Appends<S, R> {
    /// Taken from the stream before it was opened.
    first: Option<AppendEntriesRequest<Types>>,
    /// `None` once it has ended, or the peer's end is gone.
    input: Option<(S, PollSender<v1::AppendRequest>)>,
    /// Goes along with the first request.
    route: Option<v1::Route>,
    told_commit: Arc<ToldCommit>,
    responses: R,
    /// Where each request that has no answer yet ends.
    unanswered: VecDeque<Option<LogId>>,
    /// When the peer is given up, unless it answers.
    patience: Pin<Box<Sleep>>,
    stall: Duration,
    ended: bool,
}

impl<S, R> Appends<S, R>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + Unpin,
    R: Stream<Item = Result<v1::AppendResponse, Status>> + Unpin,
{
    pub(super) fn new(
        first: AppendEntriesRequest<Types>,
        input: S,
        route: Option<v1::Route>,
        told_commit: Arc<ToldCommit>,
        requests: mpsc::Sender<v1::AppendRequest>,
        responses: R,
        stall: Duration,
    ) -> Self {
        Self {
            first: Some(first),
            input: Some((input, PollSender::new(requests))),
            route,
            told_commit,
            responses,
            unanswered: VecDeque::new(),
            patience: Box::pin(tokio::time::sleep(stall)),
            stall,
            ended: false,
        }
    }

    /// Sends what openraft has to send and the connection takes. Always leaves a waker behind.
    fn send(&mut self, context: &mut Context<'_>) {
        while let Some((input, sender)) = &mut self.input {
            match sender.poll_reserve(context) {
                Poll::Pending => return,
                // The peer's end is gone; the responses tell why.
                Poll::Ready(Err(_)) => {
                    self.input = None;
                    return;
                }
                Poll::Ready(Ok(())) => {}
            }
            let request = match self.first.take() {
                Some(first) => Some(first),
                None => match input.poll_next_unpin(context) {
                    Poll::Pending => return,
                    Poll::Ready(request) => request,
                },
            };
            let Some(request) = request else {
                self.input = None;
                return;
            };
            if self.unanswered.is_empty() {
                self.patience.as_mut().reset(Instant::now() + self.stall);
            }
            let end = request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id);
            self.unanswered.push_back(end);
            self.told_commit.tell(request.leader_commit.as_ref());
            // Cannot fail: the place was reserved, and the responses tell of a peer that is gone.
            let _ = sender.send_item(append_to_wire(self.route.take(), request));
        }
    }

    fn receive(&mut self, context: &mut Context<'_>) -> Poll<Option<Answer>> {
        loop {
            let Some(response) = ready!(self.responses.poll_next_unpin(context)) else { return Poll::Ready(None) };
            self.patience.as_mut().reset(Instant::now() + self.stall);
            self.unanswered.pop_front();
            let answer = response.map_err(unreachable).and_then(append_result_from_wire);
            match &answer {
                Ok(Ok(matched)) if self.unanswered.front().is_some_and(|end| end <= matched) => {}
                _ => return Poll::Ready(Some(answer)),
            }
        }
    }
}

impl<S, R> Stream for Appends<S, R>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + Unpin,
    R: Stream<Item = Result<v1::AppendResponse, Status>> + Unpin,
{
    type Item = Answer;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Answer>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        this.send(context);
        let answer = match this.receive(context) {
            Poll::Ready(answer) => answer,
            Poll::Pending if this.unanswered.is_empty() => return Poll::Pending,
            Poll::Pending => {
                ready!(this.patience.as_mut().poll(context));
                Some(Err(unreachable(Status::deadline_exceeded("the peer stopped answering appends"))))
            }
        };
        // Whatever is not a match ends the stream; openraft starts another.
        this.ended = !matches!(answer, Some(Ok(Ok(_))));
        Poll::Ready(answer)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;
    use openraft::errors::RPCError;
    use openraft::raft::StreamAppendError;
    use tokio_stream::wrappers::ReceiverStream;

    use super::super::network::append_result_to_wire;
    use super::super::raft_types::{Entry, Payload, RaftVote};
    use super::*;

    fn id(index: u64) -> LogId {
        LogId::new_term_index(1, index)
    }

    /// Entries after `previous` up to `last`; none if they are equal.
    fn request(previous: u64, last: u64) -> AppendEntriesRequest<Types> {
        AppendEntriesRequest {
            vote: RaftVote::new_committed(1, 1),
            prev_log_id: Some(id(previous)),
            entries: (previous + 1..=last).map(|index| Entry { log_id: id(index), payload: Payload::Blank }).collect(),
            leader_commit: None,
        }
    }

    struct Peer {
        requests: mpsc::Sender<AppendEntriesRequest<Types>>,
        sent: mpsc::Receiver<v1::AppendRequest>,
        answers: mpsc::Sender<Result<v1::AppendResponse, Status>>,
    }

    impl Peer {
        async fn matches(&self, last: u64) {
            let response = append_result_to_wire(&Ok(Some(id(last))));
            self.answers.send(Ok(response)).await.unwrap();
        }
    }

    fn open(first: AppendEntriesRequest<Types>) -> (impl Stream<Item = Answer> + Unpin, Peer) {
        let (requests, input) = mpsc::channel(16);
        let (outgoing, sent) = mpsc::channel(16);
        let (answers, responses) = mpsc::channel(16);
        let (input, responses) = (ReceiverStream::new(input), ReceiverStream::new(responses));
        let appends = Appends::new(first, input, None, Arc::default(), outgoing, responses, Duration::from_secs(5));
        (appends, Peer { requests, sent, answers })
    }

    #[tokio::test]
    async fn an_answer_does_not_vouch_for_a_later_request_that_ends_where_it_does() {
        let (mut appends, mut peer) = open(request(0, 3));
        assert!(poll!(appends.next()).is_pending());
        peer.requests.send(request(3, 3)).await.unwrap();
        assert!(poll!(appends.next()).is_pending());
        assert_eq!(peer.sent.try_recv().unwrap().entries.len(), 3);
        assert_eq!(peer.sent.try_recv().unwrap().entries.len(), 0);
        peer.matches(3).await;
        assert!(poll!(appends.next()).is_pending(), "only the first request is answered");
        peer.matches(3).await;
        assert_eq!(appends.next().await.unwrap().unwrap(), Ok(Some(id(3))));
    }

    #[tokio::test]
    async fn answers_to_requests_with_entries_are_passed_on_one_by_one() {
        let (mut appends, peer) = open(request(0, 1));
        peer.requests.send(request(1, 2)).await.unwrap();
        assert!(poll!(appends.next()).is_pending());
        peer.matches(1).await;
        assert_eq!(appends.next().await.unwrap().unwrap(), Ok(Some(id(1))));
        peer.matches(2).await;
        assert_eq!(appends.next().await.unwrap().unwrap(), Ok(Some(id(2))));
    }

    #[tokio::test]
    async fn a_conflict_is_passed_on_at_once_and_ends_the_stream() {
        let (mut appends, peer) = open(request(3, 3));
        peer.requests.send(request(3, 3)).await.unwrap();
        assert!(poll!(appends.next()).is_pending());
        peer.answers.send(Ok(append_result_to_wire(&Err(StreamAppendError::Conflict(id(3)))))).await.unwrap();
        assert_eq!(appends.next().await.unwrap().unwrap(), Err(StreamAppendError::Conflict(id(3))));
        assert!(appends.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_stops_answering_is_given_up_and_an_idle_one_is_not() {
        let (mut appends, peer) = open(request(0, 1));
        assert!(poll!(appends.next()).is_pending());
        peer.matches(1).await;
        assert_eq!(appends.next().await.unwrap().unwrap(), Ok(Some(id(1))));
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(poll!(appends.next()).is_pending(), "nothing is unanswered");
        peer.requests.send(request(1, 2)).await.unwrap();
        assert!(poll!(appends.next()).is_pending());
        tokio::time::advance(Duration::from_secs(6)).await;
        assert!(matches!(appends.next().await, Some(Err(RPCError::Unreachable(_)))));
    }
}
