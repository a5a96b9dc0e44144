//! `d_engine.v1.Cluster`. Answers without a quorum, so that an operator always sees something.

use d_engine_proto::v1::cluster_server::Cluster;
use d_engine_proto::v1::{MembersRequest, MembersResponse, StatusRequest, StatusResponse};
use d_engine_proto::{ErrorCode, v1::Outcome};
use tonic::{Request, Response, Status};

use super::Service;
use super::error::status;

#[tonic::async_trait]
impl Cluster for Service {
    async fn members(&self, _request: Request<MembersRequest>) -> Result<Response<MembersResponse>, Status> {
        Ok(Response::new(self.engine.members()))
    }

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        // It adds up the files of the data directory.
        let engine = self.engine.clone();
        match tokio::task::spawn_blocking(move || engine.status()).await {
            Ok(response) => Ok(Response::new(response)),
            Err(_) => Err(status(ErrorCode::Unavailable, Outcome::NotApplied, "the node is stopping".to_owned())),
        }
    }
}
