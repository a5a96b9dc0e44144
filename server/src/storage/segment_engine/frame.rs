//! The bytes of a segment: its header, and the frames that follow it, one for each operation.
//!
//! ```text
//! header   4096 bytes, the rest zero:
//!          "d-engine segment" · number u64 · salt u64 · end of the segment before u64 ·
//!          sequence of the first frame u64 · length of the state u32 · state as in `record` · crc32c of all this u32
//! salt     drawn at random, so that nothing a client writes can pass for a frame
//!
//! frame    crc32c of the segment's salt and the rest of the frame's header u32 ·
//!          kind u8 · last of its write u8 · 0 u16 · length of the body u32 · crc32c of the body u32 ·
//!          sequence u64 · synced u64 · body · 0xe5
//! synced   every frame with a smaller sequence was on the disk before this one was written
//!
//! body     1 append    term u64 · index u64 · payload      4 vote       term u64 · node u32 · committed u8
//!          2 truncate  the last entry left: position?      5 committed  position
//!          3 purge     position                            6 identity   node u32 · incarnation u64 · cluster u64?
//! ```
//! Numbers are little-endian; `x?` and `position` are those of [`record`](super::super::record). The last byte of a frame
//! is not zero, so that a frame whose end was never written shows it.

use bytes::{Buf, BufMut};
use d_engine_proto::{LogIndex, Term};

use crate::storage::log_state::LogState;
use crate::storage::record::{self, RecordError};
use crate::storage::{LogPosition, LogRecord, StorageOperation};

/// Bytes of a segment's header. Frames share no page with it.
pub(super) const SEGMENT_HEADER_BYTES: usize = 4096;
/// Where the first frame begins.
pub(super) const FIRST_FRAME: u64 = SEGMENT_HEADER_BYTES as u64;
const MAGIC: &[u8; 16] = b"d-engine segment";
/// Bytes of a frame before its body.
pub(super) const FRAME_HEADER_BYTES: usize = 32;
const END_MARK: u8 = 0xe5;
/// What a disk writes as a whole.
const SECTOR_BYTES: usize = 512;

const APPEND: u8 = 1;
const TRUNCATE: u8 = 2;
const PURGE: u8 = 3;
const VOTE: u8 = 4;
const COMMITTED: u8 = 5;
const IDENTITY: u8 = 6;

/// How a segment begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    /// Of the segment, from 1.
    pub(super) number: u64,
    /// Seeds the checksums of its frames.
    pub(super) salt: u64,
    /// Where the frames of the segment before end; what follows there does not count. 0: there was none.
    pub(super) previous_end: u64,
    /// Of the first frame here.
    pub(super) first_sequence: u64,
    /// As the segments before leave it.
    pub(super) log: LogState,
}

impl SegmentHeader {
    /// The whole header block.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut state = Vec::new();
        record::encode_state(&self.log, &mut state);
        let mut block = Vec::with_capacity(SEGMENT_HEADER_BYTES);
        block.put_slice(MAGIC);
        block.put_u64_le(self.number);
        block.put_u64_le(self.salt);
        block.put_u64_le(self.previous_end);
        block.put_u64_le(self.first_sequence);
        block.put_u32_le(u32::try_from(state.len()).unwrap_or(u32::MAX));
        block.put_slice(&state);
        block.put_u32_le(crc32c::crc32c(&block));
        block.resize(SEGMENT_HEADER_BYTES, 0);
        block
    }

    /// Reads it back from the beginning of a file.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut rest = bytes.strip_prefix(MAGIC).ok_or(RecordError::Checksum)?;
        let (number, salt, previous_end) = (rest.try_get_u64_le()?, rest.try_get_u64_le()?, rest.try_get_u64_le()?);
        let (first_sequence, length) = (rest.try_get_u64_le()?, rest.try_get_u32_le()? as usize);
        let (state, mut checksum) = rest.split_at_checked(length).ok_or(RecordError::Checksum)?;
        let covered = bytes.len() - rest.len() + length;
        if crc32c::crc32c(&bytes[..covered]) != checksum.try_get_u32_le()? {
            return Err(RecordError::Checksum);
        }
        Ok(Self { number, salt, previous_end, first_sequence, log: record::decode_state(state)? })
    }
}

