//! `d_engine.v1.Pipeline`: many operations on one stream.
//!
//! A service by hand rather than over the generated one: a message is taken apart operation by operation, so that what
//! there is no room for yet stays in its bytes, and the keys and values of the others are parts of them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use d_engine_proto::ErrorCode;
use d_engine_proto::v1::{self, Outcome, answer::Reply, pipeline_server};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream, StreamExt, future};
use prost::encoding::{DecodeContext, WireType, decode_key, skip_field};
use prost::{DecodeError, Message};
use tokio::sync::watch;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{Body, Service, StdError, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Code, Request, Response, Status, Streaming};

use super::deadline::Deadlines;
use super::error::status;
use crate::engine::{Answered, Deadline, Engine, Pipeline};
use crate::limits::{
    CLIENT_MESSAGE_BYTES_MAX, PIPELINE_BATCH_BYTES_MAX, PIPELINE_MESSAGES_PER_TURN, REQUEST_BYTES_MAX,
};
use crate::metrics::Metrics;
use crate::trace;

const METHOD: &str = "/d_engine.v1.Pipeline/Exchange";
/// Field of `OperationBatch`.
const OPERATIONS: u32 = 1;

/// The service.
#[derive(Clone)]
pub(super) struct PipelineService {
    engine: Engine,
    deadlines: Deadlines,
    metrics: Arc<Metrics>,
    /// Whether the server stops.
    draining: watch::Receiver<bool>,
}

impl PipelineService {
    pub(super) fn new(
        engine: Engine,
        deadlines: Deadlines,
        metrics: Arc<Metrics>,
        draining: watch::Receiver<bool>,
    ) -> Self {
        Self { engine, deadlines, metrics, draining }
    }
}

impl NamedService for PipelineService {
    const NAME: &'static str = pipeline_server::SERVICE_NAME;
}

impl<B> Service<http::Request<B>> for PipelineService
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let call = Call(self.clone());
        Box::pin(async move {
            if request.uri().path() != METHOD {
                return Ok(Status::unimplemented("").into_http());
            }
            let mut grpc = Grpc::new(PipelineCodec).max_decoding_message_size(CLIENT_MESSAGE_BYTES_MAX);
            Ok(grpc.streaming(call, request).await)
        })
    }
}

struct Call(PipelineService);

impl StreamingService<Bytes> for Call {
    type Response = v1::AnswerBatch;
    type ResponseStream = Session;
    type Future = future::Ready<Result<Response<Session>, Status>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        future::ok(Response::new(Session::new(self.0.clone(), request.into_inner())))
    }
}

/// Answers are encoded; operations stay bytes.
#[derive(Clone, Copy)]
struct PipelineCodec;

impl Codec for PipelineCodec {
    type Encode = v1::AnswerBatch;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for PipelineCodec {
    type Item = v1::AnswerBatch;
    type Error = Status;

    fn encode(&mut self, answers: v1::AnswerBatch, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        // An `EncodeBuf` grows as needed.
        answers.encode_raw(buffer);
        Ok(())
    }
}

impl Decoder for PipelineCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// The answers of one stream. Dropping it withdraws what can be withdrawn.
struct Session {
    pipeline: Pipeline,
    deadlines: Deadlines,
    metrics: Arc<Metrics>,
    requests: Streaming<Bytes>,
    /// Whether the client may still send operations.
    open: bool,
    /// What is left of the message at hand.
    message: Bytes,
    /// Ready when the client is to be told that this server stops; `None` once it is told.
    draining: Option<BoxFuture<'static, ()>>,
    /// What ends the stream before its time, once the answers that are there are sent.
    mistake: Option<Status>,
    ended: bool,
}

impl Session {
    fn new(service: PipelineService, requests: Streaming<Bytes>) -> Self {
        let PipelineService { engine, deadlines, metrics, mut draining } = service;
        let draining = async move {
            // A server that is gone has stopped.
            let _ = draining.wait_for(|draining| *draining).await;
        };
        Self {
            pipeline: Pipeline::new(engine),
            deadlines,
            metrics,
            requests,
            open: true,
            message: Bytes::new(),
            draining: Some(draining.boxed()),
            mistake: None,
            ended: false,
        }
    }

