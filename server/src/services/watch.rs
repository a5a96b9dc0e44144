//! `d_engine.v1.Watch`: many watches on one stream.
//!
//! A service by hand rather than over the generated one, whose answers would be encoded for each watch: here an answer
//! with events is the number of the watch followed by bytes that all watches of a group share. Watches of a group that are
//! ready for the same events at the same time, and agree to it, have one answer, so that thousands on one stream cost a
//! few bytes each.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes};
use d_engine_proto::v1::{self, Outcome, watch_request::Action, watch_response::Kind, watch_server};
use d_engine_proto::{DetailedStatus, ErrorCode};
use futures_util::stream::{AbortHandle, Abortable, SelectAll};
use futures_util::{Stream, StreamExt, future};
use prost::Message;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{Body, BoxFuture, Service, StdError, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};

use super::error::{explain, status};
use crate::engine::{Engine, EngineError};
use crate::limits::{CLIENT_MESSAGE_BYTES_MAX, WATCH_WITHOUT_LEADER_MAX, WATCHES_PER_STREAM_MAX};
use crate::watch::{Delivery, Lane, Update, Watch, WatchError};

const METHOD: &str = "/d_engine.v1.Watch/Watch";
/// Fields of `WatchResponse`.
const WATCH_ID: u32 = 1;
const ALSO: u32 = 6;
/// Watches that join the answer of another; the rest has one more.
const JOINED_MAX: usize = 1023;

/// The service.
#[derive(Clone)]
pub(super) struct WatchService {
    engine: Engine,
}

impl WatchService {
    pub(super) fn new(engine: Engine) -> Self {
        Self { engine }
    }
}

impl NamedService for WatchService {
    const NAME: &'static str = watch_server::SERVICE_NAME;
}

impl<B> Service<http::Request<B>> for WatchService
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let call = Call(self.engine.clone());
        Box::pin(async move {
            if request.uri().path() != METHOD {
                return Ok(Status::unimplemented("").into_http());
            }
            let mut grpc = Grpc::new(WatchCodec).max_decoding_message_size(CLIENT_MESSAGE_BYTES_MAX);
            Ok(grpc.streaming(call, request).await)
        })
    }
}

struct Call(Engine);

impl StreamingService<v1::WatchRequest> for Call {
    type Response = Answer;
    type ResponseStream = Session;
    type Future = future::Ready<Result<Response<Session>, Status>>;

    fn call(&mut self, request: Request<Streaming<v1::WatchRequest>>) -> Self::Future {
        future::ready(Session::new(self.0.clone(), request.into_inner()).map(Response::new))
    }
}

/// An answer as it is sent.
enum Answer {
    Message(v1::WatchResponse),
    /// Events, encoded but for the watches they are for.
    Events {
        watch_id: u64,
        also: Vec<u64>,
        /// Whether all of them may be named in one answer.
        shared: bool,
        body: Bytes,
    },
}

impl Answer {
    fn new(watch_id: u64, kind: Kind) -> Self {
        Self::Message(v1::WatchResponse { watch_id, also: Vec::new(), kind: Some(kind) })
    }

    fn ended(watch_id: u64, error: &EngineError) -> Self {
        let message = error.to_string();
        Self::new(watch_id, Kind::Ended(v1::WatchEnded { error: Some(error.detail()), message }))
    }

    /// Takes in another watch's answer if it has the same events; gives it back if not.
    fn join(&mut self, other: Self) -> Option<Self> {
        if let (
            Self::Events { also, shared: true, body, .. },
            Self::Events { watch_id, shared: true, body: others, .. },
        ) = (self, &other)
            && std::ptr::eq(body.as_ref(), others.as_ref())
            && also.len() < JOINED_MAX
        {
            also.push(*watch_id);
            return None;
        }
        Some(other)
    }

    fn refused(watch_id: u64, code: ErrorCode, message: String) -> Self {
        let detail =
            v1::ErrorDetail { code: code.number(), outcome: Outcome::NotApplied as i32, ..v1::ErrorDetail::default() };
        Self::new(watch_id, Kind::Ended(v1::WatchEnded { error: Some(detail), message }))
    }
}

#[derive(Clone, Copy)]
struct WatchCodec;