/// What a frame says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameHeader {
    kind: u8,
    /// Whether its write is complete with it.
    pub(super) is_last: bool,
    length: u32,
    body_checksum: u32,
    /// Consecutive over all segments.
    pub(super) sequence: u64,
    /// See the module's description.
    pub(super) synced: u64,
}

impl FrameHeader {
    /// Reads the header at the start of `bytes`; `None` if there is none or it is damaged.
    fn decode(bytes: &[u8], salt: u64) -> Option<Self> {
        let header = bytes.first_chunk::<FRAME_HEADER_BYTES>()?;
        let mut rest = &header[4..];
        // Looked at first, since damage is searched byte by byte.
        let plausible = (APPEND..=IDENTITY).contains(&rest[0]) && rest[1] <= 1 && rest[2..4] == [0, 0];
        if !plausible || header[..4] != header_checksum(rest, salt).to_le_bytes() {
            return None;
        }
        let (kind, is_last) = (rest.get_u8(), rest.get_u8() == 1);
        rest.advance(2);
        let (length, body_checksum) = (rest.get_u32_le(), rest.get_u32_le());
        Some(Self { kind, is_last, length, body_checksum, sequence: rest.get_u64_le(), synced: rest.get_u64_le() })
    }

    /// Bytes of the whole frame.
    pub(super) fn frame_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.length as usize + 1
    }
}

fn header_checksum(rest: &[u8], salt: u64) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&salt.to_le_bytes()), rest)
}

/// An operation as it is stored, with what replaying it needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// The operation; the payload of an entry is left out.
    pub(super) operation: StorageOperation,
    /// For a truncation, the last entry it left.
    pub(super) left: Option<LogPosition>,
}

/// At most so many bytes does [`encode`] append.
pub(super) fn bytes_max(operation: &StorageOperation) -> u64 {
    let body = match operation {
        StorageOperation::Append(record) => 16 + record.payload.len(),
        _ => 32,
    };
    (FRAME_HEADER_BYTES + body + 1) as u64
}

/// Appends the frame of an operation; `left` is the last entry after it.
pub(super) fn encode(
    operation: &StorageOperation,
    left: Option<LogPosition>,
    salt: u64,
    sequence: u64,
    synced: u64,
    is_last: bool,
    buffer: &mut Vec<u8>,
) {
    let start = buffer.len();
    buffer.put_bytes(0, FRAME_HEADER_BYTES);
    let kind = match operation {
        StorageOperation::Append(record) => {
            record::put_position(buffer, record.position);
            buffer.put_slice(&record.payload);
            APPEND
        }
        StorageOperation::TruncateAfter(_) => {
            record::put_option(buffer, left, record::put_position);
            TRUNCATE
        }
        StorageOperation::PurgeTo(position) => {
            record::put_position(buffer, *position);
            PURGE
        }
        StorageOperation::SaveVote(vote) => {
            record::put_vote(buffer, *vote);
            VOTE
        }
        StorageOperation::SaveCommitted(position) => {
            record::put_position(buffer, *position);
            COMMITTED
        }
        StorageOperation::SaveIdentity(identity) => {
            record::put_identity(buffer, *identity);
            IDENTITY
        }
    };
    let body = &buffer[start + FRAME_HEADER_BYTES..];
    let (length, body_checksum) = (u32::try_from(body.len()).unwrap_or(u32::MAX), crc32c::crc32c(body));
    buffer.put_u8(END_MARK);
    let mut place = &mut buffer[start + 4..start + FRAME_HEADER_BYTES];
    place.put_u8(kind);
    place.put_u8(u8::from(is_last));
    place.put_u16_le(0);
    place.put_u32_le(length);
    place.put_u32_le(body_checksum);
    place.put_u64_le(sequence);
    place.put_u64_le(synced);
    let checksum = header_checksum(&buffer[start + 4..start + FRAME_HEADER_BYTES], salt);
    buffer[start..start + 4].copy_from_slice(&checksum.to_le_bytes());
}

