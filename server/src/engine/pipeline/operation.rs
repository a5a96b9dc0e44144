//! What the operations of a pipeline are to the engine: changes, reads, and the rest.

use d_engine_proto::v1::answer::Reply;
use d_engine_proto::v1::command::Command as Change;
use d_engine_proto::v1::operation::Request;
use d_engine_proto::v1::{self, command_reply};
use futures_util::future::BoxFuture;
use prost::Message;

use crate::engine::reads::{check_get_many, check_txn};
use crate::engine::{Deadline, Engine, EngineError, late, sessions};
use crate::state_machine::kv::{self, KvError, Store};

/// An operation that begins.
pub(super) enum Work {
    /// Goes through the log.
    Write(Change),
    /// Is answered from memory, or from the history.
    Read(Query),
    /// Waits for something of its own.
    Other(Other),
    /// Ends another one.
    Cancel,
}

/// A read of keys.
pub(super) enum Query {
    Get(v1::GetRequest),
    GetMany(v1::GetManyRequest),
    Range(v1::RangeRequest),
    Txn(v1::TxnRequest),
}

/// What is rare enough to be a call of its own.
pub(super) enum Other {
    /// A read of the history.
    Past(Query),
    LeaseRenew(v1::LeaseRenewRequest),
    LeaseTimeToLive(v1::LeaseTimeToLiveRequest),
    LeaseList(v1::LeaseListRequest),
    Compact(v1::CompactRequest),
    ChangeMember(v1::ChangeMemberRequest),
    TransferLeadership(v1::TransferLeadershipRequest),
    Members,
    Status,
    /// An operation on keys that passes the fault points.
    #[cfg(feature = "fault-points")]
    Armed(&'static str, Box<Request>),
}

/// The work that a request asks for, and the name of the unary method that does the same.
pub(super) fn sort(request: Request) -> (&'static str, Work) {
    #[cfg(feature = "fault-points")]
    if let Some(operation) = armed::operation(&request) {
        return ("armed", Work::Other(Other::Armed(operation, Box::new(request))));
    }
    match request {
        Request::Cancel(_) => ("", Work::Cancel),
        Request::Put(request) => ("Kv/Put", Work::Write(Change::Put(request))),
        Request::Get(request) => ("Kv/Get", Work::Read(Query::Get(request))),
        Request::GetMany(request) => ("Kv/GetMany", Work::Read(Query::GetMany(request))),
        Request::Range(request) => ("Kv/Range", Work::Read(Query::Range(request))),
        Request::Delete(request) => ("Kv/Delete", Work::Write(Change::Delete(request))),
        Request::DeleteRange(request) => ("Kv/DeleteRange", Work::Write(Change::DeleteRange(request))),
        Request::CompareAndSwap(request) => ("Kv/CompareAndSwap", Work::Write(Change::CompareAndSwap(request))),
        Request::Txn(request) if kv::is_read_only(&request) => ("Kv/Txn", Work::Read(Query::Txn(request))),
        Request::Txn(request) => ("Kv/Txn", Work::Write(Change::Txn(request))),
        Request::LeaseGrant(request) => ("Lease/Grant", Work::Write(Change::LeaseGrant(request))),
        Request::LeaseRevoke(request) => ("Lease/Revoke", Work::Write(Change::LeaseRevoke(request))),
        Request::LeaseRenew(request) => ("Lease/Renew", Work::Other(Other::LeaseRenew(request))),
        Request::LeaseTimeToLive(request) => ("Lease/TimeToLive", Work::Other(Other::LeaseTimeToLive(request))),
        Request::LeaseList(request) => ("Lease/List", Work::Other(Other::LeaseList(request))),
        Request::SessionRegister(request) => ("Session/Register", Work::Write(sessions::registration(request))),
        Request::SessionRenew(request) => ("Session/Renew", Work::Write(Change::SessionRenew(request))),
        Request::SessionClose(request) => ("Session/Close", Work::Write(Change::SessionClose(request))),
        Request::Compact(request) => ("Maintenance/Compact", Work::Other(Other::Compact(request))),
        Request::ChangeMember(request) => ("Cluster/ChangeMember", Work::Other(Other::ChangeMember(request))),
        Request::TransferLeadership(request) => {
            ("Cluster/TransferLeadership", Work::Other(Other::TransferLeadership(request)))
        }
        Request::Members(_) => ("Cluster/Members", Work::Other(Other::Members)),
        Request::Status(_) => ("Cluster/Status", Work::Other(Other::Status)),
    }
}

/// Whether the answer to a change holds what keys held, and may be as large as an answer can be.
pub(super) fn returns_values(change: &Change) -> bool {
    match change {
        Change::Put(put) => put.return_previous,
        Change::Delete(delete) => delete.return_previous,
        Change::DeleteRange(delete) => delete.return_previous,
        Change::CompareAndSwap(_) | Change::Txn(_) => true,
        _ => false,
    }
}

/// The answer to a change, as the operation that asked for it has it. `None`: it is none a client can ask for.
pub(super) fn written(header: Option<v1::ResponseHeader>, reply: command_reply::Reply) -> Option<Reply> {
    use command_reply::Reply as Applied;
    Some(match reply {
        Applied::Put(response) => Reply::Put(v1::PutResponse { header, ..response }),
        Applied::Delete(response) => Reply::Delete(v1::DeleteResponse { header, ..response }),
        Applied::DeleteRange(response) => Reply::DeleteRange(v1::DeleteRangeResponse { header, ..response }),
        Applied::CompareAndSwap(response) => Reply::CompareAndSwap(v1::CompareAndSwapResponse { header, ..response }),
        Applied::Txn(response) => Reply::Txn(v1::TxnResponse { header, ..response }),
        Applied::LeaseGrant(response) => Reply::LeaseGrant(v1::LeaseGrantResponse { header, ..response }),
        Applied::LeaseRevoke(response) => Reply::LeaseRevoke(v1::LeaseRevokeResponse { header, ..response }),
        Applied::SessionRegister(response) => {
            Reply::SessionRegister(v1::SessionRegisterResponse { header, ..response })
        }
        Applied::SessionRenew(response) => Reply::SessionRenew(v1::SessionRenewResponse { header, ..response }),
        Applied::SessionClose(_) => Reply::SessionClose(v1::SessionCloseResponse { header }),
        Applied::Error(_) | Applied::LeaseRenewed(_) | Applied::Compact(_) | Applied::Ticked(_) => return None,
    })
}

impl Query {
    /// The checks at the door, those of the unary calls.
    pub(super) fn check(&self) -> Result<(), EngineError> {
        match self {
            Self::Get(request) => Ok(kv::validate_get(request)?),
            Self::GetMany(request) => check_get_many(request),
            Self::Range(request) => Ok(kv::validate_range(request)?),
            Self::Txn(request) => check_txn(request),
        }
    }

