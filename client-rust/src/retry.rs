//! Whether a failed attempt may be repeated, where, and how soon. Pure: no clock, no randomness of its own.
//!
//! The rule that matters: a write is repeated only if it was certainly not applied, or if applying it again changes
//! nothing, which a session ensures.

use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{DetailedStatus, ErrorCode, RetryWhere, defaults, v1};
use tokio::time::Instant;

use crate::cluster::Leader;
use crate::error::{Error, ErrorKind, Outcome};

/// How one attempt failed, told by what is certain about the request.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// Not a byte of the request's message left this process, nor will one.
    NotSent(Cause),
    /// Sent, at least in part; the connection broke or gave something that is no answer of ours.
    Lost(Cause),
    /// No answer within the time of the attempt.
    Silent {
        /// Whether anything of the request may have been sent.
        sent: bool,
        /// How long that was.
        after: Duration,
    },
    /// A d-engine server answered with an error.
    Refused(Box<DetailedStatus>),
    /// A node of another cluster or restore epoch answered, so whatever it says is not for us.
    Foreign(String),
    /// The client was closed meanwhile.
    Closed {
        /// Whether anything of the request may have been sent.
        sent: bool,
    },
    /// The caller cancelled the call, and no node said in time what became of it.
    Cancelled {
        /// Whether anything of the request may have been sent.
        sent: bool,
    },
}

/// Why a connection or an exchange failed.
#[derive(Clone, Debug)]
pub(crate) struct Cause {
    pub(crate) message: String,
    pub(crate) source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Cause {
    pub(crate) fn text(message: impl Into<String>) -> Self {
        Self { message: message.into(), source: None }
    }

    /// The cause behind a status that no d-engine server wrote.
    pub(crate) fn of_status(status: tonic::Status) -> Self {
        if status.source().is_some() { Self::of(status) } else { Self::text(status.message()) }
    }

    /// Takes the text of the innermost source: the outer layers only say "transport error".
    pub(crate) fn of(error: impl StdError + Send + Sync + 'static) -> Self {
        let mut innermost: &dyn StdError = &error;
        while let Some(source) = innermost.source() {
            innermost = source;
        }
        let message = innermost.to_string();
        Self { message, source: Some(Arc::new(error)) }
    }
}

/// Under which condition a request may be sent once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resend {
    /// It changes nothing, so always.
    Idempotent,
    /// It changes the store, but no more by being applied again: under a session, or by its nature. So always, and what
    /// became of it is told as of a write.
    Repeatable,
    /// It changes the store, so only if it was certainly not applied.
    IfNotApplied,
}

/// What to do after a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Report the failure.
    GiveUp,
    /// Send it again.
    Retry {
        /// Prefer a node that was not asked yet.
        elsewhere: bool,
        /// Wait at least this long, as the server suggests.
        at_least: Duration,
    },
}

const ELSEWHERE: Decision = Decision::Retry { elsewhere: true, at_least: Duration::ZERO };

/// Decides over a failed attempt.
pub(crate) fn decide(failure: &Failure, resend: Resend) -> Decision {
    let repeatable = resend != Resend::IfNotApplied;
    match failure {
        Failure::NotSent(_) | Failure::Silent { sent: false, .. } => ELSEWHERE,
        Failure::Lost(_) | Failure::Silent { .. } if repeatable => ELSEWHERE,
        Failure::Lost(_)
        | Failure::Silent { .. }
        | Failure::Foreign(_)
        | Failure::Closed { .. }
        | Failure::Cancelled { .. } => Decision::GiveUp,
        Failure::Refused(status) => decide_refusal(status, resend),
    }
}

fn decide_refusal(status: &DetailedStatus, resend: Resend) -> Decision {
    let Some(code) = status.code() else { return Decision::GiveUp };
    let at_least = Duration::from_millis(status.detail.backoff_ms);
    let elsewhere = Decision::Retry { elsewhere: true, at_least };
    let repeatable = resend != Resend::IfNotApplied;
    let safe = repeatable || status.detail.retry_safe || status.outcome() == v1::Outcome::NotApplied;
    match code.retry() {
        RetryWhere::Leader if safe => elsewhere,
        // An attempt that can be repeated has only a part of the call's time, so its end is not the call's.
        RetryWhere::Here if repeatable && code == ErrorCode::DeadlineExceeded => elsewhere,
        // A limit that may be lifted comes with a suggestion when; another one is the request's own fault.
        RetryWhere::Here if safe && !at_least.is_zero() => {
            Decision::Retry { elsewhere: resend == Resend::Idempotent, at_least }
        }
        // The next leader knows what became of it, or applies it now.
        _ if resend == Resend::Repeatable && leaves_open(code, status.outcome()) => elsewhere,
        _ => Decision::GiveUp,
    }
}

