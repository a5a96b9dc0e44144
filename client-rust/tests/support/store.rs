//! What the nodes of a fake cluster have in common: keys, sessions and leases, as if they were replicated.

use std::collections::BTreeMap;

use bytes::Bytes;
use d_engine_proto::{DetailedStatus, ErrorCode, limits, v1};
use prost::Message;

use super::refusal;

/// The replicated state.
#[derive(Debug, Default)]
pub(crate) struct Store {
    pub(crate) keys: BTreeMap<Bytes, v1::KeyValue>,
    pub(crate) revision: u64,
    /// Every session that was registered; one that expired is gone.
    pub(crate) sessions: BTreeMap<u64, Session>,
    pub(crate) registered: u64,
    /// Time to live that is given to sessions.
    pub(crate) session_ttl_ms: u64,
    pub(crate) session_renewals: u32,
    /// Leases by id, with their time to live in milliseconds.
    pub(crate) leases: BTreeMap<u64, u64>,
    pub(crate) granted: u64,
    /// Copies of calls that were answered from a session.
    pub(crate) repeats: u32,
    /// Calls that carried a session, in the order of their arrival, copies included.
    pub(crate) calls: Vec<v1::SessionCall>,
}

#[derive(Debug, Default)]
pub(crate) struct Session {
    acknowledged_through: u64,
    /// By sequence: the request, and its encoded answer.
    answers: BTreeMap<u64, (Vec<u8>, Kept)>,
}

/// An encoded answer, or the refusal.
type Kept = Result<Vec<u8>, DetailedStatus>;

pub(crate) fn refused(code: ErrorCode) -> DetailedStatus {
    refusal(code, v1::Outcome::NotApplied, false)
}

impl Store {
    /// Applies a mutation as the real store does: once under a session, whenever it comes without one.
    pub(crate) fn mutate<R, A>(
        &mut self,
        mut request: R,
        session: impl Fn(&mut R) -> &mut Option<v1::SessionCall>,
        apply: impl FnOnce(&mut Self, R) -> Result<A, DetailedStatus>,
    ) -> Result<A, DetailedStatus>
    where
        R: Message + Default,
        A: Message + Default,
    {
        let Some(call) = session(&mut request).take() else { return apply(self, request) };
        self.calls.push(call);
        let bytes = request.encode_to_vec();
        let kept = self.sessions.get_mut(&call.session).ok_or_else(|| refused(ErrorCode::SessionExpired))?;
        kept.acknowledged_through = kept.acknowledged_through.max(call.acknowledged_through);
        let acknowledged = kept.acknowledged_through;
        kept.answers.retain(|sequence, _| *sequence > acknowledged);
        if call.sequence <= acknowledged {
            return Err(refusal(ErrorCode::AlreadyAcknowledged, v1::Outcome::Unknown, false));
        }
        if call.sequence > acknowledged + limits::SESSION_WINDOW_CALLS {
            return Err(refused(ErrorCode::ResourceExhausted));
        }
        if let Some((first, answer)) = kept.answers.get(&call.sequence) {
            if *first != bytes {
                return Err(refused(ErrorCode::InvalidArgument));
            }
            self.repeats += 1;
            return answer.clone().map(|answer| A::decode(&answer[..]).unwrap());
        }
        let answer = apply(self, request);
        let encoded = answer.as_ref().map(Message::encode_to_vec).map_err(Clone::clone);
        self.sessions.get_mut(&call.session).unwrap().answers.insert(call.sequence, (bytes, encoded));
        answer
    }

    pub(crate) fn put(&mut self, put: v1::PutRequest) -> Result<v1::PutResponse, DetailedStatus> {
        if put.lease != 0 && !self.leases.contains_key(&put.lease) {
            return Err(refused(ErrorCode::LeaseNotFound));
        }
        self.revision += 1;
        let previous = self.keys.get(&put.key).cloned();
        let kv = v1::KeyValue {
            key: put.key.clone(),
            value: put.value,
            create_revision: previous.as_ref().map_or(self.revision, |kv| kv.create_revision),
            mod_revision: self.revision,
            version: previous.as_ref().map_or(0, |kv| kv.version) + 1,
            lease: put.lease,
        };
        self.keys.insert(put.key, kv);
        let previous = previous.filter(|_| put.return_previous);
        Ok(v1::PutResponse { header: None, previous, lease: put.lease })
    }

    pub(crate) fn version(&self, key: &str) -> u64 {
        self.keys.get(key.as_bytes()).map_or(0, |kv| kv.version)
    }

    pub(crate) fn inside(&self, range: &v1::KeyRange) -> Vec<v1::KeyValue> {
        let inside = |key: &Bytes| *key >= range.start && (range.end.is_empty() || *key < range.end);
        self.keys.values().filter(|kv| inside(&kv.key)).cloned().collect()
    }

    pub(crate) fn keys_of(&self, lease: u64) -> Vec<Bytes> {
        self.keys.values().filter(|kv| kv.lease == lease).map(|kv| kv.key.clone()).collect()
    }
}
