//! The encoding of what the log's RocksDB holds. Written by hand, so that a change of a type is never a change of the
//! format by accident; every number is little-endian, except in keys.
//!
//! ```text
//! every value      crc32c of the key and all that follows: u32 · version: u8 = 1 · body
//!
//! family "entries" key: index, u64 big-endian, so that entries are sorted
//!                  body: term u64 · payload, to the end
//!
//! family "default" key: "state", the only one
//!                  body: identity? · vote? · committed? · purged? · last? · first?
//! x?               0u8, or 1u8 and x
//! identity         node u32 · incarnation u64 · cluster u64?
//! vote             term u64 · node u32 · committed u8
//! position         term u64 · index u64
//! first            index u64
//! ```
//!
//! The state is one record and part of every write: whatever a damaged disk loses of the entries, the state says which
//! there should have been.

use bytes::{Buf, BufMut, Bytes, TryGetError};
use d_engine_proto::{LogIndex, NodeId, Term};

use super::log_state::LogState;
use super::{Identity, LogPosition, LogRecord, StorageState, Vote};

/// Key of the state.
pub(super) const STATE_KEY: &[u8] = b"state";
/// The newest version of a record known, and the one written.
pub(super) const VERSION: u8 = 1;
const CHECKSUM_BYTES: usize = 4;

/// Why a record is not to be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RecordError {
    /// Key and value do not belong together, or one of them changed.
    #[error("checksum mismatch")]
    Checksum,
    /// Sound, but unknown here.
    #[error("unknown record version {0}")]
    Version(u8),
    /// Sound, but not what this version writes.
    #[error("malformed record")]
    Malformed,
}

impl From<TryGetError> for RecordError {
    fn from(_: TryGetError) -> Self {
        Self::Malformed
    }
}

/// Key of the entry at `index`.
pub(super) fn entry_key(index: u64) -> [u8; 8] {
    index.to_be_bytes()
}

/// The smallest key after that of the entry at `index`; there is one even after the last index there can be.
pub(super) fn key_after_entry(index: u64) -> [u8; 9] {
    let mut key = [0; 9];
    key[..8].copy_from_slice(&entry_key(index));
    key
}

/// The index a key stands for.
pub(super) fn entry_index(key: &[u8]) -> Result<LogIndex, RecordError> {
    key.try_into().map(u64::from_be_bytes).map(LogIndex).map_err(|_| RecordError::Malformed)
}

/// Writes an entry's value to `buffer`, replacing what it holds.
pub(super) fn encode_entry(record: &LogRecord, buffer: &mut Vec<u8>) {
    begin(buffer);
    buffer.put_u64_le(record.position.term.get());
    buffer.put_slice(&record.payload);
    finish(&entry_key(record.position.index.get()), buffer);
}

/// Reads an entry back.
pub(super) fn decode_entry(key: &[u8], value: &[u8]) -> Result<LogRecord, RecordError> {
    let (position, payload) = decode_entry_parts(key, value)?;
    Ok(LogRecord { position, payload: Bytes::copy_from_slice(payload) })
}

/// Reads an entry's position back, after checking all of it.
pub(super) fn decode_entry_position(key: &[u8], value: &[u8]) -> Result<LogPosition, RecordError> {
    decode_entry_parts(key, value).map(|(position, _)| position)
}

fn decode_entry_parts<'a>(key: &[u8], value: &'a [u8]) -> Result<(LogPosition, &'a [u8]), RecordError> {
    let mut body = open(key, value)?;
    let term = Term(body.try_get_u64_le()?);
    Ok((LogPosition { term, index: entry_index(key)? }, body))
}

