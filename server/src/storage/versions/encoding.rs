//! How versions and the store's state look on disk. Bytes in, plain values out; nothing here touches a file.
//!
//! Everything lives in one ordered key space: the state under a key of its own, before every version. A version's key
//! is the user's key in an order-preserving, prefix-safe form followed by its revision, so that the versions of a key
//! stand together, oldest first, and keys stand in byte order.
//!
//! ```text
//! m                                    checksum, state
//! v <escaped key> 00 01 <revision>     checksum, kind [, create revision, version, lease, value]
//! ```
//!
//! A zero byte inside a key becomes `00 ff`, and `00 01` ends the key: no key's form is a prefix of another's, and
//! `"a" < "a\0" < "ab"` stays as it is.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut, TryGetError};
use d_engine_proto::{LeaseId, LogIndex, Revision, SessionId, Term};

use super::{Change, KeyVersion, StoreState};
use crate::storage::LogPosition;

/// Key of the state record; sorts before every version.
pub(super) const STATE_KEY: &[u8] = b"m";

const VERSION_TAG: u8 = b'v';
/// First byte string after every version's key.
pub(super) const AFTER_VERSIONS: &[u8] = b"w";

const REVISION_BYTES: usize = 8;
const CHECKSUM_BYTES: usize = 4;
const KIND_DELETE: u8 = 0;
const KIND_PUT: u8 = 1;

/// Why stored bytes are not what was written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    /// The record ends too early.
    #[error("the record is too short")]
    TooShort,
    /// The bytes changed.
    #[error("the checksum does not match")]
    Checksum,
    /// A byte that nobody writes there.
    #[error("unknown record kind {0}")]
    Kind(u8),
    /// A key that the encoding cannot produce.
    #[error("the key is malformed")]
    Key,
}

impl From<TryGetError> for Malformed {
    fn from(_: TryGetError) -> Self {
        Self::TooShort
    }
}

/// Appends the form of `key` that precedes every revision of it.
pub(super) fn put_key(out: &mut Vec<u8>, key: &[u8]) {
    out.push(VERSION_TAG);
    for (index, part) in key.split(|byte| *byte == 0).enumerate() {
        if index > 0 {
            out.extend_from_slice(&[0x00, 0xff]);
        }
        out.extend_from_slice(part);
    }
    out.extend_from_slice(&[0x00, 0x01]);
}

/// Appends the key under which `revision` of `key` stands.
pub(super) fn put_version_key(out: &mut Vec<u8>, key: &[u8], revision: Revision) {
    put_key(out, key);
    out.extend_from_slice(&revision.get().to_be_bytes());
}

/// Splits a version's key into the form of the user's key and the revision.
pub(super) fn split_version_key(bytes: &[u8]) -> Result<(&[u8], Revision), Malformed> {
    let (key, revision) = bytes.split_last_chunk::<REVISION_BYTES>().ok_or(Malformed::Key)?;
    Ok((key, Revision(u64::from_be_bytes(*revision))))
}

/// The user's key of a form that [`put_key`] made, appended to `out`.
pub(super) fn unescape_key(out: &mut BytesMut, escaped: &[u8]) -> Result<(), Malformed> {
    let body = escaped.strip_prefix(&[VERSION_TAG]).and_then(|rest| rest.strip_suffix(&[0x00, 0x01]));
    let mut rest = body.ok_or(Malformed::Key)?;
    while let Some(zero) = rest.iter().position(|byte| *byte == 0) {
        if rest.get(zero + 1) != Some(&0xff) {
            return Err(Malformed::Key);
        }
        out.put_slice(&rest[..=zero]);
        rest = &rest[zero + 2..];
    }
    out.put_slice(rest);
    Ok(())
}

/// Replaces `out` by the record of a change. The checksum covers `version_key` too, so that a record that strayed to
/// another key is found out.
pub(super) fn encode_change(out: &mut Vec<u8>, version_key: &[u8], change: &Change) {
    out.clear();
    out.put_u32(0);
    match &change.after {
        Some(put) => {
            out.put_u8(KIND_PUT);
            out.put_u64(put.create_revision.get());
            out.put_u64(put.version);
            out.put_u64(put.lease.get());
            out.put_slice(&put.value);
        }
        None => out.put_u8(KIND_DELETE),
    }
    put_checksum(out, version_key);
}

