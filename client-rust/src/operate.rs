//! What operators ask of single nodes: whether all hold the same state, and a backup. These calls are rare and long,
//! so they take no part in pipelines and retries.

use bytes::Bytes;
use d_engine_proto::{LogIndex, NodeId, v1};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

use crate::call::stream_failure;
use crate::client::Client;
use crate::cluster::Header;
use crate::error::{Error, ErrorKind, Outcome};
use crate::retry::{Cause, Failure, Resend};
use crate::topology::Address;

const CHECK: &str = "check";
const SNAPSHOT: &str = "snapshot";

/// A piece and its envelope.
const PIECE_BYTES_MAX: usize = 4 << 20;

/// What a comparison found of one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CheckFinding {
    /// Its state is what it should be.
    Same,
    /// It is not: the member stops.
    Different,
    /// It did not answer in time, or has another version.
    Unknown,
}

/// A member whose state was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberCheck {
    /// The member.
    pub id: NodeId,
    /// What was found.
    pub finding: CheckFinding,
    /// Of its state; 0 if unknown.
    pub hash: u64,
}

/// A comparison of the members' states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckResponse {
    /// Who answered: the leader.
    pub header: Header,
    /// The log entry after which the states were compared.
    pub index: LogIndex,
    /// All members, by id.
    pub members: Vec<MemberCheck>,
}

impl From<v1::CheckResponse> for CheckResponse {
    fn from(response: v1::CheckResponse) -> Self {
        let members = response.members.iter().map(|member| MemberCheck {
            id: NodeId(member.node_id),
            finding: match member.finding() {
                v1::CheckFinding::Same => CheckFinding::Same,
                v1::CheckFinding::Different => CheckFinding::Different,
                v1::CheckFinding::Unknown | v1::CheckFinding::Unspecified => CheckFinding::Unknown,
            },
            hash: member.hash,
        });
        Self {
            header: response.header.unwrap_or_default().into(),
            index: LogIndex(response.index),
            members: members.collect(),
        }
    }
}

/// A backup on its way. Dropping it ends it.
#[derive(Debug)]
pub struct Snapshot {
    pieces: tonic::Streaming<v1::SnapshotPiece>,
    /// The first one, which was read to learn the size.
    first: Option<Bytes>,
    total_bytes: u64,
    address: Address,
}

impl Snapshot {
    /// How long it is, in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The next piece, in order; `None` at the end. Whether it is whole is for its reader to check. Dropping the future
    /// loses nothing.
    ///
    /// # Errors
    /// What ended it early: then what came before is no backup.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        match self.pieces.message().await {
            Ok(piece) => Ok(piece.map(|piece| piece.data)),
            Err(status) => Err(failed(SNAPSHOT, &self.address, stream_failure(status))),
        }
    }
}

impl Client {
    /// Has all members hash their states after one log entry, and compares. A member whose state is not the cluster's
    /// stops: it must not serve.
    ///
    /// # Errors
    /// `Unavailable` or `NotLeader` without a leader, `DeadlineExceeded` after the call timeout.
    pub async fn check(&self) -> Result<CheckResponse, Error> {
        let members = self.members().await?;
        let leader = members.leader.ok_or_else(|| {
            Error::new(CHECK, ErrorKind::Unavailable, Outcome::NotApplied, "no leader is known: it does the comparing")
        })?;
        let timeout = self.options().call_timeout;
        let address = Address::parse(&leader.client_address).map_err(|message| Error::invalid(CHECK, message))?;
        let mut grpc = self.node(&address).await.map_err(|failure| failed(CHECK, &address, failure))?;
        let mut request = tonic::Request::new(v1::CheckRequest {});
        request.set_timeout(timeout);
        let path = PathAndQuery::from_static("/d_engine.v1.Maintenance/Check");
        let codec = ProstCodec::<v1::CheckRequest, v1::CheckResponse>::default();
        match tokio::time::timeout(timeout, grpc.unary(request, path, codec)).await {
            Ok(Ok(response)) => Ok(response.into_inner().into()),
            Ok(Err(status)) => Err(failed(CHECK, &address, stream_failure(status))),
            Err(_) => Err(failed(CHECK, &address, Failure::Silent { sent: true, after: timeout })),
        }
    }

    /// A backup of the node at `address` (`host:port`), whether or not it is a known member: an archive in pieces, for
    /// `d-engine snapshot inspect` and `restore`. The node's state may be older than the leader's.
    ///
    /// # Errors
    /// `Unavailable` if it cannot be reached, `ResourceExhausted` while another backup of it is under way.
    pub async fn snapshot(&self, address: &str) -> Result<Snapshot, Error> {
        let address = Address::parse(address).map_err(|message| Error::invalid(SNAPSHOT, message))?;
        let error = |failure| failed(SNAPSHOT, &address, failure);
        let mut grpc = self.node(&address).await.map_err(error)?;
        let path = PathAndQuery::from_static("/d_engine.v1.Maintenance/Snapshot");
        let codec = ProstCodec::<v1::SnapshotSaveRequest, v1::SnapshotPiece>::default();
        let request = tonic::Request::new(v1::SnapshotSaveRequest {});
        let pieces = grpc.server_streaming(request, path, codec).await;
        let mut pieces = pieces.map_err(|status| error(stream_failure(status)))?.into_inner();
        let first = pieces.message().await.map_err(|status| error(stream_failure(status)))?.unwrap_or_default();
        Ok(Snapshot { pieces, first: Some(first.data), total_bytes: first.total_bytes, address })
    }

    async fn node(&self, address: &Address) -> Result<Grpc<tonic::transport::Channel>, Failure> {
        let connection = self.shared().connections.get(address).await.map_err(Failure::NotSent)?;
        let mut grpc = Grpc::new(connection.channel.clone()).max_decoding_message_size(PIECE_BYTES_MAX);
        grpc.ready().await.map_err(|error| Failure::NotSent(Cause::of(error)))?;
        Ok(grpc)
    }
}

fn failed(operation: &'static str, address: &Address, failure: Failure) -> Error {
    failure.into_error(operation, Resend::Idempotent, address.as_str())
}