    pub(super) fn options(&self) -> v1::ReadOptions {
        let read = match self {
            Self::Get(request) => request.read,
            Self::GetMany(request) => request.read,
            Self::Range(request) => request.read,
            Self::Txn(request) => request.read,
        };
        read.unwrap_or_default()
    }

    pub(super) fn answer(&self, store: &Store, header: Option<v1::ResponseHeader>) -> Result<Reply, KvError> {
        Ok(match self {
            Self::Get(request) => Reply::Get(v1::GetResponse { header, ..store.get(request)? }),
            Self::GetMany(request) => Reply::GetMany(v1::GetManyResponse { header, ..store.get_many(request)? }),
            Self::Range(request) => Reply::Range(v1::RangeResponse { header, ..store.range(request)? }),
            Self::Txn(request) => Reply::Txn(v1::TxnResponse { header, ..store.txn(request)? }),
        })
    }

    /// The same in memory of its own: one that waits must not keep the message it came in.
    pub(super) fn detached(self) -> Self {
        match self {
            Self::Get(request) => Self::Get(detached(request)),
            Self::GetMany(request) => Self::GetMany(detached(request)),
            Self::Range(request) => Self::Range(detached(request)),
            Self::Txn(request) => Self::Txn(detached(request)),
        }
    }
}

fn detached<M: Message + Default>(message: M) -> M {
    // What was encoded a moment ago decodes.
    M::decode(bytes::Bytes::from(message.encode_to_vec())).unwrap_or(message)
}

impl Other {
    /// Whether it can be dropped at any time, and has changed nothing then.
    pub(super) fn is_read(&self) -> bool {
        !matches!(self, Self::LeaseRenew(_) | Self::Compact(_) | Self::ChangeMember(_) | Self::TransferLeadership(_))
    }

