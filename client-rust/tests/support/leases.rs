//! Leases and sessions of a fake node.

use std::pin::Pin;

use d_engine_proto::v1::lease_server::Lease;
use d_engine_proto::v1::session_server::Session;
use d_engine_proto::{ErrorCode, v1};
use futures_util::{Stream, StreamExt, stream};
use tonic::{Request, Response, Status, Streaming};

use super::Service;
use super::store::refused;

#[tonic::async_trait]
impl Lease for Service {
    async fn grant(&self, request: Request<v1::LeaseGrantRequest>) -> Result<Response<v1::LeaseGrantResponse>, Status> {
        self.behave(|store, header| {
            let mut response = store.mutate(
                request.into_inner(),
                |request| &mut request.session,
                |store, request| {
                    store.granted += 1;
                    let lease = if request.lease == 0 { store.granted } else { request.lease };
                    if store.leases.contains_key(&lease) {
                        return Err(refused(ErrorCode::LeaseExists));
                    }
                    store.leases.insert(lease, request.ttl_ms);
                    Ok(v1::LeaseGrantResponse { header: None, lease, ttl_ms: request.ttl_ms })
                },
            )?;
            response.header = Some(header);
            Ok(response)
        })
        .await
    }

    async fn revoke(
        &self,
        request: Request<v1::LeaseRevokeRequest>,
    ) -> Result<Response<v1::LeaseRevokeResponse>, Status> {
        self.behave(|store, header| {
            let mut response = store.mutate(
                request.into_inner(),
                |request| &mut request.session,
                |store, request| {
                    store.leases.remove(&request.lease).ok_or_else(|| refused(ErrorCode::LeaseNotFound))?;
                    let keys = store.keys_of(request.lease);
                    for key in &keys {
                        store.keys.remove(key);
                    }
                    Ok(v1::LeaseRevokeResponse { header: None, deleted: keys.len() as u64 })
                },
            )?;
            response.header = Some(header);
            Ok(response)
        })
        .await
    }

    async fn renew(&self, request: Request<v1::LeaseRenewRequest>) -> Result<Response<v1::LeaseRenewResponse>, Status> {
        self.0.lock().renewals += 1;
        self.behave(|store, header| {
            let lease = request.into_inner().lease;
            let ttl_ms = *store.leases.get(&lease).ok_or_else(|| refused(ErrorCode::LeaseNotFound))?;
            Ok(v1::LeaseRenewResponse { header: Some(header), lease, ttl_ms })
        })
        .await
    }

    type KeepAliveStream = Pin<Box<dyn Stream<Item = Result<v1::LeaseRenewResponse, Status>> + Send>>;

    async fn keep_alive(
        &self,
        requests: Request<Streaming<v1::LeaseRenewRequest>>,
    ) -> Result<Response<Self::KeepAliveStream>, Status> {
        let answers = stream::unfold(Some((self.clone(), requests.into_inner())), |state| async {
            let (service, mut requests) = state?;
            let request = requests.next().await?;
            service.0.lock().renewals += 1;
            let answer = match request {
                Ok(v1::LeaseRenewRequest { lease }) => {
                    let answer = service.behave(|store, header| {
                        let ttl_ms = store.leases.get(&lease).copied().unwrap_or_default();
                        Ok(v1::LeaseRenewResponse { header: Some(header), lease, ttl_ms })
                    });
                    answer.await.map(Response::into_inner)
                }
                Err(status) => Err(status),
            };
            // An error ends the stream.
            let rest = answer.is_ok().then_some((service, requests));
            Some((answer, rest))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn time_to_live(
        &self,
        request: Request<v1::LeaseTimeToLiveRequest>,
    ) -> Result<Response<v1::LeaseTimeToLiveResponse>, Status> {
        self.behave(|store, header| {
            let request = request.into_inner();
            let lease = request.lease;
            let ttl_ms = *store.leases.get(&lease).ok_or_else(|| refused(ErrorCode::LeaseNotFound))?;
            let keys = store.keys_of(lease);
            let key_count = keys.len() as u64;
            let keys = if request.keys { keys } else { Vec::new() };
            let header = Some(header);
            Ok(v1::LeaseTimeToLiveResponse { header, lease, ttl_ms, remaining_ms: ttl_ms, key_count, keys })
        })
        .await
    }

    async fn list(&self, request: Request<v1::LeaseListRequest>) -> Result<Response<v1::LeaseListResponse>, Status> {
        // Pages of two leases at most.
        self.behave(|store, header| {
            let after = request.into_inner().after;
            let summary = |(&lease, &ttl_ms): (&u64, &u64)| v1::LeaseSummary {
                lease,
                ttl_ms,
                remaining_ms: ttl_ms,
                key_count: store.keys_of(lease).len() as u64,
            };
            let mut leases: Vec<_> = store.leases.range(after + 1..).map(summary).collect();
            let more = leases.len() > 2;
            leases.truncate(2);
            Ok(v1::LeaseListResponse { header: Some(header), leases, more })
        })
        .await
    }
}

#[tonic::async_trait]
impl Session for Service {
    async fn register(
        &self,
        _: Request<v1::SessionRegisterRequest>,
    ) -> Result<Response<v1::SessionRegisterResponse>, Status> {
        if let Some(refusal) = self.0.lock().no_sessions.clone() {
            return Err(refusal.into());
        }
        self.lead(|store, header| {
            store.registered += 1;
            let session = store.registered;
            store.sessions.insert(session, super::store::Session::default());
            Ok(v1::SessionRegisterResponse { header: Some(header), session, ttl_ms: store.session_ttl_ms })
        })
    }

    async fn renew(
        &self,
        request: Request<v1::SessionRenewRequest>,
    ) -> Result<Response<v1::SessionRenewResponse>, Status> {
        self.lead(|store, header| {
            store.session_renewals += 1;
            if !store.sessions.contains_key(&request.into_inner().session) {
                return Err(refused(ErrorCode::SessionExpired));
            }
            Ok(v1::SessionRenewResponse { header: Some(header), ttl_ms: store.session_ttl_ms })
        })
    }

    async fn close(
        &self,
        request: Request<v1::SessionCloseRequest>,
    ) -> Result<Response<v1::SessionCloseResponse>, Status> {
        self.lead(|store, header| {
            store.sessions.remove(&request.into_inner().session);
            Ok(v1::SessionCloseResponse { header: Some(header) })
        })
    }
}