/// Writes the state's value to `buffer`, replacing what it holds.
pub(super) fn encode_state(log: &LogState, buffer: &mut Vec<u8>) {
    let state = &log.state;
    begin(buffer);
    put_option(buffer, state.identity, put_identity);
    put_option(buffer, state.vote, put_vote);
    put_option(buffer, state.committed, put_position);
    put_option(buffer, state.purged, put_position);
    put_option(buffer, state.last, put_position);
    put_option(buffer, log.first, |buffer, index| buffer.put_u64_le(index.get()));
    finish(STATE_KEY, buffer);
}

/// Reads the state back.
pub(super) fn decode_state(value: &[u8]) -> Result<LogState, RecordError> {
    let body = &mut open(STATE_KEY, value)?;
    let identity = get_option(body, get_identity)?;
    let vote = get_option(body, get_vote)?;
    let committed = get_option(body, get_position)?;
    let purged = get_option(body, get_position)?;
    let last = get_option(body, get_position)?;
    let first = get_option(body, |body| Ok(LogIndex(body.try_get_u64_le()?)))?;
    let log = LogState { state: StorageState { identity, vote, committed, purged, last }, first };
    if body.is_empty() && log.is_valid() { Ok(log) } else { Err(RecordError::Malformed) }
}

fn begin(buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.put_bytes(0, CHECKSUM_BYTES);
    buffer.put_u8(VERSION);
}

/// Puts the checksum into the place [`begin`] left for it.
fn finish(key: &[u8], buffer: &mut [u8]) {
    let (mut place, covered) = buffer.split_at_mut(CHECKSUM_BYTES);
    place.put_u32_le(crc32c::crc32c_append(crc32c::crc32c(key), covered));
}

/// The body of a value whose checksum and version are right.
fn open<'a>(key: &[u8], value: &'a [u8]) -> Result<&'a [u8], RecordError> {
    let (checksum, covered) = value.split_at_checked(CHECKSUM_BYTES).ok_or(RecordError::Checksum)?;
    if checksum != crc32c::crc32c_append(crc32c::crc32c(key), covered).to_le_bytes() {
        return Err(RecordError::Checksum);
    }
    match covered.split_first() {
        Some((&VERSION, body)) => Ok(body),
        Some((&version, _)) => Err(RecordError::Version(version)),
        None => Err(RecordError::Malformed),
    }
}

pub(super) fn put_identity(buffer: &mut Vec<u8>, identity: Identity) {
    buffer.put_u32_le(identity.node_id.get());
    buffer.put_u64_le(identity.incarnation);
    put_option(buffer, identity.cluster_id, |buffer, id| buffer.put_u64_le(id));
}

pub(super) fn get_identity(body: &mut &[u8]) -> Result<Identity, RecordError> {
    Ok(Identity {
        node_id: NodeId(body.try_get_u32_le()?),
        incarnation: body.try_get_u64_le()?,
        cluster_id: get_option(body, |body| Ok(body.try_get_u64_le()?))?,
    })
}

pub(super) fn put_vote(buffer: &mut Vec<u8>, vote: Vote) {
    buffer.put_u64_le(vote.term.get());
    buffer.put_u32_le(vote.node_id.get());
    buffer.put_u8(u8::from(vote.committed));
}

pub(super) fn get_vote(body: &mut &[u8]) -> Result<Vote, RecordError> {
    Ok(Vote { term: Term(body.try_get_u64_le()?), node_id: NodeId(body.try_get_u32_le()?), committed: get_bool(body)? })
}

pub(super) fn put_position(buffer: &mut Vec<u8>, position: LogPosition) {
    buffer.put_u64_le(position.term.get());
    buffer.put_u64_le(position.index.get());
}

pub(super) fn get_position(body: &mut &[u8]) -> Result<LogPosition, RecordError> {
    Ok(LogPosition { term: Term(body.try_get_u64_le()?), index: LogIndex(body.try_get_u64_le()?) })
}

pub(super) fn put_option<T>(buffer: &mut Vec<u8>, value: Option<T>, put: impl FnOnce(&mut Vec<u8>, T)) {
    buffer.put_u8(u8::from(value.is_some()));
    if let Some(value) = value {
        put(buffer, value);
    }
}

