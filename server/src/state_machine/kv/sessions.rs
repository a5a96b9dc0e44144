//! Sessions of clients, and the answers they may ask for again (Raft dissertation, section 6.3). What a call does is not
//! known here, only that it is done once.

use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use d_engine_proto::{SessionId, limits, v1};
use imbl::{OrdMap, OrdSet};
use prost::Message;

use super::command::Call;
use super::error::KvError;
use super::invariants::Violation;
use crate::state_machine::StoreTime;
use crate::storage::versions::{Record, RecordKey, RecordValue};

/// All sessions, at most `sessions_max`. As [`Keys`](super::keys::Keys): a copy costs nothing.
#[derive(Clone, Default)]
pub(super) struct Sessions {
    by_id: OrdMap<SessionId, Arc<Session>>,
    /// The deadline of every session.
    deadlines: OrdSet<(StoreTime, SessionId)>,
    /// Those that the entry being applied changes; none between two entries.
    touched: OrdSet<SessionId>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Session {
    ttl_ms: u64,
    deadline: StoreTime,
    /// The greatest that any call has told. No answer up to it is kept.
    acknowledged_through: u64,
    /// By sequence, within the window above `acknowledged_through`.
    answers: OrdMap<u64, Answer>,
    /// Of all answers, at most `session_answers_bytes_max`.
    answer_bytes: u64,
}

/// What a call was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    payload_hash: u64,
    /// The encoded `CommandReply`; empty: it was too large to be kept.
    reply: Bytes,
}

impl Sessions {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// The session that is due next, with its deadline.
    pub(super) fn next_due(&self) -> Option<(StoreTime, SessionId)> {
        self.deadlines.get_min().copied()
    }

    /// Opens a session under an id that is free.
    pub(super) fn open(&mut self, id: SessionId, ttl_ms: u64, now: StoreTime) -> Result<(), KvError> {
        if self.by_id.len() as u64 >= limits::SESSIONS_MAX {
            return Err(KvError::TooManySessions);
        }
        let deadline = now.after_ms(ttl_ms);
        self.by_id.insert(id, Arc::new(Session { ttl_ms, deadline, ..Session::default() }));
        self.deadlines.insert((deadline, id));
        self.touched.insert(id);
        Ok(())
    }

    /// Prolongs a session by its time to live, and returns that.
    pub(super) fn renew(&mut self, id: SessionId, now: StoreTime) -> Result<u64, KvError> {
        self.prolonged(id, now).map(|session| session.ttl_ms)
    }

    /// Ends a session, if there is one.
    pub(super) fn close(&mut self, id: SessionId) {
        if let Some(session) = self.by_id.remove(&id) {
            self.deadlines.remove(&(session.deadline, id));
            self.touched.insert(id);
        }
    }

    /// Takes a call in. Its answer, if it was applied before; `None` if it is to be applied now, after which
    /// [`keep`](Self::keep) takes its answer.
    pub(super) fn admit(&mut self, call: &Call, now: StoreTime) -> Result<Option<Bytes>, KvError> {
        let session = self.prolonged(call.session, now)?;
        session.acknowledge(call.acknowledged_through);
        session.recall(call)
    }

    /// Keeps the answer of a call that was admitted.
    pub(super) fn keep(&mut self, call: &Call, answer: &Bytes) {
        if let Some(session) = self.by_id.get_mut(&call.session) {
            Arc::make_mut(session).keep(call, answer);
        }
    }

    fn prolonged(&mut self, id: SessionId, now: StoreTime) -> Result<&mut Session, KvError> {
        let session = self.by_id.get_mut(&id).ok_or(KvError::SessionExpired { session: id })?;
        let session = Arc::make_mut(session);
        let deadline = now.after_ms(session.ttl_ms);
        if session.deadline != deadline {
            self.deadlines.remove(&(session.deadline, id));
            self.deadlines.insert((deadline, id));
            session.deadline = deadline;
        }
        self.touched.insert(id);
        Ok(session)
    }