/// The version a record holds; `None` for a deletion.
pub(super) fn decode_version(version_key: &[u8], mut record: &[u8]) -> Result<Option<KeyVersion>, Malformed> {
    if record.try_get_u32()? != checksum(version_key, record) {
        return Err(Malformed::Checksum);
    }
    match record.try_get_u8()? {
        KIND_DELETE => return Ok(None),
        KIND_PUT => {}
        unknown => return Err(Malformed::Kind(unknown)),
    }
    let (escaped, mod_revision) = split_version_key(version_key)?;
    let create_revision = Revision(record.try_get_u64()?);
    let version = record.try_get_u64()?;
    let lease = LeaseId(record.try_get_u64()?);
    // One allocation for key and value.
    let mut buffer = BytesMut::with_capacity(escaped.len() + record.len());
    unescape_key(&mut buffer, escaped)?;
    let key = buffer.split();
    buffer.put_slice(record);
    Ok(Some(KeyVersion { key: key.freeze(), value: buffer.freeze(), create_revision, mod_revision, version, lease }))
}

fn checksum(key: &[u8], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(key), body)
}

/// Fills in the four bytes that `record` begins with.
fn put_checksum(record: &mut [u8], key: &[u8]) {
    let (head, body) = record.split_at_mut(CHECKSUM_BYTES);
    head.copy_from_slice(&checksum(key, body).to_be_bytes());
}

/// The state record.
pub(super) fn encode_state(state: &StoreState) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    out.put_u32(0);
    out.put_u64(state.revision.get());
    out.put_u64(state.compacted.get());
    out.put_u64(state.store_time.as_secs());
    out.put_u32(state.store_time.subsec_nanos());
    out.put_u64(state.last_lease.get());
    out.put_u64(state.last_session.get());
    put_position(&mut out, state.position);
    put_position(&mut out, state.membership.as_ref().map(|(position, _)| *position));
    if let Some((_, membership)) = &state.membership {
        out.put_slice(membership);
    }
    put_checksum(&mut out, STATE_KEY);
    out
}

/// What [`encode_state`] wrote.
pub(super) fn decode_state(mut record: &[u8]) -> Result<StoreState, Malformed> {
    if record.try_get_u32()? != checksum(STATE_KEY, record) {
        return Err(Malformed::Checksum);
    }
    let revision = Revision(record.try_get_u64()?);
    let compacted = Revision(record.try_get_u64()?);
    let seconds = record.try_get_u64()?;
    let store_time = Duration::new(seconds, record.try_get_u32()?);
    let last_lease = LeaseId(record.try_get_u64()?);
    let last_session = SessionId(record.try_get_u64()?);
    let position = get_position(&mut record)?;
    let membership = get_position(&mut record)?.map(|position| (position, Bytes::copy_from_slice(record)));
    Ok(StoreState { position, store_time, membership, revision, compacted, last_lease, last_session })
}

fn put_position(out: &mut Vec<u8>, position: Option<LogPosition>) {
    out.put_u8(u8::from(position.is_some()));
    if let Some(position) = position {
        out.put_u64(position.term.get());
        out.put_u64(position.index.get());
    }
}