pub(super) fn get_option<T>(
    body: &mut &[u8],
    get: impl FnOnce(&mut &[u8]) -> Result<T, RecordError>,
) -> Result<Option<T>, RecordError> {
    if get_bool(body)? { get(body).map(Some) } else { Ok(None) }
}

fn get_bool(body: &mut &[u8]) -> Result<bool, RecordError> {
    match body.try_get_u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(RecordError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(term: u64, index: u64) -> LogPosition {
        LogPosition { term: Term(term), index: LogIndex(index) }
    }

    fn full_state() -> LogState {
        LogState {
            state: StorageState {
                identity: Some(Identity { node_id: NodeId(7), incarnation: u64::MAX, cluster_id: Some(11) }),
                vote: Some(Vote { term: Term(5), node_id: NodeId(2), committed: true }),
                committed: Some(position(4, 17)),
                purged: Some(position(2, 9)),
                last: Some(position(5, 20)),
            },
            first: Some(LogIndex(10)),
        }
    }

    #[test]
    fn what_is_encoded_decodes_to_itself() {
        let mut buffer = Vec::new();
        for payload in [Bytes::new(), Bytes::from_static(b"x"), Bytes::from(vec![7; 100_000])] {
            let record = LogRecord { position: position(9, u64::MAX), payload };
            encode_entry(&record, &mut buffer);
            assert_eq!(decode_entry(&entry_key(u64::MAX), &buffer), Ok(record));
        }
        for log in [LogState::default(), full_state()] {
            encode_state(&log, &mut buffer);
            assert_eq!(decode_state(&buffer), Ok(log));
        }
    }

    /// The bytes of format 1. If this fails, the format changed: raise its version and keep reading this one.
    #[test]
    fn the_format_is_what_it_was() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut buffer = Vec::new();
        let record = LogRecord { position: position(5, 20), payload: Bytes::from_static(b"payload") };
        encode_entry(&record, &mut buffer);
        assert_eq!(hex(&buffer), "b1f21c530105000000000000007061796c6f6164");
        encode_state(&full_state(), &mut buffer);
        assert_eq!(
            hex(&buffer),
            "17151542010107000000ffffffffffffffff010b000000000000000105000000000000000200000001010400000000000000110000000000000001020000000000000009000000000000000105000000000000001400000000000000010a00000000000000"
        );
    }

    #[test]
    fn no_changed_bit_and_no_other_key_goes_unnoticed() {
        let mut buffer = Vec::new();
        encode_entry(&LogRecord { position: position(9, 4), payload: Bytes::from_static(b"payload") }, &mut buffer);
        for bit in 0..buffer.len() * 8 {
            let mut damaged = buffer.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_entry(&entry_key(4), &damaged), Err(RecordError::Checksum));
        }
        for length in 0..buffer.len() {
            assert_eq!(decode_entry(&entry_key(4), &buffer[..length]), Err(RecordError::Checksum));
        }
        assert_eq!(decode_entry(&entry_key(5), &buffer), Err(RecordError::Checksum));
    }

    #[test]
    fn a_sound_record_of_an_unknown_version_is_named() {
        let mut buffer = Vec::new();
        begin(&mut buffer);
        buffer[CHECKSUM_BYTES] = 2;
        finish(STATE_KEY, &mut buffer);
        assert_eq!(decode_state(&buffer), Err(RecordError::Version(2)));
    }

    #[test]
    fn a_sound_state_that_contradicts_itself_is_malformed() {
        let mut buffer = Vec::new();
        let mut log = full_state();
        log.first = Some(LogIndex(21));
        encode_state(&log, &mut buffer);
        assert_eq!(decode_state(&buffer), Err(RecordError::Malformed));
        log.first = None;
        encode_state(&log, &mut buffer);
        assert_eq!(decode_state(&buffer), Err(RecordError::Malformed));
    }
}
