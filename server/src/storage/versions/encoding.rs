//! How versions, their index, records and the store's state look on disk. Bytes in, plain values out; nothing here
//! touches a file.
//!
//! Everything lives in one ordered key space. A version's key is the user's key in an order-preserving, prefix-safe form
//! followed by its revision, so that the versions of a key stand together, oldest first, and keys stand in byte order.
//! The index lists the same changes in the order of revisions and, within one, of keys.
//!
//! ```text
//! e <revision> <key>                   checksum, kind, revision of the version before or 0, bytes of its value
//! l <lease id>                         checksum, the lease
//! m                                    checksum, state
//! n                                    checksum, restore epoch; missing: 0
//! s <session id>                       checksum, the session
//! v <escaped key> 00 01 <revision>     checksum, kind [, create revision, version, lease, value]
//! ```
//!
//! A zero byte inside a key becomes `00 ff`, and `00 01` ends the key: no key's form is a prefix of another's, and
//! `"a" < "a\0" < "ab"` stays as it is.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut, TryGetError};
use d_engine_proto::{Epoch, LeaseId, LogIndex, Revision, SessionId, Term};

use super::{Change, KeyVersion, RecordKey, StoreState};
use crate::storage::LogPosition;

/// Key of the state record.
pub(super) const STATE_KEY: &[u8] = b"m";

/// Key of the record of the restore epoch, which is younger than the state's.
pub(super) const EPOCH_KEY: &[u8] = b"n";

const INDEX_TAG: u8 = b'e';
/// First byte string after every key of the index.
pub(super) const AFTER_INDEX: &[u8] = b"f";

const LEASE_TAG: u8 = b'l';
const SESSION_TAG: u8 = b's';
/// The intervals in which the keys of records stand, in their order.
pub(super) const RECORD_INTERVALS: [(&[u8], &[u8]); 2] = [(b"l", b"m"), (b"s", b"t")];

const VERSION_TAG: u8 = b'v';
/// First byte string after every version's key.
pub(super) const AFTER_VERSIONS: &[u8] = b"w";

const REVISION_BYTES: usize = 8;
const ID_BYTES: usize = 8;
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

/// What the index says of one change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IndexEntry<'a> {
    pub(super) revision: Revision,
    pub(super) key: &'a [u8],
    /// Whether the revision deleted the key; its version says so too.
    pub(super) deletes: bool,
    /// The revision of the version that the change replaced; `None` if the key did not exist.
    pub(super) before: Option<Revision>,
    /// Bytes of the value that the change replaced.
    pub(super) before_bytes: u32,
}

impl<'a> IndexEntry<'a> {
    /// What to write of a change.
    pub(super) fn of(change: &'a Change) -> Self {
        let before_bytes = change.before.as_ref().map_or(0, |before| before.value.len());
        Self {
            revision: change.revision,
            key: &change.key,
            deletes: change.after.is_none(),
            before: change.before.as_ref().map(|before| before.mod_revision),
            before_bytes: u32::try_from(before_bytes).unwrap_or(u32::MAX),
        }
    }

    /// Replaces `index_key` and `out` by the key and the record of the entry.
    pub(super) fn encode(&self, index_key: &mut Vec<u8>, out: &mut Vec<u8>) {
        index_key.clear();
        index_key.extend_from_slice(&index_bound(self.revision));
        index_key.extend_from_slice(self.key);
        out.clear();
        out.put_u32(0);
        out.put_u8(if self.deletes { KIND_DELETE } else { KIND_PUT });
        // No change ever has revision 0.
        out.put_u64(self.before.map_or(0, Revision::get));
        out.put_u32(self.before_bytes);
        put_checksum(out, index_key);
    }

