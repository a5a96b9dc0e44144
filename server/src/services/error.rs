//! Errors on their way out: of a call, as a status with details; of the server itself.

use std::io;

use d_engine_proto::v1::{ErrorDetail, Outcome};
use d_engine_proto::{DetailedStatus, ErrorCode, RetryWhere};
use tonic::{Code, Response, Status};

use crate::engine::EngineError;
use crate::limits::REQUEST_BYTES_MAX;

/// Why a port cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Something else listens there.
    #[error("cannot listen on {address}: it is in use; stop the process that has it, or choose another port")]
    AddressInUse {
        /// The address, as configured.
        address: String,
    },
    /// The machine has no such address, or this user may not have that port.
    #[error("cannot listen on {address}: {source}; choose an address of this machine and a port this user may have")]
    Bind {
        /// The address, as configured.
        address: String,
        /// What the operating system says.
        #[source]
        source: io::Error,
    },
    /// Serving ended with an error.
    #[error("serving ended: {message}; restart the node")]
    Ended {
        /// What happened.
        message: String,
    },
}

/// The answer to a call.
pub(super) fn answer<T>(result: Result<T, EngineError>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(refusal)
}

/// An error of a call, with its details.
pub(super) fn refusal(error: EngineError) -> Status {
    DetailedStatus { message: error.to_string(), detail: error.detail() }.into()
}

/// A status with details, for what fails before the engine is asked.
pub(super) fn status(code: ErrorCode, outcome: Outcome, message: String) -> Status {
    let retry_safe = outcome == Outcome::NotApplied && code.retry() != RetryWhere::Never;
    let detail = ErrorDetail { code: code.number(), outcome: outcome as i32, retry_safe, ..ErrorDetail::default() };
    DetailedStatus { message, detail }.into()
}

/// Gives details to a refusal of tonic's own. Whatever it refuses has not reached a service, so nothing was applied.
pub(super) fn explain(refusal: &Status) -> Status {
    let (code, message) = match refusal.code() {
        Code::OutOfRange => {
            let limit = format!("the request exceeds the limit of {REQUEST_BYTES_MAX} bytes (request_bytes_max)");
            (ErrorCode::ResourceExhausted, limit)
        }
        Code::Unimplemented if refusal.message().is_empty() => {
            (ErrorCode::Unsupported, "this server has no such method".to_owned())
        }
        Code::Unimplemented => (ErrorCode::Unsupported, refusal.message().to_owned()),
        _ => (ErrorCode::InvalidArgument, format!("the request is malformed: {}", refusal.message())),
    };
    status(code, Outcome::NotApplied, message)
}
