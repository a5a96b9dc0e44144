//! `d_engine.v1.Lease`: one line each, but for the stream.

use std::future::ready;
use std::pin::Pin;

use d_engine_proto::v1::lease_server::Lease;
use d_engine_proto::v1::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseListRequest, LeaseListResponse, LeaseRenewRequest, LeaseRenewResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};
use futures_util::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::Service;
use super::error::{answer, refusal};

#[tonic::async_trait]
impl Lease for Service {
    type KeepAliveStream = Pin<Box<dyn Stream<Item = Result<LeaseRenewResponse, Status>> + Send>>;

    async fn grant(&self, request: Request<LeaseGrantRequest>) -> Result<Response<LeaseGrantResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.grant_lease(request.into_inner(), deadline).await)
    }

    async fn revoke(&self, request: Request<LeaseRevokeRequest>) -> Result<Response<LeaseRevokeResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.revoke_lease(request.into_inner(), deadline).await)
    }

    async fn renew(&self, request: Request<LeaseRenewRequest>) -> Result<Response<LeaseRenewResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.renew_lease(request.into_inner(), deadline).await)
    }

    async fn keep_alive(
        &self,
        request: Request<Streaming<LeaseRenewRequest>>,
    ) -> Result<Response<Self::KeepAliveStream>, Status> {
        // A request that cannot be read is the last one: there is nobody to answer, or nothing.
        let requests = request.into_inner().scan((), |(), request| ready(request.ok()));
        let answers = self.engine.keep_leases(requests).map(|answer| answer.map_err(refusal));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.lease_time_to_live(request.into_inner(), deadline).await)
    }

    async fn list(&self, request: Request<LeaseListRequest>) -> Result<Response<LeaseListResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.leases(request.into_inner(), deadline).await)
    }
}
