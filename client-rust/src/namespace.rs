//! Namespaces: a client that sees only the keys with a prefix, and sees them without it.
//!
//! The one place that maps keys. Requests enter a namespace before they are sent, answers leave it before the caller
//! sees them; no builder knows of it. A namespace holds the keys that begin with its prefix and go on: a key has at
//! least one byte, inside as outside. Prefixing keeps the order of keys, so an interval stays one.

use bytes::{Bytes, BytesMut};
use d_engine_proto::v1::{self, txn_operation, txn_result};

use crate::kv::KeyRange;

/// The prefix of all keys of a client; empty: it sees the whole store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Namespace(Bytes);

/// A key without a byte was given: outside, the server refuses it; inside, it would become the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EmptyKey;

impl std::fmt::Display for EmptyKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key has at least one byte")
    }
}

impl Namespace {
    /// The namespace `prefix` inside this one.
    pub(crate) fn nested(&self, prefix: &Bytes) -> Self {
        Self(self.join(prefix))
    }

    fn join(&self, rest: &Bytes) -> Bytes {
        if self.0.is_empty() {
            return rest.clone();
        }
        if rest.is_empty() {
            return self.0.clone();
        }
        let mut joined = BytesMut::with_capacity(self.0.len() + rest.len());
        joined.extend_from_slice(&self.0);
        joined.extend_from_slice(rest);
        joined.freeze()
    }

    fn is_whole_store(&self) -> bool {
        self.0.is_empty()
    }

    /// The key as the store knows it.
    pub(crate) fn enter_key(&self, key: &mut Bytes) -> Result<(), EmptyKey> {
        if self.is_whole_store() {
            // The server says what is wrong with an empty key.
            return Ok(());
        }
        if key.is_empty() {
            return Err(EmptyKey);
        }
        *key = self.join(key);
        Ok(())
    }

    /// The interval as the store knows it; what was open ends with the namespace.
    pub(crate) fn enter_range(&self, range: &mut v1::KeyRange) {
        if self.is_whole_store() {
            return;
        }
        range.end = if range.end.is_empty() { KeyRange::prefix(&self.0).end } else { self.join(&range.end) };
        // The prefix itself is no key of the namespace: the first one that can be is the next.
        let start = if range.start.is_empty() { Bytes::from_static(&[0]) } else { range.start.clone() };
        range.start = self.join(&start);
    }

    /// The key as the client's user knows it; `None` if it lies outside.
    pub(crate) fn inside(&self, key: &Bytes) -> Option<Bytes> {
        let inside = self.is_whole_store() || (key.len() > self.0.len() && key.starts_with(&self.0));
        inside.then(|| key.slice(self.0.len()..))
    }

    /// Turns a key of an answer into what the client's user knows. One from outside stays: only a server that answers
    /// more than it was asked for sends it.
    pub(crate) fn leave_key(&self, key: &mut Bytes) {
        if let Some(inside) = self.inside(key) {
            *key = inside;
        }
    }

    /// Does so for keys with values.
    pub(crate) fn leave_kvs<'a>(&self, kvs: impl IntoIterator<Item = &'a mut v1::KeyValue>) {
        for kv in kvs {
            self.leave_key(&mut kv.key);
        }
    }
}

/// A request, whose keys enter a namespace.
pub(crate) trait Enter {
    /// Maps all keys and intervals of the request.
    fn enter(&mut self, _: &Namespace) -> Result<(), EmptyKey> {
        Ok(())
    }
}

/// An answer, whose keys leave a namespace.
pub(crate) trait Leave {
    /// Maps all keys of the answer.
    fn leave(&mut self, _: &Namespace) {}
}

macro_rules! without_keys {
    ($trait:ident: $($message:ident),* $(,)?) => { $(impl $trait for v1::$message {})* };
}

without_keys!(Enter:
    MembersRequest, StatusRequest, LeaseGrantRequest, LeaseRevokeRequest, LeaseRenewRequest, LeaseTimeToLiveRequest,
    LeaseListRequest, SessionRegisterRequest, SessionRenewRequest, SessionCloseRequest, CompactRequest,
    ChangeMemberRequest, TransferLeadershipRequest,
);
without_keys!(Leave:
    MembersResponse, StatusResponse, LeaseGrantResponse, LeaseRevokeResponse, LeaseRenewResponse, LeaseListResponse,
    SessionRegisterResponse, SessionRenewResponse, SessionCloseResponse, CompactResponse,
    ChangeMemberResponse, TransferLeadershipResponse,
);