fn get_position(record: &mut &[u8]) -> Result<Option<LogPosition>, Malformed> {
    match record.try_get_u8()? {
        0 => Ok(None),
        1 => Ok(Some(LogPosition { term: Term(record.try_get_u64()?), index: LogIndex(record.try_get_u64()?) })),
        unknown => Err(Malformed::Kind(unknown)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn escaped(key: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_key(&mut out, key);
        out
    }

    fn unescaped(bytes: &[u8]) -> Result<BytesMut, Malformed> {
        let mut out = BytesMut::new();
        unescape_key(&mut out, bytes).map(|()| out)
    }

    /// Every key of up to four bytes over the bytes that matter to the encoding.
    fn awkward_keys() -> Vec<Vec<u8>> {
        let mut keys = vec![Vec::new()];
        for length in 1..=4 {
            for mut number in 0..5_usize.pow(length) {
                let mut key = Vec::new();
                for _ in 0..length {
                    key.push([0x00, 0x01, b'a', 0xfe, 0xff][number % 5]);
                    number /= 5;
                }
                keys.push(key);
            }
        }
        keys.sort();
        keys
    }

    #[test]
    fn key_forms_keep_the_order_and_are_never_prefixes_of_one_another() {
        for pair in awkward_keys().windows(2) {
            let (smaller, larger) = (escaped(&pair[0]), escaped(&pair[1]));
            assert!(smaller < larger, "{:?} {:?}", pair[0], pair[1]);
            assert!(!larger.starts_with(&smaller), "{:?} {:?}", pair[0], pair[1]);
            // A bound without a revision is before every version of its key and after those of the key before.
            let mut last_of_smaller = smaller.clone();
            last_of_smaller.extend_from_slice(&u64::MAX.to_be_bytes());
            assert!(last_of_smaller < larger, "{:?} {:?}", pair[0], pair[1]);
        }
    }

    #[test]
    fn keys_survive_their_encoding() {
        for key in awkward_keys() {
            assert_eq!(unescaped(&escaped(&key)).unwrap(), key);
        }
    }

    #[test]
    fn malformed_keys_are_refused() {
        for bad in [&b""[..], b"v", b"va", b"x\0\x01", b"va\0\x02b\0\x01", b"va\0\0\x01"] {
            assert_eq!(unescaped(bad), Err(Malformed::Key), "{bad:?}");
        }
        assert_eq!(split_version_key(b"v\0\x01"), Err(Malformed::Key));
    }

    fn sample_put() -> (Vec<u8>, Change) {
        let version = KeyVersion {
            key: Bytes::from_static(b"k\0\xff"),
            value: Bytes::from_static(b"value"),
            create_revision: Revision(3),
            mod_revision: Revision(9),
            version: 2,
            lease: LeaseId(7),
        };
        let mut key = Vec::new();
        put_version_key(&mut key, &version.key, version.mod_revision);
        let (changed, revision) = (version.key.clone(), version.mod_revision);
        (key, Change { key: changed, revision, after: Some(Arc::new(version)), before: None })
    }

    #[test]
    fn changes_survive_their_encoding() {
        let (key, put) = sample_put();
        let mut record = Vec::new();
        encode_change(&mut record, &key, &put);
        assert_eq!(decode_version(&key, &record), Ok(put.after.as_deref().cloned()));

        let delete = Change { after: None, ..put };
        encode_change(&mut record, &key, &delete);
        assert_eq!(decode_version(&key, &record), Ok(None));
    }

    #[test]
    fn any_flipped_bit_of_a_record_or_its_key_is_noticed() {
        let (key, put) = sample_put();
        let mut record = Vec::new();
        encode_change(&mut record, &key, &put);
        for bit in 0..record.len() * 8 {
            let mut damaged = record.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_version(&key, &damaged), Err(Malformed::Checksum), "bit {bit}");
        }
        for bit in 0..key.len() * 8 {
            let mut damaged = key.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_version(&damaged, &record), Err(Malformed::Checksum), "bit {bit}");
        }
        for length in 0..record.len() {
            assert!(decode_version(&key, &record[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn the_state_survives_its_encoding_and_damage_is_noticed() {
        let position = |index| LogPosition { term: Term(4), index: LogIndex(index) };
        let full = StoreState {
            position: Some(position(17)),
            store_time: Duration::new(5, 6),
            membership: Some((position(3), Bytes::from_static(b"members"))),
            revision: Revision(11),
            compacted: Revision(2),
            last_lease: LeaseId(8),
            last_session: SessionId(9),
        };
        for state in [StoreState::default(), full] {
            let record = encode_state(&state);
            assert_eq!(decode_state(&record), Ok(state));
            for bit in 0..record.len() * 8 {
                let mut damaged = record.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(decode_state(&damaged).is_err(), "bit {bit}");
            }
            for length in 0..record.len() {
                assert!(decode_state(&record[..length]).is_err(), "length {length}");
            }
        }
    }

    /// The bytes that layout 1 has on disk. If this fails, the layout changed: give it a new number instead.
    #[test]
    fn layout_one_is_remembered() {
        let (key, put) = sample_put();
        assert_eq!(key, b"vk\0\xff\xff\0\x01\0\0\0\0\0\0\0\x09");
        let mut record = Vec::new();
        encode_change(&mut record, &key, &put);
        assert_eq!(record[4..], *b"\x01\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x07value");
        assert_eq!(encode_state(&StoreState::default())[4..], [0; 30]);
    }
}
