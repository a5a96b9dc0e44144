//! A change of a key, as the simplest watch tells of it.

use bytes::Bytes;

/// What happened to one key. There are these two variants and no others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WatchEvent {
    /// The key was written, and holds the value since.
    Put(Bytes, Bytes),
    /// The key was deleted, or its lease or time to live ended.
    Delete(Bytes),
}

impl WatchEvent {
    /// The key that changed.
    pub const fn key(&self) -> &Bytes {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}
