//! The content of a log entry and its encoding: the bytes that go to the disk, to the peers and, cut into slices
//! without a copy, to the state machine.
//!
//! ```text
//! payload    = kind:u8 body
//! kind 0     blank       body is empty
//! kind 1     commands    body = store_time_nanoseconds:u64 count:u32 (length:u32 command)*
//! kind 2     membership  body = a protobuf StoredMembership
//! ```
//! Numbers are little-endian. The encoding is stored on disk: a change takes a new kind.

use std::fmt;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use d_engine_proto::v1;
use prost::Message;

use super::member::Member;
use super::raft_types::{Entry, Payload, RaftMembership, from_position, to_position};
use crate::state_machine::StoreTime;
use crate::storage::LogRecord;

const KIND_BLANK: u8 = 0;
const KIND_COMMANDS: u8 = 1;
const KIND_MEMBERSHIP: u8 = 2;
const COMMANDS_HEADER_BYTES: usize = 1 + 8 + 4;
/// What a command adds to a batch besides its own bytes.
pub(super) const COMMAND_OVERHEAD_BYTES: usize = 4;

/// Why a payload cannot be read. It passed its checksum, so a newer version wrote it, or a bug did.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum DecodeError {
    #[error("the payload is cut short")]
    Truncated,
    #[error("payload kind {0} is unknown to this version")]
    UnknownKind(u8),
    #[error("the membership is malformed: {0}")]
    Membership(String),
}

/// A batch of commands, encoded once.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Batch(Bytes);

impl Batch {
    /// Encodes the commands of one entry.
    pub(super) fn encode<'a>(
        store_time: StoreTime,
        commands: impl ExactSizeIterator<Item = &'a Bytes> + Clone,
    ) -> Self {
        let bytes: usize = commands.clone().map(|command| COMMAND_OVERHEAD_BYTES + command.len()).sum();
        let mut buffer = BytesMut::with_capacity(COMMANDS_HEADER_BYTES + bytes);
        buffer.put_u8(KIND_COMMANDS);
        buffer.put_u64_le(u64::try_from(store_time.0.as_nanos()).unwrap_or(u64::MAX));
        // Lengths fit: a batch is capped far below 4 GiB.
        buffer.put_u32_le(u32::try_from(commands.len()).unwrap_or(u32::MAX));
        for command in commands {
            buffer.put_u32_le(u32::try_from(command.len()).unwrap_or(u32::MAX));
            buffer.put_slice(command);
        }
        Self(buffer.freeze())
    }

    /// What it takes in the log.
    pub(super) fn bytes(&self) -> usize {
        self.0.len()
    }

    /// The store time and the commands, sharing this batch's memory.
    pub(super) fn decode(&self) -> Result<(StoreTime, Vec<Bytes>), DecodeError> {
        let mut rest = self.0.clone();
        if rest.remaining() < COMMANDS_HEADER_BYTES {
            return Err(DecodeError::Truncated);
        }
        rest.advance(1);
        let store_time = StoreTime(Duration::from_nanos(rest.get_u64_le()));
        let count = rest.get_u32_le() as usize;
        // The count is not trusted with memory before that many commands can be there.
        let mut commands = Vec::with_capacity(count.min(rest.remaining() / COMMAND_OVERHEAD_BYTES));
        for _ in 0..count {
            let length = rest.try_get_u32_le().map_err(|_| DecodeError::Truncated)? as usize;
            if rest.remaining() < length {
                return Err(DecodeError::Truncated);
            }
            commands.push(rest.split_to(length));
        }
        if rest.has_remaining() { Err(DecodeError::Truncated) } else { Ok((store_time, commands)) }
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "batch of {} bytes", self.0.len())
    }
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The entry as the log stores and the peers exchange it.
pub(super) fn encode(entry: &Entry) -> LogRecord {
    let payload = match &entry.payload {
        Payload::Blank => Bytes::from_static(&[KIND_BLANK]),
        Payload::Normal(batch) => batch.0.clone(),
        Payload::Membership(membership) => {
            let mut buffer = BytesMut::new();
            buffer.put_u8(KIND_MEMBERSHIP);
            buffer.put_slice(&encode_membership(membership));
            buffer.freeze()
        }
    };
    LogRecord { position: to_position(&entry.log_id), payload }
}