    /// What [`encode`](Self::encode) wrote.
    pub(super) fn decode(index_key: &'a [u8], mut record: &[u8]) -> Result<Self, Malformed> {
        if record.try_get_u32()? != checksum(index_key, record) {
            return Err(Malformed::Checksum);
        }
        let deletes = match record.try_get_u8()? {
            KIND_DELETE => true,
            KIND_PUT => false,
            unknown => return Err(Malformed::Kind(unknown)),
        };
        let before = Some(Revision(record.try_get_u64()?)).filter(|revision| *revision != Revision(0));
        let before_bytes = record.try_get_u32()?;
        let rest = index_key.strip_prefix(&[INDEX_TAG]).ok_or(Malformed::Key)?;
        let (revision, key) = rest.split_first_chunk::<REVISION_BYTES>().ok_or(Malformed::Key)?;
        Ok(Self { revision: Revision(u64::from_be_bytes(*revision)), key, deletes, before, before_bytes })
    }
}

/// Where the entries of `revision` begin in the index; it is itself no entry's key.
pub(super) fn index_bound(revision: Revision) -> [u8; 1 + REVISION_BYTES] {
    tagged(INDEX_TAG, revision.get())
}

/// The key of a record.
pub(super) fn record_key(key: RecordKey) -> [u8; 1 + ID_BYTES] {
    match key {
        RecordKey::Lease(lease) => tagged(LEASE_TAG, lease.get()),
        RecordKey::Session(session) => tagged(SESSION_TAG, session.get()),
    }
}

fn tagged(tag: u8, number: u64) -> [u8; 1 + 8] {
    let mut out = [tag; 1 + 8];
    out[1..].copy_from_slice(&number.to_be_bytes());
    out
}

/// What a record holds, as it is stored.
pub(super) fn encode_record(stored_key: &[u8], body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHECKSUM_BYTES + body.len());
    out.put_u32(0);
    out.put_slice(body);
    put_checksum(&mut out, stored_key);
    out
}

/// A record and what it holds.
pub(super) fn decode_record(stored_key: &[u8], mut record: &[u8]) -> Result<(RecordKey, Bytes), Malformed> {
    if record.try_get_u32()? != checksum(stored_key, record) {
        return Err(Malformed::Checksum);
    }
    let (tag, id) = stored_key.split_last_chunk::<ID_BYTES>().ok_or(Malformed::Key)?;
    let id = u64::from_be_bytes(*id);
    let key = match tag {
        [LEASE_TAG] => RecordKey::Lease(LeaseId(id)),
        [SESSION_TAG] => RecordKey::Session(SessionId(id)),
        _ => return Err(Malformed::Key),
    };
    Ok((key, Bytes::copy_from_slice(record)))
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

/// What [`encode_state`] wrote: all but the epoch.
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
    let epoch = Epoch(0);
    Ok(StoreState { position, store_time, membership, revision, compacted, last_lease, last_session, epoch })
}

/// The record of the restore epoch.
pub(super) fn encode_epoch(epoch: Epoch) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHECKSUM_BYTES + 8);
    out.put_u32(0);
    out.put_u64(epoch.get());
    put_checksum(&mut out, EPOCH_KEY);
    out
}

