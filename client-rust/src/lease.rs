//! Leases: keys that end when nobody keeps them alive.

use std::future::IntoFuture;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::{LeaseId, v1};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::client::Client;
use crate::cluster::Header;
use crate::error::Error;
use crate::read::{ReadOptions, read_methods};
use crate::write::{ttl_ms, write_request};

write_request! {
    /// The grant of a lease; await it to send it.
    GrantLease(LeaseGrantRequest) -> LeaseGrantResponse {
        /// The id it shall have, instead of one that was never given. Refused with
        /// [`ErrorKind::LeaseExists`](crate::ErrorKind::LeaseExists) while another lease has it.
        pub fn id(mut self, id: LeaseId) -> Self {
            self.request.lease = id.get();
            self
        }
    }
}

/// A lease that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseGrantResponse {
    /// Who answered.
    pub header: Header,
    /// Its id.
    pub lease: LeaseId,
    /// For how long it lives if it is not renewed; it may live longer, never shorter.
    pub ttl: Duration,
}

impl From<v1::LeaseGrantResponse> for LeaseGrantResponse {
    fn from(response: v1::LeaseGrantResponse) -> Self {
        Self {
            header: response.header.unwrap_or_default().into(),
            lease: LeaseId(response.lease),
            ttl: Duration::from_millis(response.ttl_ms),
        }
    }
}

write_request! {
    /// The end of a lease and of its keys; await it to send it.
    RevokeLease(LeaseRevokeRequest) -> LeaseRevokeResponse {}
}

/// What the end of a lease did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseRevokeResponse {
    /// Who answered, and the revision after it.
    pub header: Header,
    /// Number of keys deleted.
    pub deleted: u64,
}

impl From<v1::LeaseRevokeResponse> for LeaseRevokeResponse {
    fn from(response: v1::LeaseRevokeResponse) -> Self {
        Self { header: response.header.unwrap_or_default().into(), deleted: response.deleted }
    }
}

write_request! {
    /// The prolongation of a lease; await it to send it.
    RenewLease(LeaseRenewRequest) -> LeaseRenewResponse {}
}

/// A lease that was prolonged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseRenewResponse {
    /// Who answered.
    pub header: Header,
    /// The lease.
    pub lease: LeaseId,
    /// For how long it lives from now on, at least from the moment the renewal was sent.
    pub ttl: Duration,
}

impl From<v1::LeaseRenewResponse> for LeaseRenewResponse {
    fn from(response: v1::LeaseRenewResponse) -> Self {
        Self {
            header: response.header.unwrap_or_default().into(),
            lease: LeaseId(response.lease),
            ttl: Duration::from_millis(response.ttl_ms),
        }
    }
}

/// A question for what is left of a lease; await it to send it.
#[derive(Clone, Debug)]
#[must_use = "a request is sent when awaited"]
pub struct LeaseTimeToLive {
    client: Client,
    lease: LeaseId,
    keys: bool,
    read: ReadOptions,
}

/// What is left of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseTimeToLiveResponse {
    /// Who answered, and the revision the answer stands for.
    pub header: Header,
    /// The lease.
    pub lease: LeaseId,
    /// For how long it lives after a renewal.
    pub ttl: Duration,
    /// What is left of that; on a node that does not lead, as of the last entry it applied.
    pub remaining: Duration,
    /// Number of its keys, in the whole store.
    pub key_count: u64,
    /// Its keys, if asked for, in byte order: those within the client's namespace.
    pub keys: Vec<Bytes>,
}

impl LeaseTimeToLive {
    read_methods!(current);

    /// Returns the keys too.
    pub fn keys(mut self) -> Self {
        self.keys = true;
        self
    }
}

impl IntoFuture for LeaseTimeToLive {
    type Output = Result<LeaseTimeToLiveResponse, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            let request =
                v1::LeaseTimeToLiveRequest { lease: self.lease.get(), keys: self.keys, read: self.read.message() };
            let response = self.client.call(request, self.read.plan()).await?;
            Ok(LeaseTimeToLiveResponse {
                header: response.header.unwrap_or_default().into(),
                lease: LeaseId(response.lease),
                ttl: Duration::from_millis(response.ttl_ms),
                remaining: Duration::from_millis(response.remaining_ms),
                key_count: response.key_count,
                keys: response.keys,
            })
        }
        .boxed()
    }
}

