//! `d_engine.v1.Kv`: one line each.

use d_engine_proto::v1::kv_server::Kv;
use d_engine_proto::v1::{
    CompareAndSwapRequest, CompareAndSwapResponse, DeleteRangeRequest, DeleteRangeResponse, DeleteRequest,
    DeleteResponse, GetManyRequest, GetManyResponse, GetRequest, GetResponse, PutRequest, PutResponse, RangeRequest,
    RangeResponse, TxnRequest, TxnResponse,
};
use tonic::{Request, Response, Status};

use super::Service;
use super::error::answer;

#[tonic::async_trait]
impl Kv for Service {
    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.put(request.into_inner(), deadline).await)
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.get(request.into_inner(), deadline).await)
    }

    async fn get_many(&self, request: Request<GetManyRequest>) -> Result<Response<GetManyResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.get_many(request.into_inner(), deadline).await)
    }

    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.range(request.into_inner(), deadline).await)
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.delete(request.into_inner(), deadline).await)
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.delete_range(request.into_inner(), deadline).await)
    }

    async fn compare_and_swap(
        &self,
        request: Request<CompareAndSwapRequest>,
    ) -> Result<Response<CompareAndSwapResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.compare_and_swap(request.into_inner(), deadline).await)
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let deadline = self.deadlines.of(&request)?;
        answer(self.engine.txn(request.into_inner(), deadline).await)
    }
}
