//! The unary calls of the protocol, each as a request type that knows its method and its answer.

use d_engine_proto::v1::{self, answer, operation};

use crate::namespace::{Enter, Leave};

/// A request of a unary call.
pub(crate) trait Unary: prost::Message + Enter + Clone + 'static {
    /// What answers it.
    type Reply: prost::Message + Leave + Default + 'static;
    /// Its name in errors and traces.
    const OPERATION: &'static str;
    /// Its gRPC method.
    const PATH: &'static str;
    /// Whether applying it again, to what it made of the store, changes nothing that matters. Without effect under a
    /// session.
    const REPEATABLE: bool = false;
    /// The header of an answer.
    fn header(reply: &Self::Reply) -> Option<&v1::ResponseHeader>;
    /// As an operation of the pipeline.
    fn into_operation(self) -> operation::Request;
    /// Its answer on the pipeline; `None` if that answers something else.
    fn reply(reply: answer::Reply) -> Option<Self::Reply>;
    /// Where it says under which session it is, if it can be under one.
    fn session(&mut self) -> Option<&mut Option<v1::SessionCall>> {
        None
    }
    /// Where it says how it is to be read, if it is a read.
    fn read_options(&mut self) -> Option<&mut Option<v1::ReadOptions>> {
        None
    }
    /// What is wrong with it beyond what the server can tell.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

macro_rules! unary {
    ($(
        $operation:literal, $path:literal: $variant:ident $request:ident => $reply:ident
        $(| repeatable: $repeatable:literal)? $(| check: $check:path)? $(| options: $read:ident)? $(, $session:ident)?;
    )*) => {$(
        impl Unary for v1::$request {
            type Reply = v1::$reply;
            const OPERATION: &'static str = $operation;
            const PATH: &'static str = $path;
            $(const REPEATABLE: bool = $repeatable;)?
            fn header(reply: &v1::$reply) -> Option<&v1::ResponseHeader> {
                reply.header.as_ref()
            }
            fn into_operation(self) -> operation::Request {
                operation::Request::$variant(self)
            }
            fn reply(reply: answer::Reply) -> Option<v1::$reply> {
                match reply {
                    answer::Reply::$variant(reply) => Some(reply),
                    _ => None,
                }
            }
            $(fn session(&mut self) -> Option<&mut Option<v1::SessionCall>> {
                Some(&mut self.$session)
            })?
            $(fn read_options(&mut self) -> Option<&mut Option<v1::ReadOptions>> {
                Some(&mut self.$read)
            })?
            $(fn check(&self) -> Result<(), String> {
                $check(self)
            })?
        }
    )*};
}