impl Codec for WatchCodec {
    type Encode = Answer;
    type Decode = v1::WatchRequest;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for WatchCodec {
    type Item = Answer;
    type Error = Status;

    fn encode(&mut self, answer: Answer, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        match answer {
            // An `EncodeBuf` grows as needed.
            Answer::Message(message) => message.encode_raw(buffer),
            Answer::Events { watch_id, also, body, .. } => {
                if watch_id != 0 {
                    prost::encoding::uint64::encode(WATCH_ID, &watch_id, buffer);
                }
                prost::encoding::uint64::encode_packed(ALSO, &also, buffer);
                buffer.reserve(body.len());
                buffer.put_slice(&body);
            }
        }
        Ok(())
    }
}

impl Decoder for WatchCodec {
    type Item = v1::WatchRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<v1::WatchRequest>, Status> {
        v1::WatchRequest::decode(buffer).map(Some).map_err(|error| {
            let message = format!("the request is malformed: {error}");
            status(ErrorCode::InvalidArgument, Outcome::NotApplied, message)
        })
    }
}

/// The answers of one stream. Dropping it ends its watches.
struct Session {
    engine: Engine,
    requests: Streaming<v1::WatchRequest>,
    /// Whether the client may still send requests.
    open: bool,
    /// The watches of the moment. An aborted one is silent from then on.
    ids: HashMap<u64, AbortHandle>,
    watches: SelectAll<Abortable<Sending>>,
    /// What a watch answered, held back until no other is ready to join it.
    joint: Option<Answer>,
    lane: Lane,
    /// Ready when this node can no longer serve any watch.
    over: Pin<Box<dyn Future<Output = WatchError> + Send>>,
    ended: bool,
}

impl Session {
    fn new(engine: Engine, requests: Streaming<v1::WatchRequest>) -> Result<Self, Status> {
        let Some(hub) = engine.watches() else { return Err(stream_error(WatchError::Disabled)) };
        let (stopped, cut_off) = (hub.stopped(), cut_off(engine.clone()));
        let over = Box::pin(async move {
            tokio::select! {
                () = stopped => WatchError::Stopping,
                () = cut_off => WatchError::CutOff,
            }
        });
        let (ids, watches, lane) = (HashMap::new(), SelectAll::new(), Lane::default());
        Ok(Self { engine, requests, open: true, ids, watches, joint: None, lane, over, ended: false })
    }

    /// The answer to a request, if it has one.
    fn handle(&mut self, request: v1::WatchRequest) -> Option<Answer> {
        let id = request.watch_id;
        // Whatever is said of an id ends the watch it has, except that nothing is said.
        let existing = self.ids.remove(&id);
        if let Some(watch) = &existing {
            watch.abort();
        }
        Some(match request.action {
            Some(Action::Create(_)) if existing.is_some() => {
                let message = format!("watch {id} of this stream exists already, and is ended: give each its own id");
                Answer::refused(id, ErrorCode::InvalidArgument, message)
            }
            Some(Action::Create(create)) => match self.create(id, &create) {
                Ok(created) => Answer::new(id, Kind::Created(created)),
                Err(error) => Answer::ended(id, &error),
            },
            Some(Action::Cancel(_)) => {
                existing?;
                Answer::refused(id, ErrorCode::Cancelled, "the watch was cancelled".to_owned())
            }
            None => Answer::refused(id, ErrorCode::InvalidArgument, "action is missing".to_owned()),
        })
    }

    fn create(&mut self, id: u64, create: &v1::WatchCreate) -> Result<v1::WatchCreated, EngineError> {
        if self.ids.len() >= WATCHES_PER_STREAM_MAX {
            let limit = "watches_per_stream_max";
            return Err(WatchError::TooMany { max: WATCHES_PER_STREAM_MAX, limit }.into());
        }
        let watch = self.engine.watch_in(create, &self.lane)?;
        let header = self.engine.header(watch.applied());
        let created = v1::WatchCreated { header, from_revision: watch.from().get() };
        let (handle, registration) = AbortHandle::new_pair();
        self.ids.insert(id, handle);
        let sending = Sending { id, shared: create.shared, watch, delivery: None };
        self.watches.push(Abortable::new(sending, registration));
        Ok(created)
    }

