//! Sessions: registered, prolonged and closed through the log; and how a change goes under one.

use std::hash::Hasher;

use bytes::{Bytes, BytesMut};
use d_engine_proto::defaults;
use d_engine_proto::v1::{self, command::Command as Change, command_reply::Reply};
use prost::Message;
use siphasher::sip::SipHasher24;

use super::{Deadline, Engine, EngineError};

/// What session and hash add to an encoded command, at most; its trace context is part of its length.
const SESSION_BYTES_MAX: usize = 64;

impl Engine {
    /// Opens a session.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn register_session(
        &self,
        request: v1::SessionRegisterRequest,
        deadline: Deadline,
    ) -> Result<v1::SessionRegisterResponse, EngineError> {
        let (header, reply) = self.propose(registration(request), deadline).await?;
        match reply {
            Reply::SessionRegister(response) => Ok(v1::SessionRegisterResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Prolongs a session.
    ///
    /// # Errors
    /// As [`put`](Self::put); with the code `SessionExpired` when there is no such session.
    pub async fn renew_session(
        &self,
        request: v1::SessionRenewRequest,
        deadline: Deadline,
    ) -> Result<v1::SessionRenewResponse, EngineError> {
        let (header, reply) = self.propose(Change::SessionRenew(request), deadline).await?;
        match reply {
            Reply::SessionRenew(response) => Ok(v1::SessionRenewResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Ends a session.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn close_session(
        &self,
        request: v1::SessionCloseRequest,
        deadline: Deadline,
    ) -> Result<v1::SessionCloseResponse, EngineError> {
        let (header, reply) = self.propose(Change::SessionClose(request), deadline).await?;
        match reply {
            Reply::SessionClose(_) => Ok(v1::SessionCloseResponse { header }),
            _ => Err(EngineError::Stopped),
        }
    }
}

/// The change that opens a session, which says for how long: the default may be another one where it is applied.
pub(super) fn registration(mut request: v1::SessionRegisterRequest) -> Change {
    if request.ttl_ms == 0 {
        request.ttl_ms = defaults::SESSION_TTL_MS;
    }
    Change::SessionRegister(request)
}

/// Takes the session out of a request: the command carries it. Those of nested requests stay, and are refused.
pub(super) fn take_session(change: &mut Change) -> Option<v1::SessionCall> {
    match change {
        Change::Put(request) => request.session.take(),
        Change::Delete(request) => request.session.take(),
        Change::DeleteRange(request) => request.session.take(),
        Change::CompareAndSwap(request) => request.session.take(),
        Change::Txn(request) => request.session.take(),
        Change::LeaseGrant(request) => request.session.take(),
        Change::LeaseRevoke(request) => request.session.take(),
        Change::LeaseRenewals(_)
        | Change::SessionRegister(_)
        | Change::SessionRenew(_)
        | Change::SessionClose(_)
        | Change::Compact(_)
        | Change::Tick(_)
        | Change::StateCheck(_) => None,
    }
}

/// The command as it is proposed; under a session, with the hash of what it does. Takes what it needs of an empty
/// buffer, in which many commands may come to lie behind each other.
pub(super) fn encode(mut command: v1::Command, buffer: &mut BytesMut) -> Bytes {
    let session = command.session.take();
    buffer.reserve(command.encoded_len() + if session.is_some() { SESSION_BYTES_MAX } else { 0 });
    // A repetition is the same command in another span.
    let trace = command.trace.take();
    command.encode_raw(buffer);
    // The encodings of two parts of a message, one behind the other, are the encoding of the whole.
    if session.is_some() {
        let payload_hash = payload_hash(buffer);
        v1::Command { command: None, session, payload_hash, trace }.encode_raw(buffer);
    } else if trace.is_some() {
        v1::Command { trace, ..v1::Command::default() }.encode_raw(buffer);
    }
    buffer.split().freeze()
}

/// SipHash-2-4 with the key zero. Stands in the log and is compared with that of a repetition, which may come through
/// a node of another version: it must be the same in every version.
fn payload_hash(bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new();
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(value: &'static str) -> Change {
        let session = Some(v1::SessionCall { session: 7, sequence: u64::MAX, acknowledged_through: u64::MAX });
        Change::Put(v1::PutRequest { key: "k".into(), value: value.into(), session, ..Default::default() })
    }

    fn proposed(mut change: Change) -> v1::Command {
        let session = take_session(&mut change);
        let command = v1::Command { command: Some(change), session, ..v1::Command::default() };
        v1::Command::decode(encode(command, &mut BytesMut::new())).unwrap()
    }

    #[test]
    fn a_session_moves_from_the_request_to_the_command_with_a_hash_of_the_rest() {
        let command = proposed(put("v"));
        assert_eq!(command.session.unwrap().session, 7);
        let Some(Change::Put(request)) = command.command else { panic!("not a put") };
        assert_eq!((request.session, &request.value[..]), (None, b"v".as_slice()));
        assert_eq!(command.payload_hash, proposed(put("v")).payload_hash);
        assert_ne!(command.payload_hash, proposed(put("w")).payload_hash);
    }

    #[test]
    fn a_repetition_in_another_span_is_the_same_command() {
        let under = |trace: Option<v1::TraceContext>| {
            let mut change = put("v");
            let session = take_session(&mut change);
            let command = v1::Command { command: Some(change), session, trace, ..v1::Command::default() };
            v1::Command::decode(encode(command, &mut BytesMut::new())).unwrap()
        };
        let span = |id| v1::TraceContext::new([7; 16], [id; 8], 1);
        let (first, second) = (under(span(1)), under(span(2)));
        assert_eq!((first.trace.clone(), second.trace.clone()), (span(1), span(2)));
        assert_eq!(first.payload_hash, under(None).payload_hash);
        assert_eq!(v1::Command { trace: span(1), ..second }, first);
    }

    #[test]
    fn the_hash_is_the_same_in_every_version() {
        // Computed by another implementation, which agrees with the reference's own vectors.
        assert_eq!(payload_hash(b""), 0x1e92_4b9d_7377_00d7);
        assert_eq!(payload_hash(b"a command"), 0x25e9_6403_d839_a6f7);
        assert_eq!(proposed(put("v")).payload_hash, payload_hash(&[10, 6, 10, 1, b'k', 18, 1, b'v']));
    }
}