/// The inverse of [`encode`]; a batch stays encoded until it is applied.
pub(super) fn decode(record: LogRecord) -> Result<Entry, DecodeError> {
    let payload = match record.payload.first() {
        None => return Err(DecodeError::Truncated),
        Some(&KIND_BLANK) => Payload::Blank,
        Some(&KIND_COMMANDS) => Payload::Normal(Batch(record.payload)),
        Some(&KIND_MEMBERSHIP) => Payload::Membership(decode_membership(&record.payload.slice(1..))?),
        Some(&kind) => return Err(DecodeError::UnknownKind(kind)),
    };
    Ok(Entry { log_id: from_position(record.position), payload })
}

pub(super) fn encode_membership(membership: &RaftMembership) -> Bytes {
    let voter_sets =
        membership.get_joint_config().iter().map(|set| v1::VoterSet { ids: set.iter().copied().collect() }).collect();
    let members = membership
        .nodes()
        .map(|(id, member)| v1::StoredMember {
            id: *id,
            peer_address: member.peer_address.clone(),
            client_address: member.client_address.clone(),
            application_address: member.application_address.clone(),
            incarnation: member.incarnation,
        })
        .collect();
    v1::StoredMembership { voter_sets, members }.encode_to_vec().into()
}

pub(super) fn decode_membership(bytes: &[u8]) -> Result<RaftMembership, DecodeError> {
    let stored = v1::StoredMembership::decode(bytes).map_err(|error| DecodeError::Membership(error.to_string()))?;
    let voter_sets = stored.voter_sets.into_iter().map(|set| set.ids.into_iter().collect()).collect();
    let members: std::collections::BTreeMap<u32, Member> = stored
        .members
        .into_iter()
        .map(|member| {
            let id = member.id;
            let member = Member {
                peer_address: member.peer_address,
                client_address: member.client_address,
                application_address: member.application_address,
                incarnation: member.incarnation,
            };
            (id, member)
        })
        .collect();
    RaftMembership::new(voter_sets, members).map_err(|error| DecodeError::Membership(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::LogPosition;
    use d_engine_proto::{LogIndex, Term};

    fn position() -> LogPosition {
        LogPosition { term: Term(3), index: LogIndex(17) }
    }

    #[test]
    fn a_batch_survives_the_log() {
        let commands = [Bytes::from_static(b"one"), Bytes::new(), Bytes::from_static(b"three")];
        let time = StoreTime(Duration::from_millis(1234));
        let entry =
            Entry { log_id: from_position(position()), payload: Payload::Normal(Batch::encode(time, commands.iter())) };
        let Payload::Normal(batch) = decode(encode(&entry)).unwrap().payload else { panic!("not a batch") };
        assert_eq!(batch.decode().unwrap(), (time, commands.to_vec()));
    }

    #[test]
    fn a_membership_survives_the_log() {
        let member = Member { peer_address: "a:1".into(), incarnation: 7, ..Member::default() };
        let members = std::collections::BTreeMap::from([(1, member.clone()), (2, member)]);
        let membership = RaftMembership::new(vec![[1].into(), [1, 2].into()], members).unwrap();
        let entry = Entry { log_id: from_position(position()), payload: Payload::Membership(membership.clone()) };
        assert_eq!(decode(encode(&entry)).unwrap().payload, Payload::Membership(membership));
    }

    #[test]
    fn every_truncation_of_a_batch_is_refused() {
        let commands = [Bytes::from_static(b"one"), Bytes::from_static(b"two")];
        let whole = Batch::encode(StoreTime::default(), commands.iter()).0;
        for length in 0..whole.len() {
            assert_eq!(Batch(whole.slice(..length)).decode(), Err(DecodeError::Truncated), "cut at {length}");
        }
    }

    #[test]
    fn an_unknown_kind_is_named() {
        let record = LogRecord { position: position(), payload: Bytes::from_static(&[9]) };
        assert_eq!(decode(record).unwrap_err(), DecodeError::UnknownKind(9));
    }
}
