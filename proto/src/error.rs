//! Errors on the wire: a `tonic::Status` whose details carry one [`ErrorDetail`](crate::v1::ErrorDetail).
//!
//! The details travel as gRPC's standard asks (`google.rpc.Status` in `grpc-status-details-bin`), so that any
//! language's error library can read them.

use bytes::Bytes;
use prost::Message;
use tonic::{Code, Status};

use crate::ErrorCode;
use crate::v1::{ErrorDetail, Outcome};

const DETAIL_TYPE_URL: &str = "type.googleapis.com/d_engine.v1.ErrorDetail";

/// Where a request that failed may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryWhere {
    /// Nowhere: the same request fails again, or a repetition could apply it twice.
    Never,
    /// To the same node, later.
    Here,
    /// To the leader, or to any other node.
    Leader,
}

/// `google.rpc.Status`, of which only the details matter here.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<AnyMessage>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct AnyMessage {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// A status together with its machine-readable details.
#[derive(Clone, Debug, PartialEq)]
pub struct DetailedStatus {
    /// For people; not part of the protocol.
    pub message: String,
    /// For programs.
    pub detail: ErrorDetail,
}

impl DetailedStatus {
    /// The details of `status`, if a d-engine server wrote them.
    #[must_use]
    pub fn from_status(status: &Status) -> Option<Self> {
        let rpc = RpcStatus::decode(status.details()).ok()?;
        let any = rpc.details.into_iter().find(|any| any.type_url == DETAIL_TYPE_URL)?;
        Some(Self { message: status.message().to_owned(), detail: ErrorDetail::decode(any.value).ok()? })
    }

    /// The error code; `None` for a number from a newer server.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        ErrorCode::from_number(self.detail.code)
    }

    /// What became of the request. An outcome this version does not know is as good as unknown.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self.detail.outcome() {
            Outcome::Unspecified => Outcome::Unknown,
            outcome => outcome,
        }
    }
}

impl From<DetailedStatus> for Status {
    fn from(error: DetailedStatus) -> Self {
        let code = error.code().map_or(Code::Unknown, ErrorCode::grpc);
        let any = AnyMessage { type_url: DETAIL_TYPE_URL.to_owned(), value: error.detail.encode_to_vec().into() };
        let rpc = RpcStatus { code: code as i32, message: error.message.clone(), details: vec![any] };
        Status::with_details(code, error.message, rpc.encode_to_vec().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_survive_the_way_through_a_status() {
        let detail = ErrorDetail {
            code: ErrorCode::Behind.number(),
            outcome: Outcome::NotApplied as i32,
            retry_safe: true,
            backoff_ms: 7,
            leader: None,
            revision: 42,
        };
        let error = DetailedStatus { message: "node 2 is behind".to_owned(), detail };
        let status = Status::from(error.clone());
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(DetailedStatus::from_status(&status), Some(error));
    }

    #[test]
    fn a_status_without_details_has_none() {
        assert_eq!(DetailedStatus::from_status(&Status::unavailable("proxy")), None);
    }
}
