//! Reads of single keys and lists of keys, and how reads are served.

use std::future::IntoFuture;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::{Revision, v1};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::call::Plan;
use crate::client::Client;
use crate::cluster::Header;
use crate::error::Error;
use crate::kv::{IntoBytes, KeyValue};
use crate::retry::Resend;
use crate::topology::Route;

/// How fresh a read is, and who serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Consistency {
    /// The latest committed value; relies on no clock.
    Linearizable,
    /// Linearizable while clock rates stay within the server's drift bound; served by the leader from its lease.
    Lease,
    /// A committed prefix, from the memory of the nearest node.
    Eventual,
}

/// The options that all reads share.
#[derive(Clone, Debug)]
pub(crate) struct ReadOptions {
    pub(crate) consistency: Option<Consistency>,
    pub(crate) min_revision: Revision,
    pub(crate) revision: Revision,
    pub(crate) timeout: Duration,
}

impl ReadOptions {
    pub(crate) fn of(client: &Client) -> Self {
        Self {
            consistency: client.options().consistency,
            min_revision: Revision(0),
            revision: Revision(0),
            timeout: client.options().call_timeout,
        }
    }

    pub(crate) fn plan(&self) -> Plan {
        let route = match self.consistency {
            Some(Consistency::Lease) => Route::Leader,
            Some(Consistency::Eventual) => Route::Any,
            // Without a choice the server's default decides; the leader serves any of them.
            Some(Consistency::Linearizable) | None => Route::PreferLeader,
        };
        Plan { route, resend: Resend::Idempotent, timeout: self.timeout }
    }

    pub(crate) fn message(&self) -> Option<v1::ReadOptions> {
        let consistency = match self.consistency {
            None => v1::Consistency::Unspecified,
            Some(Consistency::Linearizable) => v1::Consistency::Linearizable,
            Some(Consistency::Lease) => v1::Consistency::Lease,
            Some(Consistency::Eventual) => v1::Consistency::Eventual,
        };
        Some(v1::ReadOptions {
            consistency: consistency.into(),
            min_revision: self.min_revision.get(),
            revision: self.revision.get(),
        })
    }
}

/// The builder methods that all reads share, and those of what has no past.
macro_rules! read_methods {
    () => {
        $crate::read::read_methods!(current);

        /// Read as of this past revision instead of the current one.
        pub fn revision(mut self, revision: d_engine_proto::Revision) -> Self {
            self.read.revision = revision;
            self
        }
    };
    (current) => {
        /// How the read is served; otherwise the client's default decides.
        pub fn consistency(mut self, consistency: $crate::Consistency) -> Self {
            self.read.consistency = Some(consistency);
            self
        }

        /// Answer only from a node that has applied this revision. Given the highest revision the caller has seen,
        /// eventual reads never go back in time.
        pub fn min_revision(mut self, revision: d_engine_proto::Revision) -> Self {
            self.read.min_revision = revision;
            self
        }

        /// Budget of this call, all attempts included.
        pub fn timeout(mut self, timeout: std::time::Duration) -> Self {
            self.read.timeout = timeout;
            self
        }
    };
}
pub(crate) use read_methods;

/// What a get found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetResponse {
    /// Who answered, and the revision the answer stands for.
    pub header: Header,
    /// `None` if the key does not exist.
    pub kv: Option<KeyValue>,
}

impl GetResponse {
    /// The value alone.
    #[must_use]
    pub fn into_value(self) -> Option<Bytes> {
        self.kv.map(|kv| kv.value)
    }
}

impl From<v1::GetResponse> for GetResponse {
    fn from(response: v1::GetResponse) -> Self {
        Self { header: response.header.unwrap_or_default().into(), kv: response.kv.map(KeyValue::from) }
    }
}

/// A read of one key; await it to send it.
#[derive(Clone, Debug)]
#[must_use = "a request is sent when awaited"]
pub struct Get {
    client: Client,
    key: Bytes,
    read: ReadOptions,
}

impl Get {
    read_methods!();
}

impl IntoFuture for Get {
    type Output = Result<GetResponse, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            let request = v1::GetRequest { key: self.key, read: self.read.message() };
            self.client.call(request, self.read.plan()).await.map(GetResponse::from)
        }
        .boxed()
    }
}

/// What a get of several keys found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetManyResponse {
    /// Who answered, and the one revision at which all keys were read.
    pub header: Header,
    /// The keys that exist, in the order asked for.
    pub kvs: Vec<KeyValue>,
}

/// A read of several keys at one revision; await it to send it.
#[derive(Clone, Debug)]
#[must_use = "a request is sent when awaited"]
pub struct GetMany {
    client: Client,
    keys: Vec<Bytes>,
    read: ReadOptions,
}

impl GetMany {
    read_methods!();
}

impl IntoFuture for GetMany {
    type Output = Result<GetManyResponse, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            let request = v1::GetManyRequest { keys: self.keys, read: self.read.message() };
            let response = self.client.call(request, self.read.plan()).await?;
            Ok(GetManyResponse {
                header: response.header.unwrap_or_default().into(),
                kvs: response.kvs.into_iter().map(KeyValue::from).collect(),
            })
        }
        .boxed()
    }
}

impl Client {
    /// Reads one key.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::Consistency;
    ///
    /// client.put("greeting", "hello").await?;
    /// let value = client.get("greeting").consistency(Consistency::Linearizable).await?.into_value();
    /// assert_eq!(value.as_deref(), Some(&b"hello"[..]));
    /// assert_eq!(client.get("nothing").await?.into_value(), None);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `InvalidArgument`, `Compacted`, `FutureRevision`, `Behind`, `FailedPrecondition`, or what keeps any call from
    /// being served: `Unavailable`, `DeadlineExceeded`, `ResourceExhausted`, `WrongCluster`, `Closed`.
    pub fn get(&self, key: impl IntoBytes) -> Get {
        Get { client: self.clone(), key: key.into_bytes(), read: ReadOptions::of(self) }
    }

    /// Reads several keys at one revision; 1024 at most, and together no more than an answer carries.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// client.put("a", "1").await?;
    /// client.put("c", "3").await?;
    /// let answer = client.get_many(["a", "b", "c"]).await?;
    /// let keys: Vec<_> = answer.kvs.iter().map(|kv| &kv.key[..]).collect();
    /// assert_eq!(keys, [b"a", b"c"]);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`get`](Self::get); `InvalidArgument` too for more than that.
    pub fn get_many(&self, keys: impl IntoIterator<Item = impl IntoBytes>) -> GetMany {
        let keys = keys.into_iter().map(IntoBytes::into_bytes).collect();
        GetMany { client: self.clone(), keys, read: ReadOptions::of(self) }
    }
}
