//! Keys, values and intervals as callers see them.

use bytes::Bytes;
use d_engine_proto::{LeaseId, Revision, v1};

/// What can be given as a key or a value. Owned bytes are taken over, borrowed ones copied.
pub trait IntoBytes {
    /// The bytes.
    fn into_bytes(self) -> Bytes;
}

macro_rules! into_bytes {
    ($($owned:ty),*; $($borrowed:ty),*) => {
        $(impl IntoBytes for $owned {
            fn into_bytes(self) -> Bytes {
                self.into()
            }
        })*
        $(impl IntoBytes for &$borrowed {
            fn into_bytes(self) -> Bytes {
                Bytes::copy_from_slice(self.as_ref())
            }
        })*
    };
}

into_bytes!(Bytes, Vec<u8>, String, Box<[u8]>; [u8], str, Vec<u8>, String);

impl<const N: usize> IntoBytes for &[u8; N] {
    fn into_bytes(self) -> Bytes {
        Bytes::copy_from_slice(self)
    }
}

impl<const N: usize> IntoBytes for [u8; N] {
    fn into_bytes(self) -> Bytes {
        Bytes::copy_from_slice(&self)
    }
}

impl IntoBytes for &Bytes {
    fn into_bytes(self) -> Bytes {
        self.clone()
    }
}

/// A key and its value, as of one revision of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Bytes,
    /// Its value; empty in answers that leave values out.
    pub value: Bytes,
    /// Revision that created the key. A deletion ends its life, and the next put creates it anew.
    pub create_revision: Revision,
    /// Revision that last changed the key.
    pub mod_revision: Revision,
    /// Number of changes since creation; 1 for a new key.
    pub version: u64,
    /// Lease the key is attached to.
    pub lease: Option<LeaseId>,
}

impl From<v1::KeyValue> for KeyValue {
    fn from(kv: v1::KeyValue) -> Self {
        Self {
            key: kv.key,
            value: kv.value,
            create_revision: Revision(kv.create_revision),
            mod_revision: Revision(kv.mod_revision),
            version: kv.version,
            lease: (kv.lease != 0).then_some(LeaseId(kv.lease)),
        }
    }
}

/// An interval of keys in byte order: from a first key up to, but without, an end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyRange {
    /// First key; empty: from the first key of the store.
    pub(crate) start: Bytes,
    /// First key that is no longer part of it; empty: to the last key of the store.
    pub(crate) end: Bytes,
}

impl KeyRange {
    /// Every key.
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// The keys that begin with `prefix`; an empty one stands for all.
    pub fn prefix(prefix: impl IntoBytes) -> Self {
        let start = prefix.into_bytes();
        // The first key beyond: the last byte that can grow, grown, and nothing after it. Without one there is no end.
        let keep = start.iter().rposition(|&byte| byte != u8::MAX).map_or(0, |last| last + 1);
        let mut end = start[..keep].to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Self { start, end: end.into() }
    }

    /// `start` and all keys after it.
    pub fn from(start: impl IntoBytes) -> Self {
        Self { start: start.into_bytes(), end: Bytes::new() }
    }

    /// The keys from `start` up to, but without, `end`. An empty `end` stands for no end; one before `start` is refused
    /// by the server.
    pub fn between(start: impl IntoBytes, end: impl IntoBytes) -> Self {
        Self { start: start.into_bytes(), end: end.into_bytes() }
    }

    /// The first key of the interval; empty: from the first key of the store.
    #[must_use]
    pub fn start(&self) -> &Bytes {
        &self.start
    }

    /// The first key after the interval; empty: to the last key of the store.
    #[must_use]
    pub fn end(&self) -> &Bytes {
        &self.end
    }
}

impl From<KeyRange> for v1::KeyRange {
    fn from(range: KeyRange) -> Self {
        Self { start: range.start, end: range.end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(range: &KeyRange, key: &[u8]) -> bool {
        key >= &range.start[..] && (range.end.is_empty() || key < &range.end[..])
    }

    #[test]
    fn a_prefix_interval_holds_exactly_the_keys_with_that_prefix() {
        let seed = 3;
        let mut rng = fastrand::Rng::with_seed(seed);
        let alphabet = [0u8, 1, b'a', 0xfe, 0xff];
        let mut word = |longest| -> Vec<u8> {
            let length = rng.usize(0..=longest);
            (0..length).map(|_| alphabet[rng.usize(0..alphabet.len())]).collect()
        };
        for _ in 0..20_000 {
            let (prefix, key) = (word(3), word(5));
            let range = KeyRange::prefix(&prefix);
            assert_eq!(contains(&range, &key), key.starts_with(&prefix), "seed {seed}: {prefix:?} and {key:?}");
        }
    }

    #[test]
    fn bytes_come_in_many_shapes() {
        let expected = Bytes::from_static(b"key");
        assert_eq!("key".into_bytes(), expected);
        assert_eq!(b"key".into_bytes(), expected);
        assert_eq!((&b"key"[..]).into_bytes(), expected);
        assert_eq!(b"key".to_vec().into_bytes(), expected);
        assert_eq!(String::from("key").into_bytes(), expected.to_vec());
        assert_eq!(IntoBytes::into_bytes(&expected), expected);
    }
}
