//! Writes: checked, encoded once, proposed, and their answers told apart.

use bytes::{Bytes, BytesMut};
use d_engine_proto::v1::{self, command::Command as Change, command_reply::Reply, txn_operation::Operation};
use d_engine_proto::{ErrorCode, Revision};
use prost::Message;
use tracing::Instrument;

use super::reads::check_txn;
use super::{Deadline, Engine, EngineError, TURN, check_size, late, refusal, sessions};
use crate::consensus::ProposeError;
use crate::state_machine::kv::{self, PastStore, Store};
use crate::trace;

impl Engine {
    /// Writes one key.
    ///
    /// # Errors
    /// See [`EngineError`]; its detail tells whether the write can have taken effect. So with every write.
    pub async fn put(&self, request: v1::PutRequest, deadline: Deadline) -> Result<v1::PutResponse, EngineError> {
        let (header, reply) = self.propose(Change::Put(request), deadline).await?;
        match reply {
            Reply::Put(response) => Ok(v1::PutResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Deletes one key.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn delete(
        &self,
        request: v1::DeleteRequest,
        deadline: Deadline,
    ) -> Result<v1::DeleteResponse, EngineError> {
        let (header, reply) = self.propose(Change::Delete(request), deadline).await?;
        match reply {
            Reply::Delete(response) => Ok(v1::DeleteResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Deletes an interval of keys.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn delete_range(
        &self,
        request: v1::DeleteRangeRequest,
        deadline: Deadline,
    ) -> Result<v1::DeleteRangeResponse, EngineError> {
        let (header, reply) = self.propose(Change::DeleteRange(request), deadline).await?;
        match reply {
            Reply::DeleteRange(response) => Ok(v1::DeleteRangeResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Writes one key if it holds the expected value.
    ///
    /// # Errors
    /// As [`put`](Self::put). A value that differs is an answer, not an error.
    pub async fn compare_and_swap(
        &self,
        request: v1::CompareAndSwapRequest,
        deadline: Deadline,
    ) -> Result<v1::CompareAndSwapResponse, EngineError> {
        let (header, reply) = self.propose(Change::CompareAndSwap(request), deadline).await?;
        match reply {
            Reply::CompareAndSwap(response) => Ok(v1::CompareAndSwapResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Applies a transaction; one that cannot write is served as a read.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn txn(&self, request: v1::TxnRequest, deadline: Deadline) -> Result<v1::TxnResponse, EngineError> {
        if kv::is_read_only(&request) {
            check_txn(&request)?;
            let (header, response) = self.read(request.read, deadline, request, Store::txn, PastStore::txn).await?;
            return Ok(v1::TxnResponse { header, ..response });
        }
        let (header, reply) = self.propose(Change::Txn(request), deadline).await?;
        match reply {
            Reply::Txn(response) => Ok(v1::TxnResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Proposes a change and waits for what the state machine answers.
    pub(super) async fn propose(
        &self,
        change: Change,
        deadline: Deadline,
    ) -> Result<(Option<v1::ResponseHeader>, Reply), EngineError> {
        #[cfg(feature = "fault-points")]
        let operation = crate::faults::operation(&change);
        let span = trace::propose();
        let encoded = self.prepare(change, trace::context(&span), &mut BytesMut::new())?;
        if Deadline::now() >= deadline {
            return Err(late(TURN));
        }
        self.settle_now(deadline).await?;
        #[cfg(feature = "fault-points")]
        crate::faults::reached(crate::faults::BEFORE_PROPOSE, operation).await?;
        let answer =
            match tokio::time::timeout_at(deadline, self.inner.consensus.propose(encoded).instrument(span)).await {
                Ok(answer) => answer.map_err(|error| self.explain_propose(error))?,
                Err(_) => return Err(uncommitted()),
            };
        #[cfg(feature = "fault-points")]
        crate::faults::reached(crate::faults::AFTER_COMMIT, operation).await?;
        self.read_reply(answer)
    }

    /// Checks a change, and encodes the command that is proposed, as a part of the span `trace`, into a part of
    /// `buffer`.
    pub(super) fn prepare(
        &self,
        mut change: Change,
        trace: Option<v1::TraceContext>,
        buffer: &mut BytesMut,
    ) -> Result<Bytes, EngineError> {
        if !self.inner.config.leases_enabled && makes_lease(&change) {
            return Err(EngineError::LeasesDisabled);
        }
        let session = sessions::take_session(&mut change);
        let mut command = v1::Command { command: Some(change), session, ..v1::Command::default() };
        check_size(command.encoded_len())?;
        kv::validate(&command)?;
        command.trace = trace;
        Ok(sessions::encode(command, buffer))
    }

    /// What the state machine answered, and the header that belongs to it.
    pub(super) fn read_reply(&self, answer: Bytes) -> Result<(Option<v1::ResponseHeader>, Reply), EngineError> {
        let reply = v1::CommandReply::decode(answer).map_err(|_| EngineError::Stopped)?;
        let header = self.header(Revision(reply.revision));
        match reply.reply {
            Some(Reply::Error(error)) => Err(self.rejected(error)),
            Some(reply) => Ok((header, reply)),
            None => Err(EngineError::Stopped),
        }
    }

    fn rejected(&self, error: v1::CommandError) -> EngineError {
        let outcome = match error.outcome() {
            v1::Outcome::Unspecified => v1::Outcome::NotApplied,
            outcome => outcome,
        };
        let code = i32::try_from(error.code).ok().and_then(ErrorCode::from_number).unwrap_or(ErrorCode::Internal);
        let revision = match code {
            ErrorCode::Compacted => Some(self.inner.kv.current().compacted()),
            ErrorCode::FutureRevision => Some(self.inner.kv.current().revision()),
            _ => None,
        };
        EngineError::Rejected { code, message: error.message, outcome, revision }
    }

    pub(super) fn explain_propose(&self, error: ProposeError) -> EngineError {
        refusal::explain_propose(&self.inner.consensus, error)
    }
}

/// The deadline passed, and the command may be in a log entry.
pub(super) fn uncommitted() -> EngineError {
    EngineError::DeadlineExceeded { waiting_for: "the write to be committed", outcome: v1::Outcome::Unknown }
}

/// Whether a change opens a lease, or puts a key with a time to live.
fn makes_lease(change: &Change) -> bool {
    match change {
        Change::LeaseGrant(_) => true,
        Change::Put(put) => put.ttl_ms != 0,
        Change::Txn(txn) => txn_makes_lease(txn),
        _ => false,
    }
}

/// The nesting was bounded when the request was decoded.
fn txn_makes_lease(txn: &v1::TxnRequest) -> bool {
    txn.then.iter().chain(&txn.otherwise).any(|operation| match &operation.operation {
        Some(Operation::Put(put)) => put.ttl_ms != 0,
        Some(Operation::Txn(nested)) => txn_makes_lease(nested),
        _ => false,
    })
}
