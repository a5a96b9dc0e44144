//! `d_engine.v1.Maintenance`: one line each.

use d_engine_proto::v1::maintenance_server::Maintenance;
use std::pin::Pin;

use d_engine_proto::v1::{
    CheckRequest, CheckResponse, CompactRequest, CompactResponse, SnapshotPiece, SnapshotSaveRequest,
};
use futures_util::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::Service;
use super::error::{answer, refusal};

#[tonic::async_trait]
impl Maintenance for Service {
    type SnapshotStream = Pin<Box<dyn Stream<Item = Result<SnapshotPiece, Status>> + Send>>;

    async fn compact(&self, request: Request<CompactRequest>) -> Result<Response<CompactResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.compact(request.into_inner(), deadline).await)
    }

    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.check(deadline).await)
    }

    async fn snapshot(&self, _request: Request<SnapshotSaveRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        let pieces = self.engine.backup().await.map_err(refusal)?;
        Ok(Response::new(Box::pin(pieces.map(|piece| piece.map_err(refusal)))))
    }
}
