//! `d_engine.v1.Cluster`. Answers without a quorum, so that an operator always sees something.

use d_engine_proto::v1::cluster_server::Cluster;
use d_engine_proto::v1::{
    ChangeMemberRequest, ChangeMemberResponse, MembersRequest, MembersResponse, StatusRequest, StatusResponse,
    TransferLeadershipRequest, TransferLeadershipResponse,
};
use d_engine_proto::{ErrorCode, v1::Outcome};
use tonic::{Request, Response, Status};

use super::Service;
use super::error::{answer, status};

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
    async fn change_member(
        &self,
        request: Request<ChangeMemberRequest>,
    ) -> Result<Response<ChangeMemberResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.change_member(request.into_inner(), deadline).await)
    }

    async fn transfer_leadership(
        &self,
        request: Request<TransferLeadershipRequest>,
    ) -> Result<Response<TransferLeadershipResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.transfer_leadership(request.into_inner(), deadline).await)
    }
}
