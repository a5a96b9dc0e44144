//! The smart client of d-engine: it finds the members and the leader, keeps every call within one deadline, repeats
//! a write until it is answered without ever applying it twice, and says truthfully what became of the rest.
//!
//! ```
//! # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
//! # fn main() { run(async |_| {
//! use d_engine_client::{Client, Outcome};
//!
//! # let endpoints: Vec<String> = std::env::var("D_ENGINE_ENDPOINTS").unwrap().split(',').map(Into::into).collect();
//! # /*
//! let endpoints = ["127.0.0.1:9081", "127.0.0.1:9082"];
//! # */
//! let client = Client::builder().endpoints(endpoints).connect().await?;
//! match client.put("greeting", "hello").await {
//!     Ok(answer) => println!("written at revision {}", answer.header.revision),
//!     Err(error) if error.outcome() == Outcome::Unknown => println!("read it before writing again: {error}"),
//!     Err(error) => println!("not written: {error}"),
//! }
//! # Ok(()) }) }
//! ```
//!
//! From top to bottom: a request (`read`, `write`, `range`, `txn`, `lease`, `maintenance`, `cluster`) becomes a protocol
//! message and a plan; `namespace` maps its keys on the way in and those of the answer on the way out; `call` makes
//! attempts until one succeeds, `retry` says that it must not go on, or the deadline passes; `session` gives a write the
//! number under which it is applied once; `topology` picks the node of each attempt; `connection` has the channels over what
//! `transport` connects, with `tls` or without, and
//! `pipeline` carries the calls of one connection over one stream, many to a message; where a node has none, each is a
//! call of its own, and `gate` proves what was not sent. Beside them, `keeper` keeps a lease alive, by the `clock` that
//! counts suspended time.
//!
//! A call lasts `until` its deadline, and waits within it for `room`: calls in flight and their bytes are bounded. What
//! runs in the background is in `tasks`, and ends with the client.
//!
//! A `watch` goes on by itself wherever it breaks, over the streams of `watch_link`; `snapshot_watch` puts a list before
//! it, and `cache` keeps what both give. A `lock` and an `election` are a place in a `lock_queue`: a key under a lease
//! that a `keeper` renews, and a watch of whoever is before.
//!
//! `observe` tells observers what happens, and takes the trace of whoever calls along; `metrics` is an observer.
//!
//! The client never depends on the server, and a language binding adds nothing to its semantics.

mod cache;
mod call;
mod client;
mod clock;
mod cluster;
mod connection;
mod election;
mod error;
mod fencing;
mod gate;
mod keeper;
mod kv;
mod lease;
mod lock;
mod lock_queue;
mod maintenance;
mod membership;
#[cfg(feature = "metrics")]
mod metrics;
mod namespace;
mod observe;
mod operate;
mod options;
mod pipeline;
#[cfg(not(feature = "tls"))]
mod plain;
mod range;
mod read;
mod retry;
mod room;
mod session;
mod snapshot_watch;
mod stats;
mod tasks;
#[cfg(feature = "tls")]
mod tls;
mod topology;
mod transport;
mod txn;
mod until;
mod watch;
mod watch_link;
mod wire;
mod write;

pub use cache::{Cache, CacheCall, CacheChange, CacheChanges, CacheState, CacheView};
pub use client::Client;
pub use cluster::{Header, Leader, Member, MemberRole, Members, NodeRole, NodeStatus};
pub use election::{Election, ElectionLeader, ElectionObserver, Leadership};
pub use error::{Error, ErrorKind, Outcome};
pub use fencing::{FencingToken, InvalidFencingToken};
pub use keeper::{KeepLease, LeaseKeeper, LeaseState};
pub use kv::{IntoBytes, KeyRange, KeyValue};
pub use lease::{
    GrantLease, LeaseGrantResponse, LeasePages, LeaseRenewResponse, LeaseRevokeResponse, LeaseSummary, LeaseTimeToLive,
    LeaseTimeToLiveResponse, Leases, LeasesResponse, RenewLease, RevokeLease,
};
pub use lock::{Lock, LockGuard};
pub use maintenance::{Compact, CompactResponse};
pub use membership::{ChangeMember, ChangeMemberResponse, TransferLeadership, TransferLeadershipResponse};
#[cfg(feature = "metrics")]
pub use metrics::ClientMetrics;
pub use observe::{Attempt, Call, End, Notice, Observer, TraceContext};
pub use operate::{CheckFinding, CheckResponse, MemberCheck, Snapshot};
pub use options::ClientBuilder;
pub use range::{Pages, Range, RangeResponse};
pub use read::{Consistency, Get, GetMany, GetManyResponse, GetResponse};
pub use snapshot_watch::{SnapshotWatch, SnapshotWatchCall};
pub use stats::Stats;
#[cfg(feature = "tls")]
pub use tls::TlsOptions;
pub use txn::{Compare, Op, Relation, Txn, TxnCall, TxnResponse, TxnResult};
pub use watch::{Watch, WatchEvent, WatchStream, WatchUpdate};
pub use write::{
    CompareAndSwap, CompareAndSwapResponse, Delete, DeleteRange, DeleteRangeResponse, DeleteResponse, Put, PutResponse,
};

pub use bytes::Bytes;
pub use d_engine_proto::{Epoch, LeaseId, LogIndex, NodeId, Revision, SessionId, Term};
pub use tokio_util::sync::CancellationToken;