    /// Does it, and ends at the deadline.
    pub(super) fn run(self, engine: Engine, deadline: Deadline) -> BoxFuture<'static, Result<Reply, EngineError>> {
        Box::pin(async move {
            Ok(match self {
                Self::Past(Query::Get(request)) => Reply::Get(engine.get(request, deadline).await?),
                Self::Past(Query::GetMany(request)) => Reply::GetMany(engine.get_many(request, deadline).await?),
                Self::Past(Query::Range(request)) => Reply::Range(engine.range(request, deadline).await?),
                Self::Past(Query::Txn(request)) => Reply::Txn(engine.txn(request, deadline).await?),
                Self::LeaseRenew(request) => Reply::LeaseRenew(engine.renew_lease(request, deadline).await?),
                Self::LeaseTimeToLive(request) => {
                    Reply::LeaseTimeToLive(engine.lease_time_to_live(request, deadline).await?)
                }
                Self::LeaseList(request) => Reply::LeaseList(engine.leases(request, deadline).await?),
                Self::Compact(request) => Reply::Compact(engine.compact(request, deadline).await?),
                #[cfg(feature = "fault-points")]
                Self::Armed(operation, request) => armed::run(&engine, operation, *request, deadline).await?,
                Self::ChangeMember(request) => Reply::ChangeMember(engine.change_member(request, deadline).await?),
                Self::TransferLeadership(request) => {
                    Reply::TransferLeadership(engine.transfer_leadership(request, deadline).await?)
                }
                Self::Members => Reply::Members(engine.members()),
                Self::Status => Reply::Status(status(engine, deadline).await?),
            })
        })
    }
}

/// It adds up the files of the data directory.
async fn status(engine: Engine, deadline: Deadline) -> Result<v1::StatusResponse, EngineError> {
    let asked = engine.clone();
    match tokio::time::timeout_at(deadline, tokio::task::spawn_blocking(move || asked.status())).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(_)) => Err(engine.unavailable("it is stopping")),
        Err(_) => Err(late("the size of the data directories")),
    }
}

/// With the fault points of `faults` prepared, each operation on keys is a call of its own, as a unary one is.
#[cfg(feature = "fault-points")]
mod armed {
    use super::{Deadline, Engine, EngineError, Reply, Request};
    use crate::faults::{BEFORE_REPLY, RECEIVED, is_prepared, reached};

    /// The operation that a request is, if it passes fault points.
    pub(super) fn operation(request: &Request) -> Option<&'static str> {
        is_prepared().then_some(match request {
            Request::Put(_) => "Put",
            Request::Get(_) => "Get",
            Request::GetMany(_) => "GetMany",
            Request::Range(_) => "Range",
            Request::Delete(_) => "Delete",
            Request::DeleteRange(_) => "DeleteRange",
            Request::CompareAndSwap(_) => "CompareAndSwap",
            Request::Txn(_) => "Txn",
            _ => return None,
        })
    }

    pub(super) async fn run(
        engine: &Engine,
        operation: &str,
        request: Request,
        deadline: Deadline,
    ) -> Result<Reply, EngineError> {
        reached(RECEIVED, operation).await?;
        let result = answer(engine, request, deadline).await;
        reached(BEFORE_REPLY, operation).await?;
        result
    }

    async fn answer(engine: &Engine, request: Request, deadline: Deadline) -> Result<Reply, EngineError> {
        Ok(match request {
            Request::Put(request) => Reply::Put(engine.put(request, deadline).await?),
            Request::Get(request) => Reply::Get(engine.get(request, deadline).await?),
            Request::GetMany(request) => Reply::GetMany(engine.get_many(request, deadline).await?),
            Request::Range(request) => Reply::Range(engine.range(request, deadline).await?),
            Request::Delete(request) => Reply::Delete(engine.delete(request, deadline).await?),
            Request::DeleteRange(request) => Reply::DeleteRange(engine.delete_range(request, deadline).await?),
            Request::CompareAndSwap(request) => {
                Reply::CompareAndSwap(engine.compare_and_swap(request, deadline).await?)
            }
            Request::Txn(request) => Reply::Txn(engine.txn(request, deadline).await?),
            _ => return Err(EngineError::Stopped),
        })
    }
}
