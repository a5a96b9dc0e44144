//! `d_engine.v1.Maintenance`: one line each.

use d_engine_proto::v1::maintenance_server::Maintenance;
use d_engine_proto::v1::{CompactRequest, CompactResponse};
use tonic::{Request, Response, Status};

use super::Service;
use super::error::answer;

#[tonic::async_trait]
impl Maintenance for Service {
    async fn compact(&self, request: Request<CompactRequest>) -> Result<Response<CompactResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.compact(request.into_inner(), deadline).await)
    }
}
