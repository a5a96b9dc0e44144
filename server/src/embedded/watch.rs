//! Watches of an application in the same process: events one by one, from the shared deliveries of the hub.

use std::sync::Arc;

use bytes::Bytes;
use d_engine_proto::{Revision, WatchEvent, v1};

use super::LocalClientError;
use crate::engine::EngineError;
use crate::watch::{Delivery, Update, Watch, WatchError};

/// What to watch, and from where. A key by itself stands for the changes of that key from now on.
#[derive(Clone, Debug, PartialEq)]
pub struct WatchRequest(pub(super) v1::WatchCreate);

impl WatchRequest {
    /// The changes of one key.
    #[must_use]
    pub fn key(key: impl AsRef<[u8]>) -> Self {
        let start = Bytes::copy_from_slice(key.as_ref());
        let end = [key.as_ref(), &[0]].concat();
        Self::range(start, end.into())
    }

    /// The changes of all keys that begin with `prefix`; an empty one stands for all keys.
    #[must_use]
    pub fn prefix(prefix: impl AsRef<[u8]>) -> Self {
        let prefix = prefix.as_ref();
        Self::range(Bytes::copy_from_slice(prefix), after_prefix(prefix))
    }

    fn range(start: Bytes, end: Bytes) -> Self {
        Self(v1::WatchCreate { range: Some(v1::KeyRange { start, end }), ..v1::WatchCreate::default() })
    }

    /// Begins with this revision, past or future, instead of what follows the node's applied one.
    #[must_use]
    pub fn from(mut self, revision: Revision) -> Self {
        self.0.from_revision = revision.get();
        self
    }

    /// Tells with each event what the key held before.
    #[must_use]
    pub fn previous(mut self) -> Self {
        self.0.previous = true;
        self
    }
}

impl<K: AsRef<[u8]>> From<K> for WatchRequest {
    fn from(key: K) -> Self {
        Self::key(key)
    }
}

/// The first key after all that begin with `prefix`; empty if there is none.
pub(super) fn after_prefix(prefix: &[u8]) -> Bytes {
    // The last byte that can grow, grown, and nothing after it.
    let keep = prefix.iter().rposition(|&byte| byte != u8::MAX).map_or(0, |last| last + 1);
    let mut end = prefix[..keep].to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}

/// The full events of a watch, in the order of revisions: none is lost and none comes twice. Dropping it ends the watch.
pub struct EventReceiver {
    /// `None` once it has ended: it keeps nothing of the engine then.
    watch: Option<Watch>,
    /// A delivery of which so many events are handed out.
    delivery: Option<(Arc<Delivery>, usize)>,
    reason: Option<LocalClientError>,
}

impl EventReceiver {
    pub(super) fn new(watch: Watch) -> Self {
        Self { watch: Some(watch), delivery: None, reason: None }
    }

    /// The next event; `None` once the watch has ended, for the reason that [`end_reason`](Self::end_reason) tells.
    /// Waits for as long as nothing happens, also while there is no leader. Nothing is lost if the future is dropped.
    pub async fn recv(&mut self) -> Option<v1::WatchEvent> {
        loop {
            if let Some((delivery, next)) = &mut self.delivery {
                let event = delivery.events().nth(*next);
                *next += 1;
                if event.is_some() {
                    return event;
                }
                self.delivery = None;
            }
            match self.watch.as_mut()?.next().await {
                Some(Ok(Update::Events(delivery))) => self.delivery = Some((delivery, 0)),
                Some(Ok(Update::Bookmark(_))) => {}
                Some(Err(error)) => self.end(match error {
                    WatchError::Stopping => LocalClientError::Stopped,
                    error => LocalClientError::Engine(EngineError::from(error)),
                }),
                None => self.end(LocalClientError::Stopped),
            }
        }
    }

    fn end(&mut self, reason: LocalClientError) {
        self.watch = None;
        self.reason = Some(reason);
    }

    /// Why the watch has ended; `None` while it goes on. [`LocalClientError::Stopped`] with the engine; `Compacted` when
    /// what comes next is gone from the history.
    #[must_use]
    pub fn end_reason(&self) -> Option<&LocalClientError> {
        self.reason.as_ref()
    }
}

/// The events of a watch, as keys and values. Dropping it ends the watch.
pub struct WatchReceiver(pub(super) EventReceiver);

impl WatchReceiver {
    /// The next event, as [`EventReceiver::recv`].
    pub async fn recv(&mut self) -> Option<WatchEvent> {
        loop {
            let event = self.0.recv().await?;
            let kind = event.kind();
            // Every event names its key.
            let Some(kv) = event.kv else { continue };
            return Some(match kind {
                v1::watch_event::Kind::Delete => WatchEvent::Delete(kv.key),
                _ => WatchEvent::Put(kv.key, kv.value),
            });
        }
    }

    /// Why the watch has ended, as [`EventReceiver::end_reason`].
    #[must_use]
    pub fn end_reason(&self) -> Option<&LocalClientError> {
        self.0.end_reason()
    }
}

/// The keys of a watch as they were at one revision, and what happens to them from then on.
pub struct SnapshotWatch {
    /// The revision of the keys.
    pub revision: Revision,
    /// Every key with its value at that revision, in byte order.
    pub pairs: Vec<(Bytes, Bytes)>,
    /// Every change after that revision.
    pub watch: WatchReceiver,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_the_first_key_without_it() {
        for (prefix, end) in [(&b"a"[..], &b"b"[..]), (b"a\xff", b"b"), (b"\xff\xff", b""), (b"", b""), (b"a/", b"a0")]
        {
            assert_eq!(after_prefix(prefix), end, "{prefix:?}");
        }
    }
}
