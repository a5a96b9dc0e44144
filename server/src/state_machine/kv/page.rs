//! Cuts the answer of a range into pages.

use bytes::Bytes;
use d_engine_proto::{limits, v1};

use super::command::{RangePart, RangeQuery};
use crate::storage::versions::{KeyVersion, ScanOrder};

/// What a key costs in an answer besides its bytes: revisions, version and field headers.
const KEY_OVERHEAD_BYTES: u64 = 32;

/// The room that one request's pages share. A transaction of many ranges gets no more than a single range does.
#[derive(Debug)]
pub(super) struct Room {
    keys: u64,
    bytes: u64,
    untouched: bool,
}

impl Default for Room {
    fn default() -> Self {
        Self { keys: limits::RANGE_PAGE_KEYS_MAX, bytes: limits::RANGE_PAGE_BYTES_MAX, untouched: true }
    }
}

impl Room {
    /// Takes room for one key. The first fits always, however large, so that every range gets on.
    pub(super) fn take(&mut self, version: &KeyVersion, part: RangePart) -> bool {
        let value_bytes = if part == RangePart::KeysAndValues { version.value.len() as u64 } else { 0 };
        let bytes = version.key.len() as u64 + value_bytes + KEY_OVERHEAD_BYTES;
        let fits = self.untouched || (self.keys > 0 && bytes <= self.bytes);
        if fits {
            self.keys = self.keys.saturating_sub(1);
            self.bytes = self.bytes.saturating_sub(bytes);
            self.untouched = false;
        }
        fits
    }
}

/// A page being filled with keys in the query's order.
pub(super) struct Page<'a> {
    query: &'a RangeQuery,
    room: &'a mut Room,
    answer: v1::RangeResponse,
}

impl<'a> Page<'a> {
    pub(super) fn new(query: &'a RangeQuery, room: &'a mut Room) -> Self {
        Self { query, room, answer: v1::RangeResponse::default() }
    }

    /// Whether the page takes no more keys; the rest need only be counted.
    pub(super) fn is_full(&self) -> bool {
        self.answer.more || self.query.part == RangePart::Count
    }

    /// Counts the next key of the interval and takes it if it fits.
    pub(super) fn offer(&mut self, version: &KeyVersion) {
        self.answer.count += 1;
        if self.is_full() {
            return;
        }
        let taken = self.answer.kvs.len() as u64;
        if self.query.limit.is_none_or(|limit| taken < limit) && self.room.take(version, self.query.part) {
            self.answer.kvs.push(match self.query.part {
                RangePart::Keys => key_only(version),
                _ => key_value(version),
            });
        } else {
            self.answer.more = true;
            self.answer.next = self.bound_of_next_page(version);
        }
    }

    /// Counts keys that a full page need not see.
    pub(super) fn skip(&mut self, keys: usize) {
        self.answer.count += keys as u64;
    }

    pub(super) fn finish(self) -> v1::RangeResponse {
        self.answer
    }

    fn bound_of_next_page(&self, left_out: &KeyVersion) -> Bytes {
        match (self.query.order, self.answer.kvs.last()) {
            (ScanOrder::Ascending, _) => left_out.key.clone(),
            (ScanOrder::Descending, Some(last)) => last.key.clone(),
            // Nothing fitted, so the next page begins where this one did.
            (ScanOrder::Descending, None) => self.query.interval.end.clone().unwrap_or_default(),
        }
    }
}

/// A version as answers carry it.
pub(super) fn key_value(version: &KeyVersion) -> v1::KeyValue {
    v1::KeyValue { value: version.value.clone(), ..key_only(version) }
}

fn key_only(version: &KeyVersion) -> v1::KeyValue {
    v1::KeyValue {
        key: version.key.clone(),
        value: Bytes::new(),
        create_revision: version.create_revision.get(),
        mod_revision: version.mod_revision.get(),
        version: version.version,
        lease: version.lease.get(),
    }
}
