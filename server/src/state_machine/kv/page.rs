//! Cuts the answer of a range into pages.

use std::borrow::Borrow;

use bytes::Bytes;
use d_engine_proto::v1;

use super::command::{RangePart, RangeQuery};
use super::error::KvError;
use super::room::{Room, key_only, key_value};
use crate::storage::versions::{KeyVersion, ScanOrder};

/// Fills a page with the versions that `next` yields in the query's order, and asks for only one more than it takes:
/// to page through an interval costs no more than to read it at once.
pub(super) fn fill<V: Borrow<KeyVersion>, E: From<KvError>>(
    query: &RangeQuery,
    room: &mut Room,
    mut next: impl FnMut() -> Result<Option<V>, E>,
) -> Result<v1::RangeResponse, E> {
    let mut page = v1::RangeResponse::default();
    let mut count = 0;
    while let Some(version) = next()? {
        let version = version.borrow();
        if query.part != RangePart::Count {
            let kv = if query.part == RangePart::Keys { key_only(version) } else { key_value(version) };
            if query.limit == Some(count) || !room.take_on_page(&kv)? {
                page.more = true;
                page.next = bound_of_next_page(query, page.kvs.last(), version);
                room.take(page.next.len() as u64)?;
                return Ok(page);
            }
            page.kvs.push(kv);
        }
        count += 1;
    }
    page.count = Some(count);
    Ok(page)
}

fn bound_of_next_page(query: &RangeQuery, last: Option<&v1::KeyValue>, left_out: &KeyVersion) -> Bytes {
    match (query.order, last) {
        (ScanOrder::Ascending, _) => left_out.key.clone(),
        (ScanOrder::Descending, Some(last)) => last.key.clone(),
        // Nothing fitted, so the next page begins where this one did.
        (ScanOrder::Descending, None) => query.interval.end.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use d_engine_proto::{LeaseId, Revision};

    use super::super::command::Interval;
    use super::*;

    #[test]
    fn a_page_asks_for_only_one_key_more_than_it_takes() {
        let version = |number: u64| KeyVersion {
            key: Bytes::from(number.to_be_bytes().to_vec()),
            value: Bytes::new(),
            create_revision: Revision(1),
            mod_revision: Revision(1),
            version: 1,
            lease: LeaseId(0),
        };
        let interval = Interval { start: Bytes::new(), end: None };
        let query = RangeQuery { interval, limit: Some(3), order: ScanOrder::Ascending, part: RangePart::Keys };
        let mut asked = 0;
        let page = fill::<_, KvError>(&query, &mut Room::default(), || {
            asked += 1;
            Ok(Some(version(asked)))
        });
        let page = page.unwrap();
        assert_eq!((page.kvs.len(), page.count, page.more, asked), (3, None, true, 4));
        assert_eq!(page.next, version(4).key);
    }
}
