//! Writes of single keys and intervals.
//!
//! A write goes under the client's session (`session`), so that it can be sent until it is answered and is applied
//! once. What stays open nevertheless is told by the outcome of the error.

use std::time::Duration;

use d_engine_proto::{LeaseId, v1};

use crate::call::Plan;
use crate::client::Client;
use crate::cluster::Header;
use crate::error::Error;
use crate::kv::{IntoBytes, KeyRange, KeyValue};
use crate::retry::Resend;
use crate::topology::Route;
use crate::wire::Unary;

/// Implements awaiting for a write that wraps its protocol message.
macro_rules! write_request {
    ($(#[$doc:meta])* $name:ident($message:ident) -> $response:ident { $($methods:tt)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        #[must_use = "a request is sent when awaited"]
        pub struct $name {
            client: $crate::Client,
            request: d_engine_proto::v1::$message,
            timeout: std::time::Duration,
        }

        impl $name {
            pub(crate) fn of(client: &$crate::Client, request: d_engine_proto::v1::$message) -> Self {
                Self { client: client.clone(), request, timeout: client.options().call_timeout }
            }

            /// Budget of this call, all attempts included.
            pub fn timeout(mut self, timeout: std::time::Duration) -> Self {
                self.timeout = timeout;
                self
            }

            $($methods)*
        }

        impl std::future::IntoFuture for $name {
            type Output = Result<$response, $crate::Error>;
            type IntoFuture = futures_util::future::BoxFuture<'static, Self::Output>;

            fn into_future(self) -> Self::IntoFuture {
                Box::pin(async move {
                    $crate::write::write(&self.client, self.request, self.timeout).await.map($response::from)
                })
            }
        }
    };
}
pub(crate) use write_request;

/// Sends a request that changes the store.
pub(crate) async fn write<R: Unary>(client: &Client, request: R, timeout: Duration) -> Result<R::Reply, Error> {
    let resend = if R::REPEATABLE { Resend::Repeatable } else { Resend::IfNotApplied };
    client.call(request, Plan { route: Route::Leader, resend, timeout }).await
}

/// A time to live as it travels. What is below a millisecond counts as one, since 0 stands for no end: the server then
/// says what the shortest is.
pub(crate) fn ttl_ms(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1)
}

write_request! {
    /// A write of one key; await it to send it.
    Put(PutRequest) -> PutResponse {
        /// Returns what the key held before.
        pub fn return_previous(mut self) -> Self {
            self.request.return_previous = true;
            self
        }

        /// Attaches the key to a lease: it is deleted when the lease ends.
        pub fn lease(mut self, lease: LeaseId) -> Self {
            self.request.lease = lease.get();
            self
        }

        /// Gives the key a time to live, counted from this write in milliseconds: then it is deleted. The next put of
        /// the key decides anew. Excludes [`lease`](Self::lease).
        pub fn ttl(mut self, ttl: Duration) -> Self {
            self.request.ttl_ms = ttl_ms(ttl);
            self
        }
    }
}

/// What a put did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutResponse {
    /// Who answered, and the revision of this write.
    pub header: Header,
    /// What the key held before, if it existed and was asked for.
    pub previous: Option<KeyValue>,
    /// Lease the key is attached to now, also the one that a time to live made.
    pub lease: Option<LeaseId>,
}

impl From<v1::PutResponse> for PutResponse {
    fn from(response: v1::PutResponse) -> Self {
        Self {
            header: response.header.unwrap_or_default().into(),
            previous: response.previous.map(KeyValue::from),
            lease: (response.lease != 0).then_some(LeaseId(response.lease)),
        }
    }
}

write_request! {
    /// A deletion of one key; await it to send it.
    Delete(DeleteRequest) -> DeleteResponse {
        /// Returns what the key held before.
        pub fn return_previous(mut self) -> Self {
            self.request.return_previous = true;
            self
        }
    }
}

/// What a delete did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteResponse {
    /// Who answered, and the revision after the deletion.
    pub header: Header,
    /// Whether the key existed.
    pub deleted: bool,
    /// What the key held before, if it existed and was asked for.
    pub previous: Option<KeyValue>,
}

impl From<v1::DeleteResponse> for DeleteResponse {
    fn from(response: v1::DeleteResponse) -> Self {
        Self {
            header: response.header.unwrap_or_default().into(),
            deleted: response.deleted,
            previous: response.previous.map(KeyValue::from),
        }
    }
}

write_request! {
    /// A deletion of an interval of keys; await it to send it.
    DeleteRange(DeleteRangeRequest) -> DeleteRangeResponse {
        /// Returns what the keys held before.
        pub fn return_previous(mut self) -> Self {
            self.request.return_previous = true;
            self
        }
    }
}

/// What a delete of an interval did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteRangeResponse {
    /// Who answered, and the revision after the deletion.
    pub header: Header,
    /// Number of keys deleted.
    pub deleted: u64,
    /// What they held before, if asked for.
    pub previous: Vec<KeyValue>,
}