/// What [`encode_epoch`] wrote.
pub(super) fn decode_epoch(mut record: &[u8]) -> Result<Epoch, Malformed> {
    if record.try_get_u32()? != checksum(EPOCH_KEY, record) {
        return Err(Malformed::Checksum);
    }
    Ok(Epoch(record.try_get_u64()?))
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
        assert_damage_is_noticed(&key, &record, |key, record| decode_version(key, record).is_err());
    }

    /// Every flipped bit of the key and the record, and every shorter record.
    fn assert_damage_is_noticed(key: &[u8], record: &[u8], is_noticed: impl Fn(&[u8], &[u8]) -> bool) {
        let flipped = |bytes: &[u8], bit: usize| {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            damaged
        };
        for bit in 0..key.len() * 8 {
            assert!(is_noticed(&flipped(key, bit), record), "bit {bit} of the key");
        }
        for bit in 0..record.len() * 8 {
            assert!(is_noticed(key, &flipped(record, bit)), "bit {bit} of the record");
        }
        for length in 0..record.len() {
            assert!(is_noticed(key, &record[..length]), "length {length}");
        }
    }

    #[test]
    fn index_entries_survive_their_encoding_and_damage_is_noticed() {
        let (_, put) = sample_put();
        let delete = Change { before: put.after.clone(), after: None, revision: Revision(10), ..put.clone() };
        assert_eq!(IndexEntry::of(&put).before, None);
        assert_eq!((IndexEntry::of(&delete).before, IndexEntry::of(&delete).before_bytes), (Some(Revision(9)), 5));
        let (mut key, mut record) = (Vec::new(), Vec::new());
        for change in [put, delete] {
            let entry = IndexEntry::of(&change);
            entry.encode(&mut key, &mut record);
            assert_eq!(IndexEntry::decode(&key, &record), Ok(entry));
            assert!(key[..] > index_bound(change.revision)[..] && key[..] < index_bound(change.revision.next())[..]);
            assert_damage_is_noticed(&key, &record, |key, record| IndexEntry::decode(key, record).is_err());
        }
    }

    #[test]
    fn records_survive_their_encoding_and_damage_is_noticed() {
        for key in [RecordKey::Lease(LeaseId(7)), RecordKey::Session(SessionId(u64::MAX))] {
            let stored_key = record_key(key);
            assert!(RECORD_INTERVALS.iter().any(|(start, end)| stored_key[..] >= **start && stored_key[..] < **end));
            let record = encode_record(&stored_key, b"what it holds");
            assert_eq!(decode_record(&stored_key, &record), Ok((key, Bytes::from_static(b"what it holds"))));
            assert_damage_is_noticed(&stored_key, &record, |key, record| decode_record(key, record).is_err());
        }
        let stray = encode_record(b"x2345678", b"");
        assert_eq!(decode_record(b"x2345678", &stray), Err(Malformed::Key));
    }

    #[test]
    fn the_state_survives_its_encoding_and_damage_is_noticed() {
        let position = |index| LogPosition { term: Term(4), index: LogIndex(index) };
        assert_eq!(decode_epoch(&encode_epoch(Epoch(7))), Ok(Epoch(7)));
        assert_damage_is_noticed(&[], &encode_epoch(Epoch(7)), |_, record| decode_epoch(record).is_err());
        let full = StoreState {
            epoch: Epoch(0),
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
            assert_damage_is_noticed(&[], &record, |_, record| decode_state(record).is_err());
        }
    }

    /// The bytes that layout 2 has on disk. If this fails, the layout changed: give it a new number instead.
    #[test]
    fn layout_two_is_remembered() {
        let (key, put) = sample_put();
        assert_eq!(key, b"vk\0\xff\xff\0\x01\0\0\0\0\0\0\0\x09");
        let mut record = Vec::new();
        encode_change(&mut record, &key, &put);
        assert_eq!(record[4..], *b"\x01\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x07value");
        let (mut index_key, mut record) = (Vec::new(), Vec::new());
        let entry = IndexEntry { before: Some(Revision(8)), before_bytes: 6, ..IndexEntry::of(&put) };
        entry.encode(&mut index_key, &mut record);
        assert_eq!(index_key, b"e\0\0\0\0\0\0\0\x09k\0\xff");
        assert_eq!(record[4..], *b"\x01\0\0\0\0\0\0\0\x08\0\0\0\x06");
        assert_eq!(record_key(RecordKey::Lease(LeaseId(7))), *b"l\0\0\0\0\0\0\0\x07");
        assert_eq!(record_key(RecordKey::Session(SessionId(7))), *b"s\0\0\0\0\0\0\0\x07");
        assert_eq!(encode_record(b"", b"body")[4..], *b"body");
        assert_eq!(encode_state(&StoreState::default())[4..], [0; 46]);
    }
}