    /// The records that the entry changed, in the order of ids. The next entry begins.
    pub(super) fn take_records(&mut self) -> impl Iterator<Item = Record> + use<'_> {
        std::mem::take(&mut self.touched).into_iter().map(|id| {
            let value = self.by_id.get(&id).map(|session| Arc::clone(session) as Arc<dyn RecordValue>);
            Record { key: RecordKey::Session(id), value }
        })
    }

    /// Every session as it is recorded, in the order of ids.
    pub(super) fn records(&self) -> impl Iterator<Item = (SessionId, Vec<u8>)> + '_ {
        self.by_id.iter().map(|(id, session)| (*id, session.encode()))
    }

    /// Takes a session over as it was recorded.
    pub(super) fn restore(&mut self, id: SessionId, record: &Bytes) -> Result<(), Violation> {
        let stored = v1::StoredSession::decode(record.clone())
            .map_err(|error| Violation::Record { key: RecordKey::Session(id), message: error.to_string() })?;
        let session = Session::restore(stored);
        self.deadlines.insert((session.deadline, id));
        self.by_id.insert(id, Arc::new(session));
        Ok(())
    }

    /// Checks what must hold between any two entries; `last` is the last id given.
    pub(super) fn validate(&self, now: StoreTime, last: SessionId) -> Result<(), Violation> {
        for (id, session) in &self.by_id {
            let violation = |rule| Err(Violation::Record { key: RecordKey::Session(*id), message: String::from(rule) });
            if *id == SessionId(0) || *id > last {
                return violation("its id was given");
            }
            if session.deadline > now.after_ms(session.ttl_ms) || !self.deadlines.contains(&(session.deadline, *id)) {
                return violation("it is due when its deadline says, within its time to live");
            }
            let first = session.answers.get_min().map(|(sequence, _)| *sequence);
            let last = session.answers.get_max().map(|(sequence, _)| *sequence);
            if first.is_some_and(|first| first <= session.acknowledged_through)
                || last.is_some_and(|last| last > session.window_end())
            {
                return violation("answers are kept within the window above the acknowledged sequence");
            }
            let bytes: Vec<_> = session.answers.values().map(|answer| answer.reply.len() as u64).collect();
            if session.answer_bytes != bytes.iter().sum::<u64>()
                || session.answer_bytes > limits::SESSION_ANSWERS_BYTES_MAX
                || bytes.iter().any(|bytes| *bytes > limits::SESSION_ANSWER_BYTES_MAX)
            {
                return violation("the bytes of its answers are counted and bounded");
            }
        }
        let too_many = self.by_id.len() as u64 > limits::SESSIONS_MAX;
        if too_many || self.deadlines.len() != self.by_id.len() || !self.touched.is_empty() {
            return Err(Violation::SessionMissing);
        }
        Ok(())
    }
}

impl Session {
    /// Forgets the answers up to `through`.
    fn acknowledge(&mut self, through: u64) {
        if through <= self.acknowledged_through {
            return;
        }
        self.acknowledged_through = through;
        let covered: Vec<_> =
            self.answers.range((Bound::Unbounded, Bound::Included(through))).map(|(sequence, _)| *sequence).collect();
        for sequence in covered {
            if let Some(answer) = self.answers.remove(&sequence) {
                self.answer_bytes -= answer.reply.len() as u64;
            }
        }
    }

    /// The answer that a call was given, `None` if it was never applied.
    fn recall(&self, call: &Call) -> Result<Option<Bytes>, KvError> {
        let sequence = call.sequence;
        if sequence <= self.acknowledged_through {
            return Err(KvError::AlreadyAcknowledged { sequence, acknowledged_through: self.acknowledged_through });
        }
        match self.answers.get(&sequence) {
            Some(answer) if answer.payload_hash != call.payload_hash => Err(KvError::SequenceReused { sequence }),
            Some(answer) if answer.reply.is_empty() => Err(KvError::AnswerNotKept { sequence }),
            Some(answer) => Ok(Some(answer.reply.clone())),
            None if sequence > self.window_end() => {
                Err(KvError::BeyondWindow { sequence, acknowledged_through: self.acknowledged_through })
            }
            // Whatever this call is answered must fit too.
            None if self.answer_bytes + limits::SESSION_ANSWER_BYTES_MAX > limits::SESSION_ANSWERS_BYTES_MAX => {
                Err(KvError::TooManyAnswers)
            }
            None => Ok(None),
        }
    }

    fn keep(&mut self, call: &Call, answer: &Bytes) {
        let fits = answer.len() as u64 <= limits::SESSION_ANSWER_BYTES_MAX;
        // A copy: the slice would keep the answers of the whole entry in memory.
        let reply = if fits { Bytes::copy_from_slice(answer) } else { Bytes::new() };
        self.answer_bytes += reply.len() as u64;
        self.answers.insert(call.sequence, Answer { payload_hash: call.payload_hash, reply });
    }

    /// The last sequence that may be used.
    fn window_end(&self) -> u64 {
        self.acknowledged_through.saturating_add(limits::SESSION_WINDOW_CALLS)
    }

    fn restore(stored: v1::StoredSession) -> Self {
        let v1::StoredSession { ttl_ms, deadline_ns, acknowledged_through, answers } = stored;
        let deadline = StoreTime::from_nanos(deadline_ns);
        let mut session = Self { ttl_ms, deadline, acknowledged_through, ..Self::default() };
        for v1::StoredAnswer { sequence, payload_hash, reply } in answers {
            session.answer_bytes += reply.len() as u64;
            // A copy: the slice would keep the whole record in memory.
            let reply = Bytes::copy_from_slice(&reply);
            session.answers.insert(sequence, Answer { payload_hash, reply });
        }
        session
    }
}

impl RecordValue for Session {
    fn encode(&self) -> Vec<u8> {
        let answer = |(sequence, answer): (&u64, &Answer)| v1::StoredAnswer {
            sequence: *sequence,
            payload_hash: answer.payload_hash,
            reply: answer.reply.clone(),
        };
        let stored = v1::StoredSession {
            ttl_ms: self.ttl_ms,
            deadline_ns: self.deadline.as_nanos(),
            acknowledged_through: self.acknowledged_through,
            answers: self.answers.iter().map(answer).collect(),
        };
        stored.encode_to_vec()
    }
}
