//! The unary calls of the protocol, each as a request type that knows its method and its answer.

use d_engine_proto::v1;

/// A request of a unary call.
pub(crate) trait Unary: prost::Message + Clone + 'static {
    /// What answers it.
    type Reply: prost::Message + Default + 'static;
    /// Its name in errors and traces.
    const OPERATION: &'static str;
    /// Its gRPC method.
    const PATH: &'static str;
    /// The header of an answer.
    fn header(reply: &Self::Reply) -> Option<&v1::ResponseHeader>;
}

macro_rules! unary {
    ($($operation:literal, $path:literal: $request:ident => $reply:ident;)*) => {$(
        impl Unary for v1::$request {
            type Reply = v1::$reply;
            const OPERATION: &'static str = $operation;
            const PATH: &'static str = $path;
            fn header(reply: &v1::$reply) -> Option<&v1::ResponseHeader> {
                reply.header.as_ref()
            }
        }
    )*};
}

unary! {
    "put", "/d_engine.v1.Kv/Put": PutRequest => PutResponse;
    "get", "/d_engine.v1.Kv/Get": GetRequest => GetResponse;
    "get many", "/d_engine.v1.Kv/GetMany": GetManyRequest => GetManyResponse;
    "range", "/d_engine.v1.Kv/Range": RangeRequest => RangeResponse;
    "delete", "/d_engine.v1.Kv/Delete": DeleteRequest => DeleteResponse;
    "delete range", "/d_engine.v1.Kv/DeleteRange": DeleteRangeRequest => DeleteRangeResponse;
    "compare and swap", "/d_engine.v1.Kv/CompareAndSwap": CompareAndSwapRequest => CompareAndSwapResponse;
    "transaction", "/d_engine.v1.Kv/Txn": TxnRequest => TxnResponse;
    "members", "/d_engine.v1.Cluster/Members": MembersRequest => MembersResponse;
    "status", "/d_engine.v1.Cluster/Status": StatusRequest => StatusResponse;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_kv_and_cluster_is_here() {
        let files = include_str!("../../proto/d_engine/v1/kv.proto").to_owned()
            + include_str!("../../proto/d_engine/v1/cluster.proto");
        let source = include_str!("wire.rs");
        let mut service = "";
        for line in files.lines() {
            let mut words = line.split([' ', '(', ')', '{', ';']).filter(|word| !word.is_empty());
            match (words.next(), words.next()) {
                (Some("service"), Some(name)) => service = name,
                (Some("rpc"), Some(method)) => {
                    let path = format!("\"/d_engine.v1.{service}/{method}\"");
                    assert!(source.contains(&path), "{path} is missing");
                }
                _ => {}
            }
        }
        assert_eq!(v1::PutRequest::PATH, "/d_engine.v1.Kv/Put");
    }
}
