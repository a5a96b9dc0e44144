//! What operators do to the store.

use std::time::Duration;

use d_engine_proto::v1::compact_request::Target;
use d_engine_proto::{Revision, v1};

use crate::client::Client;
use crate::cluster::Header;
use crate::write::write_request;

write_request! {
    /// A compaction of the history; await it to send it.
    Compact(CompactRequest) -> CompactResponse {}
}

/// What a compaction did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompactResponse {
    /// Who answered.
    pub header: Header,
    /// The oldest revision left.
    pub compacted_revision: Revision,
}

impl From<v1::CompactResponse> for CompactResponse {
    fn from(response: v1::CompactResponse) -> Self {
        Self {
            header: response.header.unwrap_or_default().into(),
            compacted_revision: Revision(response.compacted_revision),
        }
    }
}

impl Client {
    /// Forgets the history before `oldest`, in the whole store, whatever this client's namespace: reads and watches of
    /// older revisions fail with [`ErrorKind::Compacted`](crate::ErrorKind::Compacted) from then on. The current value
    /// of every key stays. A server compacts by itself too, as it is configured.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// let old = client.put("greeting", "hello").await?.header.revision;
    /// let new = client.put("greeting", "hello, world").await?.header.revision;
    /// assert!(client.compact(new).await?.compacted_revision >= new);
    /// assert!(client.get("greeting").revision(old).await.is_err());
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put); `FutureRevision` for one that was not issued yet.
    pub fn compact(&self, oldest: Revision) -> Compact {
        Compact::of(self, v1::CompactRequest { target: Some(Target::Revision(oldest.get())) })
    }

    /// Forgets what was replaced longer than `age` ago, in whole milliseconds. Nodes remember when a revision was made
    /// only for as long as they run, so more may be kept.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use std::time::Duration;
    ///
    /// let answer = client.compact_older_than(Duration::from_secs(3600)).await?;
    /// println!("the oldest revision left is {}", answer.compacted_revision);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn compact_older_than(&self, age: Duration) -> Compact {
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        Compact::of(self, v1::CompactRequest { target: Some(Target::OlderThanMs(age_ms)) })
    }
}
