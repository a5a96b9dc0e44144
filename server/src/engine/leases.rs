//! Leases: opened and ended through the log, kept alive together, and looked at.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::v1::{self, command::Command as Change, command_reply::Reply};
use d_engine_proto::{LeaseId, limits};
use futures_util::{Stream, StreamExt, stream};
use prost::encoding::{encoded_len_varint, key_len};

use super::{Deadline, Engine, EngineError};
use crate::limits::{CALL_TIMEOUT_DEFAULT, KEEP_ALIVES_PER_STREAM_MAX};
use crate::state_machine::StoreTime;
use crate::state_machine::kv::{KvError, LeaseView, ReadPoint, Store};

impl Engine {
    /// Opens a lease.
    ///
    /// # Errors
    /// As [`put`](Self::put); with the code `LeaseExists` when the id asked for is taken.
    pub async fn grant_lease(
        &self,
        request: v1::LeaseGrantRequest,
        deadline: Deadline,
    ) -> Result<v1::LeaseGrantResponse, EngineError> {
        let (header, reply) = self.propose(Change::LeaseGrant(request), deadline).await?;
        match reply {
            Reply::LeaseGrant(response) => Ok(v1::LeaseGrantResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Ends a lease and deletes its keys.
    ///
    /// # Errors
    /// As [`put`](Self::put); with the code `LeaseNotFound` when there is no such lease.
    pub async fn revoke_lease(
        &self,
        request: v1::LeaseRevokeRequest,
        deadline: Deadline,
    ) -> Result<v1::LeaseRevokeResponse, EngineError> {
        let (header, reply) = self.propose(Change::LeaseRevoke(request), deadline).await?;
        match reply {
            Reply::LeaseRevoke(response) => Ok(v1::LeaseRevokeResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Prolongs a lease to its full time to live from now on.
    ///
    /// # Errors
    /// As [`put`](Self::put); with the code `LeaseNotFound` when there is no such lease.
    pub async fn renew_lease(
        &self,
        request: v1::LeaseRenewRequest,
        deadline: Deadline,
    ) -> Result<v1::LeaseRenewResponse, EngineError> {
        let lease = LeaseId(request.lease);
        let renewed = self.renew(lease, deadline).await?;
        if renewed.ttl_ms == 0 { Err(KvError::LeaseNotFound { lease }.into()) } else { Ok(renewed) }
    }

    /// Prolongs leases for as long as the requests come: one answer for each, in their order; a time to live of 0 means
    /// that there is no such lease. Some requests may be under way at a time, the others wait to be taken. The first
    /// error is the last answer; one comes also when this node leads no more.
    pub fn keep_leases<Requests>(
        &self,
        requests: Requests,
    ) -> impl Stream<Item = Result<v1::LeaseRenewResponse, EngineError>> + Send + use<Requests>
    where
        Requests: Stream<Item = v1::LeaseRenewRequest> + Send + 'static,
    {
        let engine = self.clone();
        let renew = move |request: v1::LeaseRenewRequest| {
            let engine = engine.clone();
            async move { engine.renew(LeaseId(request.lease), Deadline::now() + CALL_TIMEOUT_DEFAULT).await }
        };
        let answers = Box::pin(requests.map(renew).buffered(KEEP_ALIVES_PER_STREAM_MAX));
        stream::unfold(Some((self.clone(), answers)), |state| async {
            let (engine, mut answers) = state?;
            let answer = engine.next_kept(&mut answers).await?;
            let goes_on = answer.is_ok();
            Some((answer, goes_on.then_some((engine, answers))))
        })
    }

    async fn next_kept<Answers>(
        &self,
        answers: &mut Pin<Box<Answers>>,
    ) -> Option<Result<v1::LeaseRenewResponse, EngineError>>
    where
        Answers: Stream<Item = Result<v1::LeaseRenewResponse, EngineError>>,
    {
        let mut reigning = self.inner.consensus.reigning();
        tokio::select! {
            biased;
            answer = answers.next() => answer,
            _ = reigning.wait_for(|reigning| !reigning) => Some(Err(self.not_leading())),
        }
    }

    /// How long a lease has left, and its keys.
    ///
    /// # Errors
    /// As [`get`](Self::get); with the code `LeaseNotFound` when there is no such lease.
    pub async fn lease_time_to_live(
        &self,
        request: v1::LeaseTimeToLiveRequest,
        deadline: Deadline,
    ) -> Result<v1::LeaseTimeToLiveResponse, EngineError> {
        let (store, now) = self.store_of_now(request.read, deadline).await?;
        let id = LeaseId(request.lease);
        let lease = store.lease(id).ok_or(KvError::LeaseNotFound { lease: id })?;
        let mut keys = Vec::new();
        if request.keys {
            let mut bytes = 0;
            for key in lease.keys() {
                bytes += key_len(6) + encoded_len_varint(key.len() as u64) + key.len();
                if bytes as u64 > limits::ANSWER_BYTES_MAX {
                    return Err(KvError::AnswerTooLarge.into());
                }
                keys.push(key.clone());
            }
        }
        let summary = summary(&lease, now);
        Ok(v1::LeaseTimeToLiveResponse {
            header: self.header(store.revision()),
            lease: summary.lease,
            ttl_ms: summary.ttl_ms,
            remaining_ms: summary.remaining_ms,
            key_count: summary.key_count,
            keys,
        })
    }

    /// The leases that were granted, up to a page of them.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn leases(
        &self,
        request: v1::LeaseListRequest,
        deadline: Deadline,
    ) -> Result<v1::LeaseListResponse, EngineError> {
        let (store, now) = self.store_of_now(request.read, deadline).await?;
        let page = match request.limit {
            0 => limits::LEASE_PAGE_MAX,
            limit => limit.min(limits::LEASE_PAGE_MAX),
        };
        let mut found = store.leases(LeaseId(request.after));
        let page = usize::try_from(page).unwrap_or(usize::MAX);
        let leases = found.by_ref().take(page).map(|lease| summary(&lease, now)).collect();
        Ok(v1::LeaseListResponse { header: self.header(store.revision()), leases, more: found.next().is_some() })
    }

    /// The present, earned by the policy asked for, and its store time: the leader's, or that of the last entry applied.
    async fn store_of_now(
        &self,
        options: Option<v1::ReadOptions>,
        deadline: Deadline,
    ) -> Result<(Arc<Store>, StoreTime), EngineError> {
        let options = options.unwrap_or_default();
        if options.revision != 0 {
            return Err(KvError::PastLeases.into());
        }
        match self.read_point(options, deadline).await? {
            (ReadPoint::Current(store), settled) => {
                let applied = StoreTime(store.state().store_time);
                let now = settled.or_else(|| self.inner.consensus.store_time()).unwrap_or_default();
                Ok((store, now.max(applied)))
            }
            (ReadPoint::Past(_), _) => Err(KvError::PastLeases.into()),
        }
    }
}

fn summary(lease: &LeaseView<'_>, now: StoreTime) -> v1::LeaseSummary {
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    v1::LeaseSummary {
        lease: lease.id.get(),
        ttl_ms: milliseconds(lease.ttl),
        remaining_ms: milliseconds(lease.deadline.0.saturating_sub(now.0)),
        key_count: lease.key_count,
    }
}