unary! {
    "put", "/d_engine.v1.Kv/Put": Put PutRequest => PutResponse, session;
    "get", "/d_engine.v1.Kv/Get": Get GetRequest => GetResponse | options: read;
    "get many", "/d_engine.v1.Kv/GetMany": GetMany GetManyRequest => GetManyResponse | options: read;
    "range", "/d_engine.v1.Kv/Range": Range RangeRequest => RangeResponse | options: read;
    "delete", "/d_engine.v1.Kv/Delete": Delete DeleteRequest => DeleteResponse, session;
    "delete range", "/d_engine.v1.Kv/DeleteRange": DeleteRange DeleteRangeRequest => DeleteRangeResponse, session;
    "compare and swap", "/d_engine.v1.Kv/CompareAndSwap": CompareAndSwap CompareAndSwapRequest => CompareAndSwapResponse, session;
    "transaction", "/d_engine.v1.Kv/Txn": Txn TxnRequest => TxnResponse | check: crate::txn::check_depth | options: read, session;
    "grant lease", "/d_engine.v1.Lease/Grant": LeaseGrant LeaseGrantRequest => LeaseGrantResponse, session;
    "revoke lease", "/d_engine.v1.Lease/Revoke": LeaseRevoke LeaseRevokeRequest => LeaseRevokeResponse, session;
    "renew lease", "/d_engine.v1.Lease/Renew": LeaseRenew LeaseRenewRequest => LeaseRenewResponse | repeatable: true;
    "lease time to live", "/d_engine.v1.Lease/TimeToLive": LeaseTimeToLive LeaseTimeToLiveRequest => LeaseTimeToLiveResponse | options: read;
    "list leases", "/d_engine.v1.Lease/List": LeaseList LeaseListRequest => LeaseListResponse | options: read;
    "register session", "/d_engine.v1.Session/Register": SessionRegister SessionRegisterRequest => SessionRegisterResponse | repeatable: true;
    "renew session", "/d_engine.v1.Session/Renew": SessionRenew SessionRenewRequest => SessionRenewResponse | repeatable: true;
    "close session", "/d_engine.v1.Session/Close": SessionClose SessionCloseRequest => SessionCloseResponse | repeatable: true;
    "compact", "/d_engine.v1.Maintenance/Compact": Compact CompactRequest => CompactResponse | repeatable: true;
    "members", "/d_engine.v1.Cluster/Members": Members MembersRequest => MembersResponse;
    "status", "/d_engine.v1.Cluster/Status": Status StatusRequest => StatusResponse;
    "change member", "/d_engine.v1.Cluster/ChangeMember": ChangeMember ChangeMemberRequest => ChangeMemberResponse;
    "transfer leadership", "/d_engine.v1.Cluster/TransferLeadership": TransferLeadership TransferLeadershipRequest => TransferLeadershipResponse;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unary_method_is_here() {
        let source = include_str!("wire.rs");
        let mut methods = 0;
        for file in [
            include_str!("../../proto/d_engine/v1/kv.proto"),
            include_str!("../../proto/d_engine/v1/lease.proto"),
            include_str!("../../proto/d_engine/v1/session.proto"),
            include_str!("../../proto/d_engine/v1/maintenance.proto"),
            include_str!("../../proto/d_engine/v1/cluster.proto"),
        ] {
            let mut service = "";
            for line in file.lines().filter(|line| !line.contains("(stream")) {
                let mut words = line.split([' ', '(', ')', '{', ';']).filter(|word| !word.is_empty());
                match (words.next(), words.next()) {
                    (Some("service"), Some(name)) => service = name,
                    (Some("rpc"), Some(method)) => {
                        let path = format!("\"/d_engine.v1.{service}/{method}\"");
                        // What `operate` asks of single nodes is no operation of a pipeline.
                        let elsewhere = include_str!("operate.rs").contains(&path);
                        assert!(elsewhere || source.contains(&path), "{path} is missing");
                        methods += 1;
                    }
                    _ => {}
                }
            }
        }
        assert!(methods > 15, "{methods}");
        assert_eq!(v1::PutRequest::PATH, "/d_engine.v1.Kv/Put");
    }

    #[test]
    fn every_operation_of_the_pipeline_is_here() {
        let source = include_str!("wire.rs");
        let file = include_str!("../../proto/d_engine/v1/pipeline.proto");
        let mut operations = 0;
        for line in file.lines() {
            let mut words = line.split_whitespace();
            let Some(request) = words.next().and_then(|message| message.strip_suffix("Request")) else { continue };
            assert!(
                source.contains(&format!(": {request} {request}Request => {request}Response")),
                "{request} is missing"
            );
            operations += 1;
        }
        assert_eq!(operations, source.lines().filter(|line| line.contains("\", \"/d_engine.v1.")).count());
    }

    #[test]
    fn an_answer_of_another_kind_is_none() {
        let put = || answer::Reply::Put(v1::PutResponse::default());
        assert!(v1::PutRequest::reply(put()).is_some());
        assert!(v1::GetRequest::reply(put()).is_none());
    }

    /// What lies under `session = 15` in the protocol, and nothing else, goes under a session.
    #[test]
    fn requests_with_a_session_field_offer_it() {
        assert!(v1::PutRequest::default().session().is_some());
        assert!(v1::DeleteRequest::default().session().is_some());
        assert!(v1::DeleteRangeRequest::default().session().is_some());
        assert!(v1::CompareAndSwapRequest::default().session().is_some());
        assert!(v1::TxnRequest::default().session().is_some());
        assert!(v1::LeaseGrantRequest::default().session().is_some());
        assert!(v1::LeaseRevokeRequest::default().session().is_some());
        let source = include_str!("wire.rs").lines();
        let here = source.filter(|line| line.trim_end().ends_with(", session;")).count();
        let protocol =
            [include_str!("../../proto/d_engine/v1/kv.proto"), include_str!("../../proto/d_engine/v1/lease.proto")];
        let there: usize = protocol.iter().map(|file| file.matches("SessionCall session = 15;").count()).sum();
        assert_eq!(here, there);
    }
}