/// A list of leases; await it for the first page, or use [`pages`](Self::pages) or [`all`](Self::all).
#[derive(Clone, Debug)]
#[must_use = "a request is sent when awaited"]
pub struct Leases {
    client: Client,
    limit: u64,
    after: LeaseId,
    read: ReadOptions,
}

/// One page of a list of leases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeasesResponse {
    /// Who answered, and the revision the page stands for.
    pub header: Header,
    /// By ascending id.
    pub leases: Vec<LeaseSummary>,
    /// Whether leases are left.
    pub more: bool,
}

/// One lease of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseSummary {
    /// Its id.
    pub lease: LeaseId,
    /// For how long it lives after a renewal.
    pub ttl: Duration,
    /// What is left of that; on a node that does not lead, as of the last entry it applied.
    pub remaining: Duration,
    /// Number of its keys, in the whole store.
    pub key_count: u64,
}

impl From<v1::LeaseSummary> for LeaseSummary {
    fn from(summary: v1::LeaseSummary) -> Self {
        Self {
            lease: LeaseId(summary.lease),
            ttl: Duration::from_millis(summary.ttl_ms),
            remaining: Duration::from_millis(summary.remaining_ms),
            key_count: summary.key_count,
        }
    }
}

impl Leases {
    read_methods!(current);

    /// Returns at most this many leases, over all pages.
    pub fn limit(mut self, leases: u64) -> Self {
        self.limit = leases;
        self
    }

    /// Returns only leases with a greater id.
    pub fn after(mut self, lease: LeaseId) -> Self {
        self.after = lease;
        self
    }

    /// Pages through the list. Each page shows the leases as they are when it is read.
    #[must_use]
    pub fn pages(self) -> LeasePages {
        LeasePages { next: Some(self) }
    }

    /// Reads the whole list into memory, page by page. The timeout is that of each page.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn all(self) -> Result<Vec<LeaseSummary>, Error> {
        let mut pages = self.pages();
        let mut leases = Vec::new();
        while let Some(page) = pages.next().await? {
            leases.extend(page.leases);
        }
        Ok(leases)
    }

    async fn fetch(&self) -> Result<LeasesResponse, Error> {
        let request = v1::LeaseListRequest { limit: self.limit, after: self.after.get(), read: self.read.message() };
        let response = self.client.call(request, self.read.plan()).await?;
        Ok(LeasesResponse {
            header: response.header.unwrap_or_default().into(),
            leases: response.leases.into_iter().map(LeaseSummary::from).collect(),
            more: response.more,
        })
    }

    /// The request for what `page` left; `None` if nothing is left or the limit is reached.
    fn after_page(mut self, page: &LeasesResponse) -> Option<Self> {
        self.after = page.leases.last().filter(|_| page.more)?.lease;
        if self.limit != 0 {
            self.limit = self.limit.saturating_sub(page.leases.len() as u64);
            if self.limit == 0 {
                return None;
            }
        }
        self.read.min_revision = self.read.min_revision.max(page.header.revision);
        Some(self)
    }
}

impl IntoFuture for Leases {
    type Output = Result<LeasesResponse, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move { self.fetch().await }.boxed()
    }
}

/// The pages of a list of leases.
#[derive(Clone, Debug)]
pub struct LeasePages {
    next: Option<Leases>,
}

impl LeasePages {
    /// The next page; `None` after the last one. After an error it asks for the same page again.
    ///
    /// Dropping the future loses nothing: the page is asked for again.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn next(&mut self) -> Result<Option<LeasesResponse>, Error> {
        let Some(request) = &self.next else { return Ok(None) };
        let page = request.fetch().await?;
        self.next = self.next.take().and_then(|request| request.after_page(&page));
        Ok(Some(page))
    }
}

