//! What is right, written by hand from the rules, not from the code:
//!
//! - What was certainly not applied is sent again, if another node, or the same one later, may do it.
//! - What may have been applied is sent again only if that changes nothing: a read, or a write under a session. Without
//!   a session the caller is told at once that nobody knows.
//! - An answer that says that no repetition helps ends the call.
//! - No call outlives its deadline; one that runs out of time says what became of it.
//!
//! A cell reads: `ok`, or the kind of the error and the outcome; the attempts (`+`: or more, since finding the new leader
//! may take some); how often the write was applied.

use d_engine_proto::ErrorCode::{self, *};

type Line = (&'static str, &'static str, [&'static str; 3], [&'static str; 3]);

const SESSION: &str = "impossible: only a call under a session is told so";
const LEASE: &str = "impossible: a read has no lease";
const NO_READ: &str = "impossible: a read is never answered so: it changes nothing, so it was not applied";
const COMMITTED: &str = "impossible: a read commits nothing";
const DEAD: &str = "impossible: a leader that dies leads no more";
const UNASKED: &str = "impossible: a write asks for no revision";

/// Where and what; then for the leader of before, and if another one leads meanwhile: write, write under a session, read.
#[rustfmt::skip]
pub(crate) const TABLE: &[Line] = &[
    // Refused before it is applied.
    ("before-propose", "refuse InvalidArgument NotApplied",
        ["InvalidArgument NotApplied 1 never",    "InvalidArgument NotApplied 1 never",    "InvalidArgument NotApplied 1 never"],
        ["InvalidArgument NotApplied 1 never",    "InvalidArgument NotApplied 1 never",    "InvalidArgument NotApplied 1 never"]),
    ("before-propose", "refuse NotLeader NotApplied",
        ["ok 2+ once",                            "ok 2+ once",                            "ok 2 never"],
        ["ok 2+ once",                            "ok 2+ once",                            "ok 2 never"]),
    ("before-propose", "refuse Unavailable NotApplied",
        ["ok 2+ once",                            "ok 2+ once",                            "ok 2+ never"],
        ["ok 2+ once",                            "ok 2+ once",                            "ok 2+ never"]),
    ("before-propose", "refuse Unavailable Unknown",
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            NO_READ],
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            NO_READ]),
    // The deadline of a write without a session is the call's own.
    ("before-propose", "refuse DeadlineExceeded NotApplied",
        ["DeadlineExceeded NotApplied 1 never",   "ok 2+ once",                            "ok 2+ never"],
        ["DeadlineExceeded NotApplied 1 never",   "ok 2+ once",                            "ok 2+ never"]),
    ("before-propose", "refuse DeadlineExceeded Unknown",
        ["DeadlineExceeded Unknown 1 never",      "ok 2+ once",                            NO_READ],
        ["DeadlineExceeded Unknown 1 never",      "ok 2+ once",                            NO_READ]),
    ("before-propose", "refuse ResourceExhausted NotApplied",
        ["ok 2 once",                             "ok 2 once",                             "ok 2 never"],
        ["ok 2+ once",                            "ok 2+ once",                            "ok 2+ never"]),
    ("before-propose", "refuse Compacted NotApplied",
        [UNASKED,                                 UNASKED,                                 "Compacted NotApplied 1 never"],
        [UNASKED,                                 UNASKED,                                 "Compacted NotApplied 1 never"]),
    ("before-propose", "refuse FutureRevision NotApplied",
        [UNASKED,                                 UNASKED,                                 "FutureRevision NotApplied 1 never"],
        [UNASKED,                                 UNASKED,                                 "FutureRevision NotApplied 1 never"]),
    ("before-propose", "refuse Behind NotApplied",
        [UNASKED,                                 UNASKED,                                 "ok 2 never"],
        [UNASKED,                                 UNASKED,                                 "ok 2 never"]),
    ("before-propose", "refuse LeadershipLost Unknown",
        ["LeadershipLost Unknown 1 never",        "ok 2+ once",                            NO_READ],
        ["LeadershipLost Unknown 1 never",        "ok 2+ once",                            NO_READ]),
    ("before-propose", "refuse FailedPrecondition NotApplied",
        ["FailedPrecondition NotApplied 1 never", "FailedPrecondition NotApplied 1 never", "FailedPrecondition NotApplied 1 never"],
        ["FailedPrecondition NotApplied 1 never", "FailedPrecondition NotApplied 1 never", "FailedPrecondition NotApplied 1 never"]),
    ("before-propose", "refuse WrongCluster NotApplied",
        ["WrongCluster NotApplied 1 never",       "WrongCluster NotApplied 1 never",       "WrongCluster NotApplied 1 never"],
        ["WrongCluster NotApplied 1 never",       "WrongCluster NotApplied 1 never",       "WrongCluster NotApplied 1 never"]),
    ("before-propose", "refuse Unsupported NotApplied",
        ["Unsupported NotApplied 1 never",        "Unsupported NotApplied 1 never",        "Unsupported NotApplied 1 never"],
        ["Unsupported NotApplied 1 never",        "Unsupported NotApplied 1 never",        "Unsupported NotApplied 1 never"]),
    ("before-propose", "refuse Internal NotApplied",
        ["Internal NotApplied 1 never",           "Internal NotApplied 1 never",           "Internal NotApplied 1 never"],
        ["Internal NotApplied 1 never",           "Internal NotApplied 1 never",           "Internal NotApplied 1 never"]),
    ("before-propose", "refuse LeaseNotFound NotApplied",
        ["LeaseNotFound NotApplied 1 never",      "LeaseNotFound NotApplied 1 never",      LEASE],
        ["LeaseNotFound NotApplied 1 never",      "LeaseNotFound NotApplied 1 never",      LEASE]),
    ("before-propose", "refuse LeaseExists NotApplied",
        ["LeaseExists NotApplied 1 never",        "LeaseExists NotApplied 1 never",        LEASE],
        ["LeaseExists NotApplied 1 never",        "LeaseExists NotApplied 1 never",        LEASE]),
    // It was not sent before, so another session does.
    ("before-propose", "refuse SessionExpired NotApplied",
        [SESSION,                                 "ok 2 once",                             SESSION],
        [SESSION,                                 "ok 2+ once",                            SESSION]),
    ("before-propose", "refuse AlreadyAcknowledged Unknown",
        [SESSION,                                 "AlreadyAcknowledged Unknown 1 never",   SESSION],
        [SESSION,                                 "AlreadyAcknowledged Unknown 1 never",   SESSION]),

    // Refused after it was applied, so that the answer alone is lost.
    ("after-commit", "refuse Unavailable Unknown",
        ["Unavailable Unknown 1 once",            "ok 2+ once",                            COMMITTED],
        ["Unavailable Unknown 1 once",            "ok 2+ once",                            COMMITTED]),
    ("after-commit", "refuse DeadlineExceeded Unknown",
        ["DeadlineExceeded Unknown 1 once",       "ok 2+ once",                            COMMITTED],
        ["DeadlineExceeded Unknown 1 once",       "ok 2+ once",                            COMMITTED]),
    ("after-commit", "refuse LeadershipLost Unknown",
        ["LeadershipLost Unknown 1 once",         "ok 2+ once",                            COMMITTED],
        ["LeadershipLost Unknown 1 once",         "ok 2+ once",                            COMMITTED]),
    ("after-commit", "refuse AlreadyAcknowledged Applied",
        [SESSION,                                 "AlreadyAcknowledged Applied 1 once",    SESSION],
        [SESSION,                                 "AlreadyAcknowledged Applied 1 once",    SESSION]),
    ("after-commit", "refuse AlreadyAcknowledged Unknown",
        [SESSION,                                 "AlreadyAcknowledged Unknown 1 once",    SESSION],
        [SESSION,                                 "AlreadyAcknowledged Unknown 1 once",    SESSION]),

    // Not answered at all.
    ("before-propose", "silence",
        ["DeadlineExceeded Unknown 1 never",      "ok 2+ once",                            "ok 2+ never"],
        ["DeadlineExceeded Unknown 1 never",      "ok 2+ once",                            "ok 2+ never"]),
    ("after-commit", "silence",
        ["DeadlineExceeded Unknown 1 once",       "ok 2+ once",                            COMMITTED],
        ["DeadlineExceeded Unknown 1 once",       "ok 2+ once",                            COMMITTED]),
    ("before-reply", "silence",
        ["DeadlineExceeded Unknown 1 once",       "ok 2+ once",                            "ok 2+ never"],
        ["DeadlineExceeded Unknown 1 once",       "ok 2+ once",                            "ok 2+ never"]),
    ("before-propose", "die",
        [DEAD,                                    DEAD,                                    DEAD],
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            "ok 2+ never"]),
    ("after-commit", "die",
        [DEAD,                                    DEAD,                                    DEAD],
        ["Unavailable Unknown 1 once",            "ok 2+ once",                            COMMITTED]),
    ("before-reply", "die",
        [DEAD,                                    DEAD,                                    DEAD],
        ["Unavailable Unknown 1 once",            "ok 2+ once",                            "ok 2+ never"]),

    // Answered late: later than an attempt lasts that may be repeated, and in time for the call. A leader that was
    // deposed meanwhile proposes nothing more.
    ("before-propose", "delay 2400",
        ["ok 1 once",                             "ok 2+ once",                            "ok 2+ never"],
        ["ok 2+ once",                            "ok 2+ once",                            "ok 2+ never"]),
    ("before-reply", "delay 2400",
        ["ok 1 once",                             "ok 2+ once",                            "ok 2+ never"],
        ["ok 1 once",                             "ok 2+ once",                            "ok 2+ never"]),

    // Not sent: nobody listens where the leader was.
    ("connect", "refused",
        ["Unavailable NotApplied 2+ never",       "Unavailable NotApplied 2+ never",       "ok 2+ never"],
        ["ok 1+ once",                            "ok 1+ once",                            "ok 1+ never"]),

    // Lost on the way there. Another leader: the request meets with it on its way to the one of before.
    ("request", "reset",
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            "ok 2+ never"],
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            "ok 2+ never"]),
    ("request", "truncate",
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            "ok 2+ never"],
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            "ok 2+ never"]),
    ("request", "goaway",
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            "ok 2+ never"],
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            "ok 2+ never"]),
    ("request", "goaway later",
        ["ok 1 once",                             "ok 1 once",                             "ok 1 never"],
        ["ok 2+ once",                            "ok 2+ once",                            "ok 1 never"]),
    ("request", "refuse stream",
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            "ok 2+ never"],
        ["Unavailable Unknown 1 never",           "ok 2+ once",                            "ok 2+ never"]),
    ("request", "late",
        ["ok 1 once",                             "ok 2+ once",                            "ok 2+ never"],
        ["ok 2+ once",                            "ok 2+ once",                            "ok 2+ never"]),
    // A connection that swallows everything has another in its place after one attempt.
    ("request", "black hole",
        ["DeadlineExceeded Unknown 1 never",      "ok 2+ once",                            "ok 2+ never"],
        ["DeadlineExceeded Unknown 1 never",      "ok 2+ once",                            "ok 2+ never"]),
    ("request", "half open",
        ["DeadlineExceeded Unknown 1 never",      "ok 2+ once",                            "ok 2+ never"],
        ["DeadlineExceeded Unknown 1 never",      "ok 2+ once",                            "ok 2+ never"]),

    // Lost on the way back. Another leader: what is lost is that the one of before does not lead any more, but for
    // reads, which it serves.
    ("answer", "reset",
        ["Unavailable Unknown 1 once",            "ok 2+ once",                            "ok 2+ never"],
        ["impossible: a refusal is no message",   "impossible: a refusal is no message",   "ok 2+ never"]),
    ("answer", "truncate",
        ["Unavailable Unknown 1 once",            "ok 2+ once",                            "ok 2+ never"],
        ["impossible: a refusal is no message",   "impossible: a refusal is no message",   "ok 2+ never"]),
    ("answer", "goaway later",
        ["ok 1 once",                             "ok 1 once",                             "ok 1 never"],
        ["impossible: a refusal is no message",   "impossible: a refusal is no message",   "ok 1 never"]),
    ("answer", "late",
        ["ok 1 once",                             "ok 2+ once",                            "ok 2+ never"],
        ["impossible: a refusal is no message",   "impossible: a refusal is no message",   "ok 2+ never"]),
    ("answer", "black hole",
        ["DeadlineExceeded Unknown 1 once",       "ok 2+ once",                            "ok 2+ never"],
        ["impossible: a refusal is no message",   "impossible: a refusal is no message",   "ok 2+ never"]),
    ("answer", "half open",
        ["DeadlineExceeded Unknown 1 once",       "ok 2+ once",                            "ok 2+ never"],
        ["impossible: a refusal is no message",   "impossible: a refusal is no message",   "ok 2+ never"]),
];

