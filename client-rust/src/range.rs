//! Reads of intervals, page by page.

use std::future::IntoFuture;

use d_engine_proto::v1;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::client::Client;
use crate::cluster::Header;
use crate::error::Error;
use crate::kv::{KeyRange, KeyValue};
use crate::read::{ReadOptions, read_methods};

/// A read of an interval of keys at one revision; await it for the first page, or use [`pages`](Self::pages) or
/// [`all`](Self::all).
#[derive(Clone, Debug)]
#[must_use = "a request is sent when awaited"]
pub struct Range {
    client: Client,
    range: KeyRange,
    limit: u64,
    descending: bool,
    keys_only: bool,
    count_only: bool,
    read: ReadOptions,
}

/// One page of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeResponse {
    /// Who answered, and the revision the page stands for. Read further pages at it for a consistent whole.
    pub header: Header,
    /// The keys, in the order asked for.
    pub kvs: Vec<KeyValue>,
    /// Keys in the interval, if the page leaves none of them out: what is left is not counted, except by
    /// [`count_only`](Range::count_only).
    pub count: Option<u64>,
    /// The part of the interval that is left; `None` if the page ends it.
    pub rest: Option<KeyRange>,
}

impl RangeResponse {
    pub(crate) fn of(response: v1::RangeResponse, range: &KeyRange, descending: bool) -> Self {
        let rest = response.more.then(|| {
            let (start, end) =
                if descending { (range.start.clone(), response.next) } else { (response.next, range.end.clone()) };
            KeyRange { start, end }
        });
        Self {
            header: response.header.unwrap_or_default().into(),
            kvs: response.kvs.into_iter().map(KeyValue::from).collect(),
            count: response.count,
            rest,
        }
    }
}

impl Range {
    read_methods!();

    /// Returns at most this many keys, over all pages.
    pub fn limit(mut self, keys: u64) -> Self {
        self.limit = keys;
        self
    }

    /// Returns the keys from last to first.
    pub fn descending(mut self) -> Self {
        self.descending = true;
        self
    }

    /// Leaves the values out.
    pub fn keys_only(mut self) -> Self {
        self.keys_only = true;
        self
    }

    /// Returns only the count, that of the whole interval.
    pub fn count_only(mut self) -> Self {
        self.count_only = true;
        self
    }

    /// Pages through the interval at one revision, that of the first page.
    #[must_use]
    pub fn pages(self) -> Pages {
        Pages { next: Some(self) }
    }

    /// Reads the whole interval at one revision into memory, page by page. The timeout is that of each page.
    ///
    /// # Errors
    /// As [`Client::get`]; `Compacted` if the revision of the first page is gone before the last one was read.
    pub async fn all(self) -> Result<Vec<KeyValue>, Error> {
        let mut pages = self.pages();
        let mut kvs = Vec::new();
        while let Some(page) = pages.next().await? {
            kvs.extend(page.kvs);
        }
        Ok(kvs)
    }

    async fn fetch(&self) -> Result<RangeResponse, Error> {
        let response = self.client.call(self.message(), self.read.plan()).await?;
        Ok(RangeResponse::of(response, &self.range, self.descending))
    }

    fn message(&self) -> v1::RangeRequest {
        let order = if self.descending { v1::RangeOrder::Descending } else { v1::RangeOrder::Ascending };
        v1::RangeRequest {
            range: Some(self.range.clone().into()),
            read: self.read.message(),
            limit: self.limit,
            order: order.into(),
            keys_only: self.keys_only,
            count_only: self.count_only,
        }
    }

    /// The request for what `page` left, at the page's revision. `None` if nothing is left or the limit is reached.
    fn after(mut self, page: &RangeResponse) -> Option<Self> {
        self.range = page.rest.clone()?;
        if self.limit != 0 {
            self.limit = self.limit.saturating_sub(page.kvs.len() as u64);
            if self.limit == 0 {
                return None;
            }
        }
        let revision = page.header.revision;
        // Revision 0 asks for the current one, and an empty store has no past: then there is no rest either.
        self.read.revision = revision;
        self.read.min_revision = self.read.min_revision.max(revision);
        Some(self)
    }
}

impl IntoFuture for Range {
    type Output = Result<RangeResponse, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move { self.fetch().await }.boxed()
    }
}

/// The pages of a range, all at the revision of the first.
#[derive(Clone, Debug)]
pub struct Pages {
    next: Option<Range>,
}

impl Pages {
    /// The next page; `None` after the last one. After an error it asks for the same page again.
    ///
    /// Dropping the future loses nothing: the page is asked for again.
    ///
    /// # Errors
    /// As [`Range::all`].
    pub async fn next(&mut self) -> Result<Option<RangeResponse>, Error> {
        let Some(request) = &self.next else { return Ok(None) };
        let page = request.fetch().await?;
        self.next = self.next.take().and_then(|request| request.after(&page));
        Ok(Some(page))
    }
}

impl Client {
    /// Reads an interval of keys.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::KeyRange;
    ///
    /// for host in ["a", "b", "c"] {
    ///     client.put(format!("services/{host}"), "up").await?;
    /// }
    /// let page = client.range(KeyRange::prefix("services/")).limit(2).await?;
    /// assert_eq!(page.kvs.len(), 2);
    /// assert!(page.rest.is_some());
    /// let all = client.range(KeyRange::prefix("services/")).all().await?;
    /// assert_eq!(all.len(), 3);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn range(&self, range: KeyRange) -> Range {
        Range {
            client: self.clone(),
            range,
            limit: 0,
            descending: false,
            keys_only: false,
            count_only: false,
            read: ReadOptions::of(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use d_engine_proto::Revision;

    use super::*;

    fn page(more: bool, next: &'static [u8]) -> v1::RangeResponse {
        v1::RangeResponse { more, next: Bytes::from_static(next), ..v1::RangeResponse::default() }
    }

    #[test]
    fn the_rest_of_a_page_is_the_remaining_interval() {
        let range = KeyRange::between("a", "m");
        assert_eq!(RangeResponse::of(page(false, b""), &range, false).rest, None);
        assert_eq!(RangeResponse::of(page(true, b"f"), &range, false).rest, Some(KeyRange::between("f", "m")));
        assert_eq!(RangeResponse::of(page(true, b"f"), &range, true).rest, Some(KeyRange::between("a", "f")));
    }

    #[tokio::test]
    async fn pages_go_on_at_the_first_revision_until_the_limit() {
        let client = Client::builder().endpoints(["127.0.0.1:1"]).build().unwrap();
        let request = client.range(KeyRange::prefix("k")).limit(3).min_revision(Revision(4));
        let kv = KeyValue::from(v1::KeyValue::default());
        let mut answer = RangeResponse::of(page(true, b"k2"), &request.range, false);
        answer.header.revision = Revision(9);
        answer.kvs = vec![kv.clone(), kv.clone()];
        let next = request.after(&answer).unwrap();
        assert_eq!((next.limit, next.read.revision, next.read.min_revision), (1, Revision(9), Revision(9)));
        assert_eq!(next.range, KeyRange::between("k2", "l"));
        answer.kvs = vec![kv];
        assert!(next.after(&answer).is_none(), "the limit is reached");
    }
}