impl Client {
    /// Opens a lease. Keys are attached to it by [`Put::lease`](crate::Put::lease) and deleted together when it ends:
    /// revoked, or not renewed for its time to live, in whole milliseconds. Time runs only while the cluster has a
    /// leader, so a lease may live longer, never shorter. [`keep_lease`](Self::keep_lease) opens one and renews it.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use std::time::Duration;
    ///
    /// let lease = client.grant_lease(Duration::from_secs(10)).await?.lease;
    /// client.put("services/api/node1", "10.0.0.1:8080").lease(lease).await?;
    /// assert_eq!(client.get("services/api/node1").await?.kv.and_then(|kv| kv.lease), Some(lease));
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put); `InvalidArgument` too for a time to live below 100 milliseconds or above a year,
    /// `LeaseExists` for a chosen id that is taken.
    pub fn grant_lease(&self, ttl: Duration) -> GrantLease {
        GrantLease::of(self, v1::LeaseGrantRequest { ttl_ms: ttl_ms(ttl), ..Default::default() })
    }

    /// Ends a lease and deletes its keys, as one change, wherever in the store they are.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// # use std::time::Duration;
    /// let lease = client.grant_lease(Duration::from_secs(10)).await?.lease;
    /// client.put("services/api/node1", "10.0.0.1:8080").lease(lease).await?;
    /// assert_eq!(client.revoke_lease(lease).await?.deleted, 1);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put); `LeaseNotFound`.
    pub fn revoke_lease(&self, lease: LeaseId) -> RevokeLease {
        RevokeLease::of(self, v1::LeaseRevokeRequest { lease: lease.get(), ..Default::default() })
    }

    /// Prolongs a lease, once, to its full time to live from now on. To keep one alive, use
    /// [`keep_lease`](Self::keep_lease).
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// # use std::time::Duration;
    /// let lease = client.grant_lease(Duration::from_secs(10)).await?.lease;
    /// assert_eq!(client.renew_lease(lease).await?.ttl, Duration::from_secs(10));
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put); `LeaseNotFound`.
    pub fn renew_lease(&self, lease: LeaseId) -> RenewLease {
        RenewLease::of(self, v1::LeaseRenewRequest { lease: lease.get() })
    }

    /// How long a lease has left, and its keys.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// # use std::time::Duration;
    /// let lease = client.grant_lease(Duration::from_secs(10)).await?.lease;
    /// let left = client.lease_time_to_live(lease).await?.remaining;
    /// assert!(left <= Duration::from_secs(10));
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`get`](Self::get); `LeaseNotFound`.
    pub fn lease_time_to_live(&self, lease: LeaseId) -> LeaseTimeToLive {
        LeaseTimeToLive { client: self.clone(), lease, keys: false, read: ReadOptions::of(self) }
    }

    /// Lists the leases that were granted, by ascending id. Those that a time to live of a put made are left out.
    /// Leases are of the whole store, whatever this client's namespace.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// # use std::time::Duration;
    /// let lease = client.grant_lease(Duration::from_secs(10)).await?.lease;
    /// assert!(client.leases().all().await?.iter().any(|summary| summary.lease == lease));
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn leases(&self) -> Leases {
        Leases { client: self.clone(), limit: 0, after: LeaseId(0), read: ReadOptions::of(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pages_of_leases_go_on_after_the_last_id_until_the_limit() {
        let client = Client::builder().endpoints(["127.0.0.1:1"]).build().unwrap();
        let lease =
            |id| LeaseSummary { lease: LeaseId(id), ttl: Duration::ZERO, remaining: Duration::ZERO, key_count: 0 };
        let mut page = LeasesResponse { header: Header::default(), leases: vec![lease(3), lease(9)], more: true };
        let next = client.leases().limit(3).after_page(&page).unwrap();
        assert_eq!((next.limit, next.after), (1, LeaseId(9)));
        page.leases = vec![lease(11)];
        assert!(next.after_page(&page).is_none(), "the limit is reached");
        page.more = false;
        assert!(client.leases().after_page(&page).is_none(), "nothing is left");
    }
}