impl From<v1::DeleteRangeResponse> for DeleteRangeResponse {
    fn from(response: v1::DeleteRangeResponse) -> Self {
        Self {
            header: response.header.unwrap_or_default().into(),
            deleted: response.deleted,
            previous: response.previous.into_iter().map(KeyValue::from).collect(),
        }
    }
}

write_request! {
    /// A write on condition of what the key holds; await it to send it.
    CompareAndSwap(CompareAndSwapRequest) -> CompareAndSwapResponse {
        /// Attaches the key to a lease.
        pub fn lease(mut self, lease: LeaseId) -> Self {
            self.request.lease = lease.get();
            self
        }
    }
}

/// What a compare-and-swap did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompareAndSwapResponse {
    /// Who answered, and the revision of the write or, on failure, of the comparison.
    pub header: Header,
    /// Whether the key held what was expected, and holds the new value now.
    pub succeeded: bool,
    /// On failure, what the key holds; `None` if it does not exist.
    pub current: Option<KeyValue>,
}

impl From<v1::CompareAndSwapResponse> for CompareAndSwapResponse {
    fn from(response: v1::CompareAndSwapResponse) -> Self {
        Self {
            header: response.header.unwrap_or_default().into(),
            succeeded: response.succeeded,
            current: response.current.map(KeyValue::from),
        }
    }
}

impl Client {
    /// Writes one key. Acknowledged means: replicated, and durable as the server's persistence policy says.
    ///
    /// Dropping the future leaves the outcome unknown.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// let first = client.put("greeting", "hello").await?;
    /// let second = client.put("greeting", "hello, world").return_previous().await?;
    /// assert!(second.header.revision > first.header.revision);
    /// assert_eq!(second.previous.map(|kv| kv.value).as_deref(), Some(&b"hello"[..]));
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `InvalidArgument`, `ResourceExhausted`, `LeadershipLost`, `Unavailable`, `DeadlineExceeded`, `WrongCluster`,
    /// `Closed`. Ask [`Error::outcome`] whether the write took effect.
    pub fn put(&self, key: impl IntoBytes, value: impl IntoBytes) -> Put {
        let request = v1::PutRequest { key: key.into_bytes(), value: value.into_bytes(), ..Default::default() };
        Put::of(self, request)
    }

    /// Writes one key that is deleted when its time to live has passed, unless it is put again before.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use std::time::Duration;
    ///
    /// client.put_with_ttl("cache/front-page", "<html>", Duration::from_millis(200)).await?;
    /// let mut watch = client.watch("cache/front-page").await?;
    /// while client.get("cache/front-page").await?.into_value().is_some() {
    ///     watch.next().await;
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put); `InvalidArgument` too for a time to live below 100 milliseconds or above a year.
    pub fn put_with_ttl(&self, key: impl IntoBytes, value: impl IntoBytes, ttl: Duration) -> Put {
        self.put(key, value).ttl(ttl)
    }

    /// Deletes one key. Deleting nothing succeeds.
    ///
    /// Dropping the future leaves the outcome unknown.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// client.put("greeting", "hello").await?;
    /// assert!(client.delete("greeting").await?.deleted);
    /// assert!(!client.delete("greeting").await?.deleted);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn delete(&self, key: impl IntoBytes) -> Delete {
        Delete::of(self, v1::DeleteRequest { key: key.into_bytes(), ..Default::default() })
    }

    /// Deletes all keys of an interval, as one change.
    ///
    /// Dropping the future leaves the outcome unknown.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::KeyRange;
    ///
    /// client.put("jobs/1", "done").await?;
    /// client.put("jobs/2", "done").await?;
    /// assert_eq!(client.delete_range(KeyRange::prefix("jobs/")).await?.deleted, 2);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn delete_range(&self, range: KeyRange) -> DeleteRange {
        DeleteRange::of(self, v1::DeleteRangeRequest { range: Some(range.into()), ..Default::default() })
    }

    /// Writes `value` if the key holds `expected`; with `None`, if the key does not exist. A comparison that fails is
    /// an answer, not an error.
    ///
    /// Dropping the future leaves the outcome unknown.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// let created = client.compare_and_swap("counter", None::<&[u8]>, "1").await?;
    /// let swapped = client.compare_and_swap("counter", Some("1"), "2").await?;
    /// let late = client.compare_and_swap("counter", Some("1"), "3").await?;
    /// assert_eq!((created.succeeded, swapped.succeeded, late.succeeded), (true, true, false));
    /// assert_eq!(late.current.map(|kv| kv.value).as_deref(), Some(&b"2"[..]));
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn compare_and_swap(
        &self,
        key: impl IntoBytes,
        expected: Option<impl IntoBytes>,
        value: impl IntoBytes,
    ) -> CompareAndSwap {
        let request = v1::CompareAndSwapRequest {
            key: key.into_bytes(),
            expected: expected.map(IntoBytes::into_bytes),
            value: value.into_bytes(),
            ..Default::default()
        };
        CompareAndSwap::of(self, request)
    }
}