    /// Begins operations while there is room for them.
    fn take_in(&mut self, context: &mut Context<'_>) -> Result<(), Status> {
        let mut messages = 0;
        while self.pipeline.has_room() {
            if self.message.has_remaining() {
                self.begin_next()?;
                continue;
            }
            if !self.open || messages == PIPELINE_MESSAGES_PER_TURN {
                if self.open {
                    context.waker().wake_by_ref();
                }
                return Ok(());
            }
            match self.requests.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(message))) => {
                    messages += 1;
                    self.message = message;
                    self.pipeline.arrive();
                }
                Poll::Ready(Some(Err(refusal))) => return Err(refused(&refusal)),
                Poll::Ready(None) => self.open = false,
                Poll::Pending => return Ok(()),
            }
        }
        Ok(())
    }

    /// Begins the next operation of the message at hand.
    fn begin_next(&mut self) -> Result<(), Status> {
        let Some((operation, bytes)) = next_operation(&mut self.message).map_err(malformed)? else { return Ok(()) };
        let timeout = self.deadlines.of_operation(operation.timeout_us);
        self.pipeline.begin(operation, bytes, timeout).map_err(|misuse| mistake(misuse.to_string()))
    }

    /// The next message with answers, if there are any.
    fn answers(&mut self) -> Option<v1::AnswerBatch> {
        let now = Deadline::now();
        let mut answers = Vec::new();
        self.metrics.requests(self.pipeline.take_answers().map(|Answered { answer, origin, .. }| {
            let code = code(&answer);
            trace::ended(&origin.call, code);
            answers.push(answer);
            (origin.method, code, now.duration_since(origin.began))
        }));
        (!answers.is_empty()).then_some(v1::AnswerBatch { answers, draining: false })
    }
}

impl Stream for Session {
    type Item = Result<v1::AnswerBatch, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        if let Some(draining) = &mut this.draining
            && draining.poll_unpin(context).is_ready()
        {
            this.draining = None;
            return Poll::Ready(Some(Ok(v1::AnswerBatch { answers: Vec::new(), draining: true })));
        }
        // Whoever has enough to send goes on when that is under way.
        if !this.pipeline.is_full() {
            if this.mistake.is_none()
                && let Err(status) = this.take_in(context)
            {
                this.mistake = Some(status);
            }
            this.pipeline.poll(context);
        }
        match (this.answers(), this.mistake.take()) {
            (Some(answers), mistake) => {
                this.mistake = mistake;
                Poll::Ready(Some(Ok(answers)))
            }
            (None, Some(mistake)) => {
                this.ended = true;
                Poll::Ready(Some(Err(mistake)))
            }
            (None, None) if !this.open && this.message.is_empty() && this.pipeline.is_idle() => Poll::Ready(None),
            (None, None) => Poll::Pending,
        }
    }
}

/// Cuts the next operation off a message. `None` at its end.
fn next_operation(message: &mut Bytes) -> Result<Option<(v1::Operation, usize)>, DecodeError> {
    while message.has_remaining() {
        let (field, wire_type) = decode_key(message)?;
        if (field, wire_type) == (OPERATIONS, WireType::LengthDelimited) {
            let before = message.remaining();
            let operation = v1::Operation::decode_length_delimited(&mut *message)?;
            return Ok(Some((operation, before - message.remaining())));
        }
        // Of a newer version.
        skip_field(wire_type, field, message, DecodeContext::default())?;
    }
    Ok(None)
}

/// The name of the code of an answer.
fn code(answer: &v1::Answer) -> &'static str {
    match &answer.reply {
        Some(Reply::Error(error)) => {
            let code = error.detail.as_ref().and_then(|detail| ErrorCode::from_number(detail.code));
            code.map_or("unknown", |code| code.name())
        }
        _ => "Ok",
    }
}

/// Nobody can tell what became of the operations that are not answered.
fn mistake(message: String) -> Status {
    status(ErrorCode::InvalidArgument, Outcome::Unknown, message)
}

fn malformed(error: DecodeError) -> Status {
    mistake(format!("the message is malformed: {error}; send what pipeline.proto describes"))
}

/// The end of a stream whose client is gone, or sent what cannot be read.
fn refused(refusal: &Status) -> Status {
    match refusal.code() {
        Code::OutOfRange => {
            let message = format!(
                "a message exceeds the limit of {CLIENT_MESSAGE_BYTES_MAX} bytes: send at most \
                 {PIPELINE_BATCH_BYTES_MAX} bytes of operations in one (pipeline_batch_bytes_max), and none above \
                 {REQUEST_BYTES_MAX} (request_bytes_max)"
            );
            status(ErrorCode::ResourceExhausted, Outcome::Unknown, message)
        }
        _ => mistake(format!("the message cannot be read: {}", refusal.message())),
    }
}