/// Whether a copy of the call could still tell what became of a write that was refused like this.
fn leaves_open(code: ErrorCode, outcome: v1::Outcome) -> bool {
    match code {
        // They say that nobody can.
        ErrorCode::AlreadyAcknowledged | ErrorCode::SessionExpired | ErrorCode::WrongCluster => false,
        _ => matches!(outcome, v1::Outcome::Unknown | v1::Outcome::Unspecified),
    }
}

impl Failure {
    /// What became of the request. A read has no effect, so it was never applied.
    pub(crate) fn outcome(&self, resend: Resend) -> Outcome {
        match self {
            _ if resend == Resend::Idempotent => Outcome::NotApplied,
            Self::NotSent(_)
            | Self::Silent { sent: false, .. }
            | Self::Closed { sent: false }
            | Self::Cancelled { sent: false } => Outcome::NotApplied,
            // Also when foreign: it may have been applied, there.
            Self::Lost(_) | Self::Silent { .. } | Self::Foreign(_) | Self::Closed { .. } | Self::Cancelled { .. } => {
                Outcome::Unknown
            }
            Self::Refused(status) => status.outcome().into(),
        }
    }

    /// What a caller acts on.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::NotSent(_) | Self::Lost(_) => ErrorKind::Unavailable,
            Self::Silent { .. } => ErrorKind::DeadlineExceeded,
            Self::Refused(status) => status.code().into(),
            Self::Foreign(_) => ErrorKind::WrongCluster,
            Self::Closed { .. } => ErrorKind::Closed,
            Self::Cancelled { .. } => ErrorKind::Cancelled,
        }
    }

    /// The code of a server that refused.
    pub(crate) fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(status) => status.code(),
            _ => None,
        }
    }

    /// The cause, for people.
    pub(crate) fn message(&self) -> &str {
        match self {
            Self::NotSent(cause) | Self::Lost(cause) => &cause.message,
            Self::Silent { sent: true, .. } => "no answer in time",
            Self::Silent { sent: false, .. } => "it could not be sent in time",
            Self::Refused(status) => &status.message,
            Self::Foreign(message) => message,
            Self::Closed { .. } => "the client was closed",
            Self::Cancelled { .. } => "the call was cancelled",
        }
    }

    /// The error a caller sees.
    pub(crate) fn into_error(self, operation: &'static str, resend: Resend, endpoint: &str) -> Error {
        let error = Error::new(operation, self.kind(), self.outcome(resend), self.message()).at(endpoint);
        match self {
            Self::NotSent(cause) | Self::Lost(cause) => error.with_source(cause.source),
            Self::Refused(status) => {
                error.with_leader(status.detail.leader.map(Leader::from)).with_revision(status.detail.revision)
            }
            Self::Silent { .. } | Self::Foreign(_) | Self::Closed { .. } | Self::Cancelled { .. } => error,
        }
    }
}

/// A delay with full jitter: uniform between nothing and a bound that doubles with each retry.
pub(crate) fn backoff(retries: u32, rng: &mut fastrand::Rng) -> Duration {
    let factor = 1u64.checked_shl(retries.min(32)).unwrap_or(u64::MAX);
    let bound = defaults::CLIENT_BACKOFF_INITIAL_MS.saturating_mul(factor).min(defaults::CLIENT_BACKOFF_MAX_MS);
    Duration::from_micros(rng.u64(0..=bound * 1000))
}

/// Bounds retries to a share of the calls, so that clients never multiply the load of a cluster in trouble.
///
/// A bucket of tokens: a call adds a part of one, time adds a trickle so that it never stays empty, a retry takes one.
#[derive(Debug)]
pub(crate) struct Budget {
    /// Invariant: 0.0 <= tokens <= `CAPACITY`.
    tokens: f64,
    refilled: Instant,
    /// Calls that were counted.
    calls: u64,
}

impl Budget {
    /// Enough for a thousand callers to be turned away once by a leader that is gone.
    const CAPACITY: f64 = 1000.0;
    const PER_CALL: f64 = 0.2;
    const PER_SECOND: f64 = 10.0;

    pub(crate) fn new(now: Instant) -> Self {
        Self { tokens: Self::CAPACITY, refilled: now, calls: 0 }
    }

