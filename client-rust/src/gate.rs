//! Proof that a request was not sent.
//!
//! Whether a write may be sent again hangs on this: did anything of its message leave the process? Error types of the
//! transport do not tell for sure, so the request's body passes a gate. The transport opens it when it takes the first
//! byte of the message; whoever gives up on the request closes it. A gate that was closed before it was opened stays
//! closed, also for a request that still waits somewhere in a queue: a server cannot apply a message it never gets.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tonic::Status;
use tonic::codegen::{Service, http};
use tonic::transport::Channel;

const WAITING: u8 = 0;
const PASSED: u8 = 1;
const CLOSED: u8 = 2;

/// One request's gate.
#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicU8);

impl Gate {
    /// Ends the request. True if nothing of its message has passed, nor ever will.
    pub(crate) fn close(&self) -> bool {
        match self.0.compare_exchange(WAITING, CLOSED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(state) => state == CLOSED,
        }
    }

    fn pass(&self) -> bool {
        match self.0.compare_exchange(WAITING, PASSED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(state) => state == PASSED,
        }
    }
}

/// A request body behind its gate.
#[derive(Debug)]
struct Gated {
    body: tonic::body::Body,
    gate: Arc<Gate>,
}

impl Body for Gated {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.gate.pass() {
            Pin::new(&mut self.body).poll_frame(cx)
        } else {
            // An error resets the stream; an early end could be taken for an empty message.
            Poll::Ready(Some(Err(Status::cancelled("the request was withdrawn"))))
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A channel for one request, whose body passes `gate`.
#[derive(Debug)]
pub(crate) struct GatedChannel {
    pub(crate) channel: Channel,
    pub(crate) gate: Arc<Gate>,
}

impl Service<http::Request<tonic::body::Body>> for GatedChannel {
    type Response = <Channel as Service<http::Request<tonic::body::Body>>>::Response;
    type Error = <Channel as Service<http::Request<tonic::body::Body>>>::Error;
    type Future = <Channel as Service<http::Request<tonic::body::Body>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::poll_ready(&mut self.channel, cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let gate = Arc::clone(&self.gate);
        Service::call(&mut self.channel, request.map(|body| tonic::body::Body::new(Gated { body, gate })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_is_passed_or_closed_but_never_both() {
        let closed = Gate::default();
        assert!(closed.close() && closed.close());
        assert!(!closed.pass());
        let passed = Gate::default();
        assert!(passed.pass() && passed.pass());
        assert!(!passed.close());
    }

    #[test]
    fn closing_and_passing_at_once_has_one_winner() {
        for _ in 0..1000 {
            let gate = Arc::new(Gate::default());
            let other = Arc::clone(&gate);
            let passer = std::thread::spawn(move || other.pass());
            let closed = gate.close();
            assert_ne!(closed, passer.join().unwrap());
        }
    }
}
