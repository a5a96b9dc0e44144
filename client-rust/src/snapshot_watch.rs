//! List, then watch: the keys of an interval at one revision, and every change after it.

use std::future::IntoFuture;
use std::time::Duration;

use d_engine_proto::Revision;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::client::Client;
use crate::error::{Error, ErrorKind};
use crate::kv::{KeyRange, KeyValue};
use crate::read::Consistency;
use crate::watch::WatchStream;

/// How often the whole is begun anew because the revision that was read was compacted before the watch began.
const ATTEMPTS: u32 = 5;

/// The keys of an interval, and what happens to them from then on.
#[derive(Debug)]
pub struct SnapshotWatch {
    /// The revision of the keys.
    pub revision: Revision,
    /// All keys of the interval at that revision, in byte order.
    pub kvs: Vec<KeyValue>,
    /// Every change after that revision.
    pub watch: WatchStream,
}

/// A list to be read and then watched; await it to do so.
#[derive(Clone, Debug)]
#[must_use = "nothing is read until this is awaited"]
pub struct SnapshotWatchCall {
    client: Client,
    range: KeyRange,
    consistency: Consistency,
    min_revision: Revision,
    previous: bool,
    timeout: Duration,
}

impl SnapshotWatchCall {
    /// How fresh the list is; otherwise the client's default decides, and without one it is linearizable.
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = consistency;
        self
    }

    /// Reads the list at this revision or a later one.
    pub fn min_revision(mut self, revision: Revision) -> Self {
        self.min_revision = revision;
        self
    }

    /// Makes the watch deliver what the keys held before, too.
    pub fn previous(mut self) -> Self {
        self.previous = true;
        self
    }

    /// Budget of each page of the list, and of opening the watch.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    async fn attempt(&self) -> Result<SnapshotWatch, Error> {
        let list = self.client.range(self.range.clone()).consistency(self.consistency).timeout(self.timeout);
        let mut pages = list.min_revision(self.min_revision).pages();
        let (mut revision, mut kvs) = (Revision(0), Vec::new());
        while let Some(page) = pages.next().await? {
            revision = page.header.revision;
            kvs.extend(page.kvs);
        }
        let mut watch = self.client.watch_range(self.range.clone()).from(revision.next()).timeout(self.timeout);
        if self.previous {
            watch = watch.previous();
        }
        Ok(SnapshotWatch { revision, kvs, watch: watch.await? })
    }
}

impl SnapshotWatchCall {
    /// The same, by a client whose calls are not cancelled.
    pub(crate) fn uncancelled(self) -> Self {
        Self { client: self.client.uncancelled(), ..self }
    }
}

impl IntoFuture for SnapshotWatchCall {
    type Output = Result<SnapshotWatch, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            let mut attempts = 1;
            loop {
                match self.attempt().await {
                    Err(error) if error.kind() == ErrorKind::Compacted && attempts < ATTEMPTS => attempts += 1,
                    result => return result,
                }
            }
        }
        .boxed()
    }
}

impl Client {
    /// Reads an interval at one revision, page by page, and watches it from the next revision on: nothing that happens
    /// in between is missed. A list that is compacted before the watch begins is read again.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::KeyRange;
    ///
    /// client.put("services/a", "10.0.0.1:80").await?;
    /// let mut services = client.watch_from_snapshot(KeyRange::prefix("services/")).await?;
    /// assert_eq!(services.kvs.len(), 1);
    /// let next = client.put("services/b", "10.0.0.2:80").await?.header.revision;
    /// while let Some(update) = services.watch.next().await {
    ///     if update?.revision >= next {
    ///         break;
    ///     }
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`range`](Self::range) and [`watch`](Self::watch); `Compacted` if the history is compacted faster than the
    /// interval can be read, time and again.
    pub fn watch_from_snapshot(&self, range: KeyRange) -> SnapshotWatchCall {
        SnapshotWatchCall {
            client: self.clone(),
            range,
            consistency: self.options().consistency.unwrap_or(Consistency::Linearizable),
            min_revision: Revision(0),
            previous: false,
            timeout: self.options().call_timeout,
        }
    }
}