    /// Whether a retry could be made; `calls` were begun until now.
    #[expect(clippy::cast_precision_loss, reason = "few calls come between two looks")]
    pub(crate) fn affords_one(&mut self, now: Instant, calls: u64) -> bool {
        let trickle = now.saturating_duration_since(self.refilled).as_secs_f64() * Self::PER_SECOND;
        let share = calls.saturating_sub(self.calls) as f64 * Self::PER_CALL;
        self.refilled = now;
        self.calls = self.calls.max(calls);
        self.tokens = (self.tokens + trickle + share).min(Self::CAPACITY);
        self.tokens >= 1.0
    }

    /// Takes the token of one retry; false if there is none.
    pub(crate) fn withdraw(&mut self, now: Instant, calls: u64) -> bool {
        let granted = self.affords_one(now, calls);
        if granted {
            self.tokens -= 1.0;
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: ErrorCode, outcome: v1::Outcome, retry_safe: bool, backoff_ms: u64) -> Failure {
        let detail = v1::ErrorDetail {
            code: code.number(),
            outcome: outcome as i32,
            retry_safe,
            backoff_ms,
            ..v1::ErrorDetail::default()
        };
        Failure::Refused(Box::new(DetailedStatus { message: code.meaning().to_owned(), detail }))
    }

    fn here(backoff_ms: u64, elsewhere: bool) -> Decision {
        Decision::Retry { elsewhere, at_least: Duration::from_millis(backoff_ms) }
    }

    #[test]
    fn decisions_by_failure_and_idempotence() {
        use ErrorCode as Code;
        use v1::Outcome::{Applied, NotApplied, Unknown};
        let cause = || Cause::text("broken");
        let silent = |sent| Failure::Silent { sent, after: Duration::ZERO };
        let stop = Decision::GiveUp;
        #[rustfmt::skip]
        let table = [
            // failure                                                  write              under a session    read
            (Failure::NotSent(cause()),                                 ELSEWHERE,         ELSEWHERE,         ELSEWHERE),
            (Failure::Lost(cause()),                                    stop,              ELSEWHERE,         ELSEWHERE),
            (silent(true),                                              stop,              ELSEWHERE,         ELSEWHERE),
            (silent(false),                                             ELSEWHERE,         ELSEWHERE,         ELSEWHERE),
            (Failure::Foreign(String::new()),                           stop,              stop,              stop),
            (Failure::Closed { sent: false },                           stop,              stop,              stop),
            (Failure::Closed { sent: true },                            stop,              stop,              stop),
            (Failure::Cancelled { sent: false },                        stop,              stop,              stop),
            (Failure::Cancelled { sent: true },                         stop,              stop,              stop),
            (refused(Code::NotLeader, NotApplied, true, 0),             ELSEWHERE,         ELSEWHERE,         ELSEWHERE),
            (refused(Code::NotLeader, NotApplied, false, 0),            ELSEWHERE,         ELSEWHERE,         ELSEWHERE),
            (refused(Code::Unavailable, NotApplied, true, 0),           ELSEWHERE,         ELSEWHERE,         ELSEWHERE),
            (refused(Code::Unavailable, Unknown, false, 0),             stop,              ELSEWHERE,         ELSEWHERE),
            (refused(Code::Unavailable, Unknown, true, 0),              ELSEWHERE,         ELSEWHERE,         ELSEWHERE),
            (refused(Code::Unavailable, Applied, false, 0),             stop,              ELSEWHERE,         ELSEWHERE),
            (refused(Code::DeadlineExceeded, Unknown, false, 0),        stop,              ELSEWHERE,         ELSEWHERE),
            (refused(Code::DeadlineExceeded, NotApplied, true, 0),      stop,              ELSEWHERE,         ELSEWHERE),
            (refused(Code::ResourceExhausted, NotApplied, true, 50),    here(50, false),  here(50, false),  here(50, true)),
            (refused(Code::ResourceExhausted, NotApplied, true, 0),     stop,              stop,              stop),
            (refused(Code::LeadershipLost, Unknown, false, 0),          stop,              ELSEWHERE,         stop),
            (refused(Code::Behind, NotApplied, true, 0),                ELSEWHERE,         ELSEWHERE,         ELSEWHERE),
            (refused(Code::InvalidArgument, NotApplied, true, 0),       stop,              stop,              stop),
            (refused(Code::Compacted, NotApplied, true, 0),             stop,              stop,              stop),
            (refused(Code::WrongCluster, NotApplied, true, 0),          stop,              stop,              stop),
            (refused(Code::WrongCluster, Unknown, false, 0),            stop,              stop,              stop),
            (refused(Code::Internal, Unknown, false, 0),                stop,              ELSEWHERE,         stop),
            (refused(Code::Internal, Applied, false, 0),                stop,              stop,              stop),
            (refused(Code::LeaseNotFound, NotApplied, false, 0),        stop,              stop,              stop),
            (refused(Code::LeaseExists, NotApplied, false, 0),          stop,              stop,              stop),
            (refused(Code::SessionExpired, NotApplied, false, 0),       stop,              stop,              stop),
            (refused(Code::SessionExpired, Unknown, false, 0),          stop,              stop,              stop),
            (refused(Code::AlreadyAcknowledged, Unknown, false, 0),     stop,              stop,              stop),
            (refused(Code::AlreadyAcknowledged, Applied, false, 0),     stop,              stop,              stop),
        ];
        for (failure, write, under_session, read) in table {
            assert_eq!(decide(&failure, Resend::IfNotApplied), write, "write after {failure:?}");
            assert_eq!(decide(&failure, Resend::Repeatable), under_session, "under a session after {failure:?}");
            assert_eq!(decide(&failure, Resend::Idempotent), read, "read after {failure:?}");
        }
    }

    #[test]
    fn a_write_is_resent_only_when_its_outcome_is_not_applied_or_the_server_vouches_for_it() {
        for code in ErrorCode::ALL {
            for outcome in [v1::Outcome::Unspecified, v1::Outcome::Unknown, v1::Outcome::Applied] {
                let failure = refused(*code, outcome, false, 0);
                assert_eq!(decide(&failure, Resend::IfNotApplied), Decision::GiveUp, "{failure:?}");
            }
        }
    }

    #[test]
    fn an_error_code_of_a_newer_server_is_not_retried() {
        let detail = v1::ErrorDetail { code: 999, retry_safe: true, ..v1::ErrorDetail::default() };
        let failure = Failure::Refused(Box::new(DetailedStatus { message: String::new(), detail }));
        assert_eq!(decide(&failure, Resend::Idempotent), Decision::GiveUp);
        assert_eq!(failure.kind(), ErrorKind::Unrecognized);
    }

    #[test]
    fn the_backoff_of_the_server_is_a_lower_bound() {
        let failure = refused(ErrorCode::ResourceExhausted, v1::Outcome::NotApplied, true, 70);
        let at_least = Duration::from_millis(70);
        assert_eq!(decide(&failure, Resend::IfNotApplied), Decision::Retry { elsewhere: false, at_least });
    }

    #[test]
    fn outcomes_are_told_truthfully() {
        let lost = Failure::Lost(Cause::text("reset"));
        assert_eq!(lost.outcome(Resend::IfNotApplied), Outcome::Unknown);
        assert_eq!(lost.outcome(Resend::Repeatable), Outcome::Unknown);
        assert_eq!(lost.outcome(Resend::Idempotent), Outcome::NotApplied);
        assert_eq!(Failure::NotSent(Cause::text("refused")).outcome(Resend::IfNotApplied), Outcome::NotApplied);
        let unspecified = refused(ErrorCode::Internal, v1::Outcome::Unspecified, false, 0);
        assert_eq!(unspecified.outcome(Resend::IfNotApplied), Outcome::Unknown);
        let applied = refused(ErrorCode::Internal, v1::Outcome::Applied, false, 0);
        assert_eq!(applied.outcome(Resend::IfNotApplied), Outcome::Applied);
    }

    #[test]
    fn backoff_stays_within_its_doubling_bound() {
        let seed = 7;
        let mut rng = fastrand::Rng::with_seed(seed);
        for retries in [0, 1, 2, 5, 6, 31, 32, 64, u32::MAX] {
            let bound = 20u64.saturating_mul(1 << retries.min(20)).min(1000);
            let longest = (0..2000).map(|_| backoff(retries, &mut rng)).max().unwrap();
            assert!(longest <= Duration::from_millis(bound), "seed {seed}, {retries}: {longest:?} > {bound} ms");
            assert!(longest > Duration::from_millis(bound / 2), "seed {seed}, {retries}: {longest:?} is not spread");
        }
    }

    #[test]
    fn the_budget_bounds_retries_to_a_share_of_calls() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let mut granted = 0;
        for calls in 1..=10_000 {
            for _ in 0..5 {
                granted += u32::from(budget.withdraw(start, calls));
            }
        }
        assert!((2900..=3001).contains(&granted), "1000 at once and 2000 for 10 000 calls, not {granted}");
        let later = start + Duration::from_secs(1);
        let trickle = (0..100).filter(|_| budget.withdraw(later, 10_000)).count();
        assert!((10..=11).contains(&trickle), "{trickle}");
    }
}