/// What stands at the start of some bytes of a segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    /// A sound frame and its body.
    Frame(FrameHeader, &'a [u8]),
    /// A sound header; the frame needs so many bytes, which are not all here.
    Partial(usize),
    /// Anything else.
    Unsound,
}

/// Looks at the start of `bytes`.
pub(super) fn find(bytes: &[u8], salt: u64) -> Found<'_> {
    let Some(header) = FrameHeader::decode(bytes, salt) else { return Found::Unsound };
    let Some(frame) = bytes.get(..header.frame_bytes()) else { return Found::Partial(header.frame_bytes()) };
    let body = &frame[FRAME_HEADER_BYTES..frame.len() - 1];
    match frame.last() == Some(&END_MARK) && crc32c::crc32c(body) == header.body_checksum {
        true => Found::Frame(header, body),
        false => Found::Unsound,
    }
}

/// Reads the body of a sound frame.
pub(super) fn decode(header: &FrameHeader, mut body: &[u8]) -> Result<Stored, RecordError> {
    let body = &mut body;
    let mut left = None;
    let operation = match header.kind {
        APPEND => {
            let position = record::get_position(body)?;
            *body = &[];
            StorageOperation::Append(LogRecord { position, payload: bytes::Bytes::new() })
        }
        TRUNCATE => {
            left = record::get_option(body, record::get_position)?;
            StorageOperation::TruncateAfter(left.map(|left| left.index))
        }
        PURGE => StorageOperation::PurgeTo(record::get_position(body)?),
        VOTE => StorageOperation::SaveVote(record::get_vote(body)?),
        COMMITTED => StorageOperation::SaveCommitted(record::get_position(body)?),
        IDENTITY => StorageOperation::SaveIdentity(record::get_identity(body)?),
        _ => return Err(RecordError::Malformed),
    };
    if body.is_empty() { Ok(Stored { operation, left }) } else { Err(RecordError::Malformed) }
}

/// The entry in the body of a sound frame; `None` if it is none.
pub(super) fn entry<'a>(header: &FrameHeader, body: &'a [u8]) -> Option<(LogPosition, &'a [u8])> {
    let mut rest = body;
    if header.kind != APPEND || rest.len() < 16 {
        return None;
    }
    let position = LogPosition { term: Term(rest.get_u64_le()), index: LogIndex(rest.get_u64_le()) };
    Some((position, rest))
}

/// Why the bytes after the last sound frame of the newest segment are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tail {
    /// Nothing was written there.
    Empty,
    /// A write that was cut off, or of which a power cut took some sectors; never on the disk as a whole.
    Torn,
    /// It was whole once.
    Damaged,
}

/// Judges the bytes of a segment from `offset` to its end, where the frame of `sequence` was to begin.
pub(super) fn judge(bytes: &[u8], offset: usize, salt: u64, sequence: u64) -> Tail {
    let tail = &bytes[offset.min(bytes.len())..];
    let Some(written) = tail.iter().rposition(|byte| *byte != 0) else { return Tail::Empty };
    let is_told_durable =
        |start: usize| FrameHeader::decode(&tail[start..], salt).is_some_and(|header| header.synced > sequence);
    if (1..=written).any(is_told_durable) {
        return Tail::Damaged;
    }
    // How far the frame reaches: of one with a damaged header, that is all there is to look at.
    let length = FrameHeader::decode(tail, salt).map_or(FRAME_HEADER_BYTES, |header| header.frame_bytes());
    let was_cut_off = written + 1 < length;
    if was_cut_off || lacks_a_sector(tail, offset, length) { Tail::Torn } else { Tail::Damaged }
}

/// Whether one of the sectors over which the first `length` bytes are spread holds nothing of them.
fn lacks_a_sector(tail: &[u8], offset: usize, length: usize) -> bool {
    let mut start = 0;
    while start < length.min(tail.len()) {
        let end = start + SECTOR_BYTES - (offset + start) % SECTOR_BYTES;
        let part = &tail[start..end.min(length).min(tail.len())];
        if part.iter().all(|byte| *byte == 0) {
            return true;
        }
        start = end;
    }
    false
}
