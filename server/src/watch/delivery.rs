//! Events on their way to those who watch: made once, encoded once, shared by all of a group.

use std::sync::{Arc, OnceLock};

use bytes::{BufMut, Bytes, BytesMut};
use d_engine_proto::{Revision, v1};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len, message};

use super::interest::Options;
use crate::limits::WATCH_FRAME_BYTES_MAX;
use crate::storage::versions::{Change, KeyVersion};

/// What an event costs in memory besides its keys and values.
const EVENT_OVERHEAD_BYTES: usize = 256;

/// Fields of the protocol that are written by hand, since a body is shared and its head is not.
const RESPONSE_EVENTS: u32 = 3;
const EVENTS_EVENT: u32 = 1;
const EVENTS_INCOMPLETE: u32 = 2;

/// The events of whole revisions, in the order of revisions and, within one, of keys. Never empty.
#[derive(Debug)]
pub struct Delivery {
    changes: Vec<Change>,
    options: Options,
    first: Revision,
    last: Revision,
    bytes: usize,
    frames: OnceLock<Vec<Bytes>>,
}

impl Delivery {
    /// `None` without changes.
    pub(super) fn new(changes: Vec<Change>, options: Options) -> Option<Self> {
        let (first, last) = (changes.first()?.revision, changes.last()?.revision);
        let bytes = changes.iter().map(|change| cost(change, options)).sum();
        Some(Self { changes, options, first, last, bytes, frames: OnceLock::new() })
    }

    /// Revision of the first event.
    #[must_use]
    pub fn first_revision(&self) -> Revision {
        self.first
    }

    /// Revision of the last event: all of its events are here.
    #[must_use]
    pub fn last_revision(&self) -> Revision {
        self.last
    }

    /// Number of events.
    #[must_use]
    pub fn event_count(&self) -> usize {
        self.changes.len()
    }

    /// The events, as the protocol has them.
    pub fn events(&self) -> impl Iterator<Item = v1::WatchEvent> + '_ {
        self.changes.iter().map(|change| event(change, self.options))
    }

    /// The `events` field of a `WatchResponse`, encoded, once for everybody: a `watch_id` before it makes the message
    /// whole. Each is at most [`WATCH_FRAME_BYTES_MAX`] long, unless it holds a single event that is larger.
    #[must_use]
    pub fn frames(&self) -> &[Bytes] {
        self.frames.get_or_init(|| encode(&self.changes, self.options, WATCH_FRAME_BYTES_MAX))
    }

    /// What it keeps in memory at most, encoded form included.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// What of it follows a revision.
    pub(super) fn after(self: &Arc<Self>, revision: Revision) -> Option<Arc<Self>> {
        if self.first > revision {
            return Some(Arc::clone(self));
        }
        let rest = self.changes.iter().filter(|change| change.revision > revision).cloned().collect();
        Self::new(rest, self.options).map(Arc::new)
    }
}

/// A message of these sizes is far below the 4 MiB that generated stubs accept.
fn encode(changes: &[Change], options: Options, frame_bytes_max: usize) -> Vec<Bytes> {
    let mut frames = Vec::new();
    let mut frame = Frame::default();
    for revision in changes.chunk_by(|a, b| a.revision == b.revision) {
        let events: Vec<_> = revision.iter().map(|change| event(change, options)).collect();
        let lengths: Vec<_> = events.iter().map(|event| message::encoded_len(EVENTS_EVENT, event)).collect();
        if !frame.events.is_empty() && frame.bytes + lengths.iter().sum::<usize>() > frame_bytes_max {
            frames.push(std::mem::take(&mut frame).encode(false));
        }
        for (event, bytes) in events.into_iter().zip(lengths) {
            // Here it holds nothing but the beginning of this revision.
            if !frame.events.is_empty() && frame.bytes + bytes > frame_bytes_max {
                frames.push(std::mem::take(&mut frame).encode(true));
            }
            frame.events.push(event);
            frame.bytes += bytes;
        }
    }
    frames.push(frame.encode(false));
    frames
}

#[derive(Default)]
struct Frame {
    events: Vec<v1::WatchEvent>,
    /// Of the encoded events.
    bytes: usize,
}

impl Frame {
    fn encode(&self, incomplete: bool) -> Bytes {
        let body = self.bytes + if incomplete { key_len(EVENTS_INCOMPLETE) + 1 } else { 0 };
        let whole = key_len(RESPONSE_EVENTS) + encoded_len_varint(body as u64) + body;
        let mut buffer = BytesMut::with_capacity(whole);
        encode_key(RESPONSE_EVENTS, WireType::LengthDelimited, &mut buffer);
        encode_varint(body as u64, &mut buffer);
        for event in &self.events {
            message::encode(EVENTS_EVENT, event, &mut buffer);
        }
        if incomplete {
            encode_key(EVENTS_INCOMPLETE, WireType::Varint, &mut buffer);
            buffer.put_u8(1);
        }
        buffer.freeze()
    }
}

