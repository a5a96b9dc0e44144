//! One change of one key, as it is shown: a line for people, an object for programs.

use d_engine_client::{Bytes, KeyValue, Revision, WatchEvent};
use serde::Serialize;

use crate::encoding::Encoding;
use crate::output::{KeyJson, KeyValueJson};

/// What a line tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// A key as it is, of a snapshot.
    Key,
    Put,
    Delete,
    /// Everything up to a revision was shown.
    Bookmark,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Key => "KEY",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
            Self::Bookmark => "BOOKMARK",
        }
    }
}

/// A change, or what is shown among changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change<'a> {
    pub(crate) kind: Kind,
    pub(crate) revision: Revision,
    key: Option<&'a Bytes>,
    /// What the key holds since.
    pub(crate) kv: Option<&'a KeyValue>,
    previous: Option<&'a KeyValue>,
}

impl<'a> Change<'a> {
    pub(crate) fn key(kv: &'a KeyValue) -> Self {
        Self { kind: Kind::Key, revision: kv.mod_revision, key: Some(&kv.key), kv: Some(kv), previous: None }
    }

    pub(crate) fn bookmark(revision: Revision) -> Self {
        Self { kind: Kind::Bookmark, revision, key: None, kv: None, previous: None }
    }

    pub(crate) fn event(event: &'a WatchEvent) -> Self {
        let (kind, kv) = match event {
            WatchEvent::Put { kv, .. } => (Kind::Put, Some(kv)),
            WatchEvent::Delete { .. } => (Kind::Delete, None),
        };
        Self { kind, revision: event.revision(), key: Some(event.key()), kv, previous: event.previous() }
    }

    /// `7 [PUT] key = value (before: other)`
    pub(crate) fn text(&self, encoding: Encoding, values: bool) -> String {
        let mut text = format!("{} [{}]", self.revision, self.kind.name());
        if let Some(key) = self.key {
            text += &format!(" {}", encoding.encode(key));
        }
        if let Some(kv) = self.kv.filter(|_| values) {
            text += &format!(" = {}", encoding.encode(&kv.value));
        }
        if let Some(previous) = self.previous.filter(|_| values) {
            text += &format!(" (before: {})", encoding.encode(&previous.value));
        }
        text
    }

    pub(crate) fn json(&self) -> ChangeJson {
        ChangeJson {
            kind: self.kind,
            revision: self.revision.get(),
            key: self.key.filter(|_| self.kv.is_none()).map(|key| KeyJson::of(key)),
            kv: self.kv.map(KeyValueJson::from),
            previous: self.previous.map(KeyValueJson::from),
        }
    }
}

/// A change as JSON; `kind` says what the rest means.
#[derive(Debug, Serialize)]
pub(crate) struct ChangeJson {
    kind: Kind,
    revision: u64,
    /// Of a deletion.
    #[serde(flatten)]
    key: Option<KeyJson>,
    /// Of a put; it has the key too.
    #[serde(flatten)]
    kv: Option<KeyValueJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<KeyValueJson>,
}
