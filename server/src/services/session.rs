//! `d_engine.v1.Session`: one line each.

use d_engine_proto::v1::session_server::Session;
use d_engine_proto::v1::{
    SessionCloseRequest, SessionCloseResponse, SessionRegisterRequest, SessionRegisterResponse, SessionRenewRequest,
    SessionRenewResponse,
};
use tonic::{Request, Response, Status};

use super::Service;
use super::error::answer;

#[tonic::async_trait]
impl Session for Service {
    async fn register(
        &self,
        request: Request<SessionRegisterRequest>,
    ) -> Result<Response<SessionRegisterResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.register_session(request.into_inner(), deadline).await)
    }

    async fn renew(&self, request: Request<SessionRenewRequest>) -> Result<Response<SessionRenewResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.renew_session(request.into_inner(), deadline).await)
    }

    async fn close(&self, request: Request<SessionCloseRequest>) -> Result<Response<SessionCloseResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.close_session(request.into_inner(), deadline).await)
    }
}