    /// The next answer of a watch. Those of one watch stay in their order.
    fn next_answer(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Answer, Status>>> {
        loop {
            let answer = match self.watches.poll_next_unpin(context) {
                Poll::Ready(Some(Sent::Answer(answer))) => answer,
                Poll::Ready(Some(Sent::Ended(_, WatchError::Stopping))) => {
                    return self.end(stream_error(WatchError::Stopping));
                }
                Poll::Ready(Some(Sent::Ended(id, error))) => {
                    self.ids.remove(&id);
                    Answer::ended(id, &error.into())
                }
                // Nobody is there to join it.
                Poll::Ready(None) | Poll::Pending if self.joint.is_some() => {
                    return Poll::Ready(self.joint.take().map(Ok));
                }
                // Without watches there is only the client to wait for.
                Poll::Ready(None) if self.open => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            };
            match &mut self.joint {
                None => self.joint = Some(answer),
                Some(joint) => {
                    if let Some(next) = joint.join(answer) {
                        return Poll::Ready(self.joint.replace(next).map(Ok));
                    }
                }
            }
        }
    }

    fn end(&mut self, status: Status) -> Poll<Option<Result<Answer, Status>>> {
        self.ended = true;
        Poll::Ready(Some(Err(status)))
    }
}

impl Stream for Session {
    type Item = Result<Answer, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        if let Poll::Ready(error) = this.over.as_mut().poll(context) {
            return this.end(stream_error(error));
        }
        while this.open {
            match this.requests.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(request))) => {
                    // What a watch had to say before goes first.
                    match (this.handle(request), this.joint.take()) {
                        (Some(answer), Some(joint)) => {
                            this.joint = Some(answer);
                            return Poll::Ready(Some(Ok(joint)));
                        }
                        (Some(answer), None) => return Poll::Ready(Some(Ok(answer))),
                        (None, joint) => this.joint = joint,
                    }
                }
                Poll::Ready(Some(Err(refusal))) => {
                    let detailed = DetailedStatus::from_status(&refusal).is_some();
                    return this.end(if detailed { refusal } else { explain(&refusal) });
                }
                Poll::Ready(None) => this.open = false,
                Poll::Pending => break,
            }
        }
        this.next_answer(context)
    }
}

/// A watch on its way into a stream.
struct Sending {
    id: u64,
    /// Whether its answers may be those of others, too.
    shared: bool,
    watch: Watch,
    /// A delivery of which so many frames are sent.
    delivery: Option<(Arc<Delivery>, usize)>,
}

enum Sent {
    Answer(Answer),
    Ended(u64, WatchError),
}

impl Stream for Sending {
    type Item = Sent;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Sent>> {
        let this = self.get_mut();
        let (watch_id, shared) = (this.id, this.shared);
        loop {
            if let Some((delivery, sent)) = &mut this.delivery {
                if let Some(body) = delivery.frames().get(*sent) {
                    *sent += 1;
                    return Poll::Ready(Some(Sent::Answer(Answer::Events {
                        watch_id,
                        also: Vec::new(),
                        shared,
                        body: body.clone(),
                    })));
                }
                this.delivery = None;
            }
            let sent = match std::task::ready!(this.watch.poll_next(context)) {
                Some(Ok(Update::Events(delivery))) => {
                    this.delivery = Some((delivery, 0));
                    continue;
                }
                Some(Ok(Update::Bookmark(revision))) => {
                    let bookmark = v1::WatchBookmark { revision: revision.get() };
                    Sent::Answer(Answer::new(watch_id, Kind::Bookmark(bookmark)))
                }
                Some(Err(error)) => Sent::Ended(watch_id, error),
                None => return Poll::Ready(None),
            };
            return Poll::Ready(Some(sent));
        }
    }
}

/// Ready once this node has known no leader for [`WATCH_WITHOUT_LEADER_MAX`]. A watch on it would be silent, for all its
/// client can see, while a majority may go on without this node.
async fn cut_off(engine: Engine) {
    let mut leader = engine.consensus().leader_changes();
    // An end of the channel is the end of the node, which has its own error.
    while leader.wait_for(Option::is_none).await.is_ok() {
        match tokio::time::timeout(WATCH_WITHOUT_LEADER_MAX, leader.wait_for(Option::is_some)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => break,
            Err(_) => return,
        }
    }
    future::pending::<()>().await;
}

fn stream_error(error: WatchError) -> Status {
    let error = EngineError::from(error);
    DetailedStatus { message: error.to_string(), detail: error.detail() }.into()
}