macro_rules! with_one_key {
    ($($message:ident),*) => {$(
        impl Enter for v1::$message {
            fn enter(&mut self, namespace: &Namespace) -> Result<(), EmptyKey> {
                namespace.enter_key(&mut self.key)
            }
        }
    )*};
}

with_one_key!(PutRequest, GetRequest, DeleteRequest, CompareAndSwapRequest, Compare);

impl Enter for v1::GetManyRequest {
    fn enter(&mut self, namespace: &Namespace) -> Result<(), EmptyKey> {
        self.keys.iter_mut().try_for_each(|key| namespace.enter_key(key))
    }
}

macro_rules! with_an_interval {
    ($($message:ident),*) => {$(
        impl Enter for v1::$message {
            fn enter(&mut self, namespace: &Namespace) -> Result<(), EmptyKey> {
                namespace.enter_range(self.range.get_or_insert_default());
                Ok(())
            }
        }
    )*};
}

with_an_interval!(RangeRequest, DeleteRangeRequest, WatchCreate);

impl Enter for v1::TxnRequest {
    fn enter(&mut self, namespace: &Namespace) -> Result<(), EmptyKey> {
        use txn_operation::Operation;
        self.compare.iter_mut().try_for_each(|compare| compare.enter(namespace))?;
        let operations = self.then.iter_mut().chain(&mut self.otherwise);
        operations.filter_map(|operation| operation.operation.as_mut()).try_for_each(|operation| match operation {
            Operation::Put(put) => put.enter(namespace),
            Operation::Get(get) => get.enter(namespace),
            Operation::Range(range) => range.enter(namespace),
            Operation::Delete(delete) => delete.enter(namespace),
            Operation::DeleteRange(delete) => delete.enter(namespace),
            Operation::Txn(txn) => txn.enter(namespace),
        })
    }
}

macro_rules! with_kvs {
    ($($message:ident . $field:ident),*) => {$(
        impl Leave for v1::$message {
            fn leave(&mut self, namespace: &Namespace) {
                namespace.leave_kvs(&mut self.$field);
            }
        }
    )*};
}

with_kvs!(
    PutResponse.previous,
    GetResponse.kv,
    GetManyResponse.kvs,
    DeleteResponse.previous,
    DeleteRangeResponse.previous,
    CompareAndSwapResponse.current
);

impl Leave for v1::RangeResponse {
    fn leave(&mut self, namespace: &Namespace) {
        namespace.leave_kvs(&mut self.kvs);
        namespace.leave_key(&mut self.next);
    }
}

impl Leave for v1::TxnResponse {
    fn leave(&mut self, namespace: &Namespace) {
        use txn_result::Result as Answer;
        for answer in self.results.iter_mut().filter_map(|result| result.result.as_mut()) {
            match answer {
                Answer::Put(put) => put.leave(namespace),
                Answer::Get(get) => get.leave(namespace),
                Answer::Range(range) => range.leave(namespace),
                Answer::Delete(delete) => delete.leave(namespace),
                Answer::DeleteRange(delete) => delete.leave(namespace),
                Answer::Txn(txn) => txn.leave(namespace),
            }
        }
    }
}

impl Leave for v1::WatchEvent {
    fn leave(&mut self, namespace: &Namespace) {
        namespace.leave_kvs(self.kv.iter_mut().chain(&mut self.previous));
    }
}

