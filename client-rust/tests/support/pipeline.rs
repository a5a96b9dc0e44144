//! The pipeline of a fake node: it feeds each operation to the node's unary calls, and misbehaves as a test tells it.

#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::time::Duration;

use d_engine_proto::v1::pipeline_server::Pipeline;
use d_engine_proto::v1::{self, answer, operation};
use d_engine_proto::{DetailedStatus, ErrorCode};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// What a pipeline does besides answering.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Manner {
    #[default]
    Serve,
    /// There is none.
    Missing,
    /// The stream is refused with `Unavailable`.
    Refuse,
    /// Says that it drains with the first answers, and breaks a stream on which more comes after that.
    Drain,
    /// Answers everything twice, and what nobody asked.
    Stutter,
    /// Ends with an error after so many messages with answers.
    Cut(u32),
    /// Takes no message.
    Deaf,
}

/// A node that carries operations out.
pub(crate) trait Operate: Clone + Send + Sync + 'static {
    fn operate(
        &self,
        operation: operation::Request,
        timeout: Duration,
        trace: Option<v1::TraceContext>,
    ) -> impl Future<Output = Result<answer::Reply, Status>> + Send;

    fn manner(&self) -> Manner {
        Manner::Serve
    }

    /// Takes note of a message and of the operations in it.
    fn received(&self, _: &v1::OperationBatch) {}
}

/// Carries operations out by unary calls of the same name.
macro_rules! operate_by_calls {
    ($operation:expr, $service:expr, $timeout:expr, $trace:expr; $($variant:ident: $trait:ident::$method:ident,)*) => {
        match $operation {
            $(operation::Request::$variant(message) => {
                let mut request = Request::new(message);
                request.set_timeout($timeout);
                if let Some(header) = $trace.and_then(|trace| trace.to_traceparent()?.parse().ok()) {
                    request.metadata_mut().insert(d_engine_proto::TRACEPARENT, header);
                }
                $trait::$method($service, request).await.map(|answer| answer::Reply::$variant(answer.into_inner()))
            })*
            other => Err(Status::unimplemented(format!("{other:?}"))),
        }
    };
}
pub(crate) use operate_by_calls;

#[derive(Clone)]
pub(crate) struct PipelineOf<S>(pub(crate) S);

#[tonic::async_trait]
impl<S: Operate> Pipeline for PipelineOf<S> {
    type ExchangeStream = ReceiverStream<Result<v1::AnswerBatch, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<v1::OperationBatch>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        match self.0.manner() {
            Manner::Missing => return Err(Status::unimplemented("no such service")),
            Manner::Refuse => return Err(refusal(ErrorCode::Unavailable, v1::Outcome::NotApplied).into()),
            _ => {}
        }
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(serve(self.0.clone(), request.into_inner(), sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

fn refusal(code: ErrorCode, outcome: v1::Outcome) -> DetailedStatus {
    let detail = v1::ErrorDetail { code: code.number(), outcome: outcome.into(), ..v1::ErrorDetail::default() };
    DetailedStatus { message: code.meaning().to_owned(), detail }
}

/// Ends when the node hears again.
async fn deafness<S: Operate>(service: &S) {
    while service.manner() == Manner::Deaf {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

type Done = (u64, Result<answer::Reply, Status>);

/// One stream, until the client has ended its half and all is answered.
async fn serve<S: Operate>(
    service: S,
    mut batches: Streaming<v1::OperationBatch>,
    sender: mpsc::Sender<Result<v1::AnswerBatch, Status>>,
) {
    let mut work: JoinSet<Done> = JoinSet::new();
    let mut running: HashMap<u64, AbortHandle> = HashMap::new();
    let (mut open, mut messages, mut drained) = (true, 0, false);
    while open || !running.is_empty() {
        let mut done: Vec<Done> = Vec::new();
        tokio::select! {
            batch = batches.message(), if open && service.manner() != Manner::Deaf => match batch {
                Ok(Some(_)) if drained => return drop(sender.send(Err(Status::unavailable("it drains"))).await),
                Ok(Some(batch)) => {
                    service.received(&batch);
                    for v1::Operation { id, timeout_us, request, trace } in batch.operations {
                        match request {
                            Some(operation::Request::Cancel(_)) => {
                                if let Some(task) = running.remove(&id) {
                                    task.abort();
                                    done.push((id, Err(refusal(ErrorCode::Cancelled, v1::Outcome::Unknown).into())));
                                }
                            }
                            Some(request) => {
                                let (service, timeout) = (service.clone(), Duration::from_micros(timeout_us));
                                let task = work.spawn(async move { (id, service.operate(request, timeout, trace).await) });
                                assert!(running.insert(id, task).is_none(), "id {id} is in flight twice");
                            }
                            None => panic!("an operation without a request"),
                        }
                    }
                }
                Ok(None) => open = false,
                Err(_) => return,
            },
            Some(first) = work.join_next() => done.extend(first.ok()),
            () = sender.closed() => return,
            () = deafness(&service), if service.manner() == Manner::Deaf => {}
        }
        while let Some(next) = work.try_join_next() {
            done.extend(next.ok());
        }
        if done.is_empty() {
            continue;
        }
        let mut answers = Vec::new();
        for (id, result) in done {
            running.remove(&id);
            let reply = match result {
                Ok(reply) => reply,
                Err(status) => match DetailedStatus::from_status(&status) {
                    Some(DetailedStatus { message, detail }) => {
                        answer::Reply::Error(v1::OperationError { detail: Some(detail), message })
                    }
                    None if status.code() == tonic::Code::Unimplemented => {
                        let DetailedStatus { message, detail } =
                            refusal(ErrorCode::Unsupported, v1::Outcome::NotApplied);
                        answer::Reply::Error(v1::OperationError { detail: Some(detail), message })
                    }
                    // What no d-engine server says of an operation breaks the stream.
                    None => return drop(sender.send(Err(status)).await),
                },
            };
            answers.push(v1::Answer { id, reply: Some(reply) });
        }
        messages += 1;
        let manner = service.manner();
        match manner {
            Manner::Cut(after) if messages > after => {
                return drop(sender.send(Err(Status::unavailable("cut off"))).await);
            }
            Manner::Stutter => {
                let again: Vec<_> = answers
                    .iter()
                    .cloned()
                    .chain(answers.first().map(|answer| v1::Answer { id: u64::MAX, ..answer.clone() }))
                    .collect();
                answers.extend(again);
            }
            _ => {}
        }
        drained |= manner == Manner::Drain;
        if sender.send(Ok(v1::AnswerBatch { answers, draining: manner == Manner::Drain })).await.is_err() {
            return;
        }
    }
}
