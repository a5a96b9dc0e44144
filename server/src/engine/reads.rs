//! Reads: how the right to answer from memory is earned, and where the answer comes from.

use std::sync::Arc;

use d_engine_proto::{Revision, v1};
use prost::Message;

use super::expiry::is_due;
use super::{Deadline, Engine, EngineError, check_size, late, refusal};
use crate::consensus::Role;
use crate::state_machine::StoreTime;
use crate::state_machine::kv::{self, KvError, PastStore, ReadError, ReadPoint, Store};

const HISTORY: &str = "the history to be read";

impl Engine {
    /// Reads one key.
    ///
    /// # Errors
    /// See [`EngineError`]; a read can always be repeated.
    pub async fn get(&self, request: v1::GetRequest, deadline: Deadline) -> Result<v1::GetResponse, EngineError> {
        kv::validate_get(&request)?;
        let (header, response) = self.read(request.read, deadline, request, Store::get, PastStore::get).await?;
        Ok(v1::GetResponse { header, ..response })
    }

    /// Reads several keys at one revision.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn get_many(
        &self,
        request: v1::GetManyRequest,
        deadline: Deadline,
    ) -> Result<v1::GetManyResponse, EngineError> {
        check_get_many(&request)?;
        let (header, response) =
            self.read(request.read, deadline, request, Store::get_many, PastStore::get_many).await?;
        Ok(v1::GetManyResponse { header, ..response })
    }

    /// Reads an interval of keys at one revision.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn range(&self, request: v1::RangeRequest, deadline: Deadline) -> Result<v1::RangeResponse, EngineError> {
        kv::validate_range(&request)?;
        let (header, response) = self.read(request.read, deadline, request, Store::range, PastStore::range).await?;
        Ok(v1::RangeResponse { header, ..response })
    }

    /// Earns the right to answer by the policy asked for, then reads; a past revision is read from the disk.
    pub(super) async fn read<Request: Send + 'static, Response: Send + 'static>(
        &self,
        options: Option<v1::ReadOptions>,
        deadline: Deadline,
        request: Request,
        current: fn(&Store, &Request) -> Result<Response, KvError>,
        past: fn(&PastStore, &Request) -> Result<Response, ReadError>,
    ) -> Result<(Option<v1::ResponseHeader>, Response), EngineError> {
        let options = options.unwrap_or_default();
        match self.read_point(options, deadline).await?.0 {
            ReadPoint::Current(store) => Ok((self.header(store.revision()), current(&store, &request)?)),
            ReadPoint::Past(revision) => {
                let patience = deadline.saturating_duration_since(Deadline::now());
                let task = tokio::task::spawn_blocking(move || past(&revision.wait(patience)?, &request));
                let response = match tokio::time::timeout_at(deadline, task).await {
                    Ok(Ok(read)) => read.map_err(explain_past)?,
                    Ok(Err(_)) => return Err(self.unavailable("the read was aborted")),
                    Err(_) => return Err(late(HISTORY)),
                };
                Ok((self.header(Revision(options.revision)), response))
            }
        }
    }

    /// Where to read, once that is earned; and the store time by which nothing shown is due, if the policy promises that.
    pub(super) async fn read_point(
        &self,
        options: v1::ReadOptions,
        deadline: Deadline,
    ) -> Result<(ReadPoint, Option<StoreTime>), EngineError> {
        let settled = self.earn(self.policy(options.consistency())?, deadline).await?;
        self.wait_for_revision(Revision(options.min_revision), deadline).await?;
        loop {
            match (self.inner.kv.at(Revision(options.revision))?, settled) {
                // Looked up in the very store that is read: a later one may hold what has become due.
                (ReadPoint::Current(store), Some(now)) if is_due(store.due(), now) => {
                    self.settle(now, deadline).await?;
                }
                (point, _) => return Ok((point, settled)),
            }
        }
    }

    /// The policy by which a read is served.
    pub(super) fn policy(&self, asked: v1::Consistency) -> Result<v1::Consistency, EngineError> {
        self.inner.config.read_policy.choose(asked)
    }

    /// Earns the right to answer reads that have arrived from memory; and the store time by which they may show nothing
    /// that was due, if the policy promises that.
    pub(super) async fn earn(
        &self,
        policy: v1::Consistency,
        deadline: Deadline,
    ) -> Result<Option<StoreTime>, EngineError> {
        let consensus = &self.inner.consensus;
        let earned = async {
            if policy == v1::Consistency::Eventual {
                return Ok(None);
            }
            if policy == v1::Consistency::Lease
                && let Some(now) = consensus.confirm_read_by_lease().await?
            {
                return Ok(Some(now));
            }
            consensus.confirm_read().await.map(Some)
        };
        if policy == v1::Consistency::Lease && consensus.role() != Role::Leader {
            return Err(self.not_leader());
        }
        match tokio::time::timeout_at(deadline, earned).await {
            Ok(earned) => earned.map_err(|error| refusal::explain_read(&self.inner.consensus, error)),
            Err(_) => Err(late("a quorum to confirm the leader")),
        }
    }

    async fn wait_for_revision(&self, minimum: Revision, deadline: Deadline) -> Result<(), EngineError> {
        let mut revision = self.inner.kv.revisions();
        if *revision.borrow() >= minimum {
            return Ok(());
        }
        match tokio::time::timeout_at(deadline, revision.wait_for(|applied| *applied >= minimum)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(self.unavailable("it is stopping")),
            Err(_) => Err(self.behind(minimum)),
        }
    }

    pub(super) fn behind(&self, minimum: Revision) -> EngineError {
        let applied = *self.inner.kv.revisions().borrow();
        EngineError::Behind { node: self.inner.consensus.node_id(), applied, minimum }
    }
}

pub(super) fn check_get_many(request: &v1::GetManyRequest) -> Result<(), EngineError> {
    check_size(request.encoded_len())?;
    Ok(kv::validate_get_many(request)?)
}

/// For a transaction that cannot write.
pub(super) fn check_txn(request: &v1::TxnRequest) -> Result<(), EngineError> {
    check_size(request.encoded_len())?;
    Ok(kv::validate_txn(request)?)
}

fn explain_past(error: ReadError) -> EngineError {
    match error {
        ReadError::Refused(refused) => refused.into(),
        ReadError::Storage(error) => EngineError::Storage(Arc::new(error)),
        ReadError::NotWritten { .. } => late(HISTORY),
    }
}