/// What no server answers, and why.
#[rustfmt::skip]
pub(crate) const IMPOSSIBLE: &[(&[ErrorCode], &str, &str)] = &[
    (&[InvalidArgument, NotLeader, Unavailable, DeadlineExceeded, ResourceExhausted, Compacted, FutureRevision, Behind,
       LeadershipLost, FailedPrecondition, WrongCluster, Unsupported, Internal, LeaseNotFound, LeaseExists,
       SessionExpired, Cancelled],
        "Applied", "whoever knows that it was applied answers, unless the answer is not kept any more: AlreadyAcknowledged"),
    (&[InvalidArgument, ResourceExhausted, Compacted, FutureRevision, FailedPrecondition, WrongCluster, Unsupported,
       LeaseNotFound, LeaseExists],
        "Unknown", "said of a request before it is proposed, or by the store about this very request"),
    (&[NotLeader], "Unknown", "a node that does not lead proposes nothing"),
    (&[Behind], "Unknown", "said of reads only"),
    (&[Internal], "Unknown", "a node that fails with a write under way answers nothing, or that it stopped: Unavailable"),
    (&[SessionExpired], "Unknown", "the store applies nothing under a session that is not there; in doubt is what the client makes of it"),
    (&[LeadershipLost], "NotApplied", "a write that is certainly not applied is refused as NotLeader"),
    (&[AlreadyAcknowledged], "NotApplied", "what was never answered cannot be acknowledged"),
    (&[Cancelled], "NotApplied", "only the caller's own client says it: see client-rust/tests"),
    (&[Cancelled], "Unknown", "only the caller's own client says it: see client-rust/tests"),
];