fn event(change: &Change, options: Options) -> v1::WatchEvent {
    let kv = change.after.as_ref().map_or_else(
        || v1::KeyValue { key: change.key.clone(), mod_revision: change.revision.get(), ..v1::KeyValue::default() },
        |version| key_value(version, options),
    );
    let kind = if change.after.is_some() { v1::watch_event::Kind::Put } else { v1::watch_event::Kind::Delete };
    let previous = change.before.as_ref().filter(|_| options.previous);
    v1::WatchEvent { kind: kind as i32, kv: Some(kv), previous: previous.map(|version| key_value(version, options)) }
}

fn key_value(version: &KeyVersion, options: Options) -> v1::KeyValue {
    v1::KeyValue {
        key: version.key.clone(),
        value: if options.keys_only { Bytes::new() } else { version.value.clone() },
        create_revision: version.create_revision.get(),
        mod_revision: version.mod_revision.get(),
        version: version.version,
        lease: version.lease.get(),
    }
}

/// Keys and values count twice: as they are, and encoded.
fn cost(change: &Change, options: Options) -> usize {
    let of = |version: &KeyVersion| version.key.len() + version.value.len();
    let after = change.after.as_deref().map_or(change.key.len(), of);
    let before = change.before.as_deref().filter(|_| options.previous).map_or(0, of);
    EVENT_OVERHEAD_BYTES + 2 * (after + before)
}

#[cfg(test)]
mod tests {
    use d_engine_proto::LeaseId;
    use prost::Message;

    use super::*;
    use crate::watch::tests::seeded;

    fn change(random: &mut fastrand::Rng, revision: u64) -> Change {
        let mut version = || {
            let value = vec![b'v'; random.usize(..200)].into();
            let (create_revision, mod_revision) = (Revision(1), Revision(revision));
            Arc::new(KeyVersion {
                key: "k".into(),
                value,
                create_revision,
                mod_revision,
                version: 1,
                lease: LeaseId(9),
            })
        };
        let (after, before) = (version(), version());
        let kind = random.u32(..3);
        let (after, before) = ((kind > 0).then_some(after), (kind < 2).then_some(before));
        Change { key: "k".into(), revision: Revision(revision), after, before }
    }

    fn decode(watch_id: u64, body: &Bytes) -> v1::WatchEvents {
        let mut whole = Vec::new();
        prost::encoding::uint64::encode(1, &watch_id, &mut whole);
        whole.extend_from_slice(body);
        let response = v1::WatchResponse::decode(&whole[..]).unwrap();
        assert_eq!(response.watch_id, watch_id);
        match response.kind {
            Some(v1::watch_response::Kind::Events(events)) => events,
            other => panic!("{other:?}"),
        }
    }

    /// Random revisions in frames of every size: together they are the events, and each frame but the last of a
    /// revision that does not fit is marked.
    #[test]
    fn frames_hold_every_event_once_and_only_what_does_not_fit_is_divided() {
        let mut random = seeded();
        for _ in 0..200 {
            let mut changes = Vec::new();
            for revision in 1..random.u64(2..12) {
                changes.extend((0..random.usize(1..8)).map(|_| change(&mut random, revision)));
            }
            let options =
                Options { previous: random.bool(), puts: true, deletes: true, keys_only: random.u32(..3) == 0 };
            let max = random.usize(1..2000);
            let frames: Vec<_> = encode(&changes, options, max).iter().map(|body| decode(77, body)).collect();
            let all: Vec<_> = frames.iter().flat_map(|frame| frame.events.clone()).collect();
            assert_eq!(all, changes.iter().map(|change| event(change, options)).collect::<Vec<_>>());
            let revision = |event: &v1::WatchEvent| event.kv.as_ref().map_or(0, |kv| kv.mod_revision);
            for (position, frame) in frames.iter().enumerate() {
                let bytes: usize = frame.events.iter().map(|event| message::encoded_len(EVENTS_EVENT, event)).sum();
                assert!(bytes <= max || frame.events.len() == 1, "{bytes} > {max}");
                let next = frames.get(position + 1).map(|next| revision(&next.events[0]));
                let last = revision(&frame.events[frame.events.len() - 1]);
                assert_eq!(frame.incomplete, next == Some(last));
                let whole: usize = changes
                    .iter()
                    .filter(|change| change.revision.get() == last)
                    .map(|change| message::encoded_len(EVENTS_EVENT, &event(change, options)))
                    .sum();
                assert!(!frame.incomplete || whole > max, "a revision that fits is divided");
            }
        }
    }
}