impl Leave for v1::LeaseTimeToLiveResponse {
    /// A lease may have keys anywhere; only those of the namespace are shown.
    fn leave(&mut self, namespace: &Namespace) {
        self.keys = self.keys.iter().filter_map(|key| namespace.inside(key)).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(prefix: &[u8]) -> Namespace {
        Namespace::default().nested(&Bytes::copy_from_slice(prefix))
    }

    fn contains(range: &v1::KeyRange, key: &[u8]) -> bool {
        key >= &range.start[..] && (range.end.is_empty() || key < &range.end[..])
    }

    #[test]
    fn an_interval_inside_holds_exactly_the_keys_that_are_inside_it() {
        let seed = 5;
        let mut rng = fastrand::Rng::with_seed(seed);
        let alphabet = [0u8, 1, b'a', 0xfe, 0xff];
        let mut word = |longest| -> Bytes {
            let length = rng.usize(0..=longest);
            (0..length).map(|_| alphabet[rng.usize(0..alphabet.len())]).collect()
        };
        for _ in 0..50_000 {
            let (prefix, start, end, key) = (word(2), word(2), word(2), word(5));
            let namespace = namespace(&prefix);
            let inside = v1::KeyRange { start, end };
            let mut outside = inside.clone();
            namespace.enter_range(&mut outside);
            let expected = namespace.inside(&key).is_some_and(|key| contains(&inside, &key));
            // The store has no key without a byte.
            let found = !key.is_empty() && contains(&outside, &key);
            assert_eq!(found, expected && !key.is_empty(), "seed {seed}: {prefix:?} {inside:?} {key:?}");
        }
    }

    #[test]
    fn namespaces_nest_and_the_whole_store_changes_nothing() {
        let nested = namespace(b"a/").nested(&Bytes::from_static(b"b/"));
        assert_eq!(nested, namespace(b"a/b/"));
        let mut key = Bytes::from_static(b"k");
        nested.enter_key(&mut key).unwrap();
        assert_eq!(key, "a/b/k");
        nested.leave_key(&mut key);
        assert_eq!(key, "k");
        assert_eq!(nested.inside(&Bytes::from_static(b"a/b/")), None, "the prefix is no key of the namespace");
        assert_eq!(nested.enter_key(&mut Bytes::new()), Err(EmptyKey));
        let mut whole = v1::KeyRange::default();
        Namespace::default().enter_range(&mut whole);
        assert_eq!(whole, v1::KeyRange::default());
    }

    #[test]
    fn every_key_of_a_transaction_enters_and_every_key_of_its_answer_leaves() {
        use txn_operation::Operation;
        use txn_result::Result as Answer;
        let key = || Bytes::from_static(b"k");
        let kv = || v1::KeyValue { key: Bytes::from_static(b"ns/k"), ..Default::default() };
        let range = || Some(v1::KeyRange { start: key(), end: Bytes::new() });
        let operations = |nested: v1::TxnRequest| {
            [
                Operation::Put(v1::PutRequest { key: key(), ..Default::default() }),
                Operation::Get(v1::GetRequest { key: key(), ..Default::default() }),
                Operation::Range(v1::RangeRequest { range: range(), ..Default::default() }),
                Operation::Delete(v1::DeleteRequest { key: key(), ..Default::default() }),
                Operation::DeleteRange(v1::DeleteRangeRequest { range: range(), ..Default::default() }),
                Operation::Txn(nested),
            ]
            .map(|operation| v1::TxnOperation { operation: Some(operation) })
            .to_vec()
        };
        let compare = vec![v1::Compare { key: key(), ..Default::default() }];
        let inner =
            v1::TxnRequest { compare: compare.clone(), then: operations(Default::default()), ..Default::default() };
        let otherwise = operations(Default::default());
        let mut request = v1::TxnRequest { compare, then: operations(inner), otherwise, ..Default::default() };
        request.enter(&namespace(b"ns/")).unwrap();
        let text = format!("{request:?}");
        assert_eq!(text.matches("b\"ns/k\"").count(), 2 + 3 * 5, "{text}");
        assert_eq!(text.matches("end: b\"ns0\"").count(), 3 * 2, "{text}");
        assert!(!text.contains("b\"k\""), "{text}");

        let results = |nested: v1::TxnResponse| {
            [
                Answer::Put(v1::PutResponse { previous: Some(kv()), ..Default::default() }),
                Answer::Get(v1::GetResponse { kv: Some(kv()), ..Default::default() }),
                Answer::Range(v1::RangeResponse { kvs: vec![kv()], next: kv().key, ..Default::default() }),
                Answer::Delete(v1::DeleteResponse { previous: Some(kv()), ..Default::default() }),
                Answer::DeleteRange(v1::DeleteRangeResponse { previous: vec![kv()], ..Default::default() }),
                Answer::Txn(nested),
            ]
            .map(|result| v1::TxnResult { result: Some(result) })
            .to_vec()
        };
        let inner = v1::TxnResponse { results: results(Default::default()), ..Default::default() };
        let mut answer = v1::TxnResponse { results: results(inner), ..Default::default() };
        answer.leave(&namespace(b"ns/"));
        let text = format!("{answer:?}");
        assert!(!text.contains("ns/"), "{text}");
        assert_eq!(text.matches("b\"k\"").count(), 2 * 6, "{text}");
    }

    #[test]
    fn keys_of_a_lease_are_shown_if_they_are_inside() {
        let keys = ["a", "ns/", "ns/1", "ns/2", "nt"].map(|key| Bytes::from_static(key.as_bytes())).to_vec();
        let mut answer = v1::LeaseTimeToLiveResponse { keys, key_count: 5, ..Default::default() };
        answer.leave(&namespace(b"ns/"));
        assert_eq!(answer.keys, ["1", "2"]);
    }
}
