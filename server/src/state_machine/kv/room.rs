//! How much an answer may hold. Every key that is to be answered passes through a [`Room`] first: no answer, however it
//! is put together, outgrows what clients accept, and none is built any further once it is too large.

use bytes::Bytes;
use d_engine_proto::{limits, v1};
use prost::Message;

use super::error::KvError;
use crate::storage::versions::KeyVersion;

/// The room that is left in the answer of one request, nested transactions included.
#[derive(Debug)]
pub(super) struct Room {
    /// For the whole answer; what exceeds it refuses the request.
    bytes: u64,
    /// For its ranges together, a part of the above; what exceeds it is left for the next page. A transaction of many
    /// ranges gets no more than a single range does.
    page_bytes: u64,
    page_keys: u64,
    page_is_empty: bool,
}

const _: () = {
    // A key, whatever its length, fits beside the bound of a next page: no get, single write or single range is refused.
    assert!(2 * limits::REQUEST_BYTES_MAX < limits::ANSWER_BYTES_MAX);
    assert!(limits::RANGE_PAGE_BYTES_MAX <= limits::REQUEST_BYTES_MAX);
    // What an answer has besides keys and values, a header and a few dozen bytes for each operation, fits in what is
    // left of the 4 MiB that generated stubs of every language accept.
    assert!(limits::ANSWER_BYTES_MAX + 256 * limits::TXN_OPERATIONS_MAX <= 4 << 20);
};

impl Default for Room {
    fn default() -> Self {
        Self {
            bytes: limits::ANSWER_BYTES_MAX,
            page_bytes: limits::RANGE_PAGE_BYTES_MAX,
            page_keys: limits::RANGE_PAGE_KEYS_MAX,
            page_is_empty: true,
        }
    }
}

impl Room {
    /// A version as answers carry it, for which there is room.
    pub(super) fn key_value(&mut self, version: &KeyVersion) -> Result<v1::KeyValue, KvError> {
        let kv = key_value(version);
        self.take(size(&kv))?;
        Ok(kv)
    }

    /// Takes room on the page that ranges share; `false` if the page is full. The first key fits always, however large,
    /// so that every range gets on.
    pub(super) fn take_on_page(&mut self, kv: &v1::KeyValue) -> Result<bool, KvError> {
        let bytes = size(kv);
        let fits = self.page_is_empty || (self.page_keys > 0 && bytes <= self.page_bytes);
        if fits {
            self.take(bytes)?;
            self.page_bytes = self.page_bytes.saturating_sub(bytes);
            self.page_keys = self.page_keys.saturating_sub(1);
            self.page_is_empty = false;
        }
        Ok(fits)
    }

    /// Takes room for bytes of any kind.
    pub(super) fn take(&mut self, bytes: u64) -> Result<(), KvError> {
        self.bytes = self.bytes.checked_sub(bytes).ok_or(KvError::AnswerTooLarge)?;
        Ok(())
    }
}

/// What a key costs in an answer, its field header included.
fn size(kv: &v1::KeyValue) -> u64 {
    let bytes = kv.encoded_len();
    (1 + prost::length_delimiter_len(bytes) + bytes) as u64
}

/// A version as answers carry it.
pub(super) fn key_value(version: &KeyVersion) -> v1::KeyValue {
    v1::KeyValue { value: version.value.clone(), ..key_only(version) }
}

/// The same without its value.
pub(super) fn key_only(version: &KeyVersion) -> v1::KeyValue {
    v1::KeyValue {
        key: version.key.clone(),
        value: Bytes::new(),
        create_revision: version.create_revision.get(),
        mod_revision: version.mod_revision.get(),
        version: version.version,
        lease: version.lease.get(),
    }
}
