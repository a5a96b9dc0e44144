//! Every bound of the server, with its unit in its name, and how the bounds relate.
//!
//! What is part of the protocol stands in `d_engine_proto::limits`; what an operator may choose has its default here
//! and is checked by `config`. A bound that depends on another is related to it by an assertion below, so that
//! changing one of them alone does not compile.

use std::time::Duration;

use d_engine_proto::limits as protocol;

/// Bytes of an encoded request, its keys and values included.
#[expect(clippy::cast_possible_truncation, reason = "asserted below")]
pub const REQUEST_BYTES_MAX: usize = protocol::REQUEST_BYTES_MAX as usize;

/// Bytes of a message from a client. The margin above [`REQUEST_BYTES_MAX`] lets a request that is slightly too
/// large reach the check that can name what is wrong with it.
pub const CLIENT_MESSAGE_BYTES_MAX: usize = REQUEST_BYTES_MAX + 64 * 1024;

/// Bytes of an encoded command: a request, and what the engine adds to it: the hash and the span.
pub const COMMAND_BYTES_MAX: usize = REQUEST_BYTES_MAX + 128;

/// Bytes of a message between members.
pub const PEER_MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Bytes of the commands that share a log entry. A single command may exceed it, up to [`REQUEST_BYTES_MAX`].
pub const BATCH_BYTES_MAX: usize = 1 << 20;

/// Commands that share a log entry. Keeps the time to apply one entry far below a heartbeat.
pub const BATCH_COMMANDS_MAX: usize = 8192;

/// Leases and sessions that one log entry ends at most. What else is due ends with the next entries, so that none takes
/// long to apply.
pub const EXPIRIES_PER_ENTRY_MAX: usize = 1000;

/// Log entries proposed and not yet applied. One in flight costs 15 to 30 % of the throughput; beyond 16 nothing is
/// gained.
pub const ENTRIES_IN_FLIGHT_MAX: usize = 16;

/// Log entries of one message to a peer; its bytes are bounded more tightly.
pub const APPEND_ENTRIES_MAX: u64 = 4096;

/// Messages to one peer that wait for its connection.
pub const APPENDS_IN_FLIGHT_MAX: usize = 64;

/// Log entries that a learner may lack when it becomes a voter, and a voter when it is to lead. A busy leader has some
/// in flight at any time.
pub const LEARNER_LAG_ENTRIES_MAX: u64 = 100;

/// Changes of the membership that wait for their turn, and nodes that ask to join.
pub const MEMBER_CHANGES_WAITING_MAX: usize = 16;

/// Linearizable reads that wait for the confirmation of leadership they share.
pub const READS_WAITING_MAX: usize = 65_536;

/// Store time that a leader change may lose at most while something is to expire: an idle leader writes its own into the
/// log before. What is lost, leases last longer.
pub const STORE_TIME_LOST_MAX: Duration = Duration::from_secs(10);

/// Pause after a tick that was not applied; it doubles up to [`TICK_PAUSE_MAX`].
pub const TICK_PAUSE_MIN: Duration = Duration::from_millis(10);

/// Longest pause after a tick that was not applied.
pub const TICK_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Renewals of leases that share a command.
pub const RENEWALS_PER_COMMAND_MAX: usize = 1024;

/// Commands with renewals that wait for their answer.
pub const RENEWALS_IN_FLIGHT_MAX: usize = 4;

/// Renewals that wait for a command; what more there are wait in their streams.
pub const RENEWALS_WAITING_MAX: usize = 16_384;

/// Keep-alives of one stream under way; the others wait to be read.
pub const KEEP_ALIVES_PER_STREAM_MAX: usize = 1024;

/// Default of `raft.state_machine.history.retention_ms`: ten minutes.
pub const HISTORY_RETENTION_MS_DEFAULT: u64 = 600_000;

/// Shortest `raft.state_machine.history.retention_ms` but 0: shorter ones would compact without end.
pub const HISTORY_RETENTION_MS_MIN: u64 = 1000;

/// Longest `raft.state_machine.history.retention_ms`: a year.
pub const HISTORY_RETENTION_MS_MAX: u64 = 31_536_000_000;

/// Compactions by age within one retention: history is kept for that much longer at most.
pub const COMPACTIONS_PER_RETENTION: u32 = 10;

/// Shortest pause between two compactions by age.
pub const COMPACTION_PAUSE_MIN: Duration = Duration::from_secs(1);

/// Shortest pause between two samples of the age of revisions.
pub const HISTORY_SAMPLE_PAUSE: Duration = Duration::from_millis(200);

/// Samples of the age of revisions that are kept, of 16 bytes and some; beyond, every second one goes.
pub const HISTORY_SAMPLES_MAX: usize = 4096;

/// Default of `raft.backpressure.max_pending_bytes`: bytes of proposals that wait for their answer.
pub const PENDING_BYTES_DEFAULT: usize = 64 << 20;

/// Smallest `raft.backpressure.max_pending_bytes`: less would leave the pipeline of entries unfilled.
pub const PENDING_BYTES_MIN: usize = 4 << 20;

/// Entries that `MemFirst` may acknowledge before it asks for them to be on the disk.
pub const FLUSH_ENTRIES_MAX: u64 = 1_000_000;

/// Longest time for which what `MemFirst` acknowledged may wait to be asked onto the disk; what a power cut may take.
pub const FLUSH_INTERVAL_MS_MAX: u64 = 60_000;

/// Default of `network.connections_max`. An idle connection costs some ten kilobytes.
pub const CONNECTIONS_MAX_DEFAULT: usize = 16_384;

/// Open files kept for storage, peers and the monitoring port; connections may use the rest.
pub const FILES_RESERVED: usize = 512;

/// Default of `network.streams_per_connection_max`: calls in flight on one connection. A client that starts more
/// waits, as HTTP/2 provides.
pub const STREAMS_PER_CONNECTION_DEFAULT: u32 = 4096;

/// Flow-control window of one call: a request of any size in one go.
pub const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// Flow-control window of a connection.
pub const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Bytes of the headers of one request.
pub const HEADER_BYTES_MAX: u32 = 16 * 1024;

/// Streams a client may have reset before the server has looked at them; more close the connection.
pub const PENDING_RESETS_MAX: usize = 1024;

/// How often a silent connection is probed.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

/// How long the answer to a probe may take before the connection is closed.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long calls in flight may take to end once the server stops. Consensus has stopped by then, so they only have
/// to carry their answers away.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a node that met a fault may take to stop what still works, before it ends without.
pub const ABANDON_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of a piece in which a backup is sent.
pub const BACKUP_PIECE_BYTES: usize = 256 << 10;

/// Pieces of a backup that wait for their receiver to take them.
pub const BACKUP_PIECES_WAITING_MAX: usize = 4;

/// Default of `raft.state_machine.check_interval_ms`: five minutes.
pub const CHECK_INTERVAL_MS_DEFAULT: u64 = 300_000;

/// Shortest `raft.state_machine.check_interval_ms` but 0: every check reads the whole store.
pub const CHECK_INTERVAL_MS_MIN: u64 = 100;

/// How long a member may take to apply the entry after which states are compared, and to hash its own.
pub const CHECK_PATIENCE: Duration = Duration::from_secs(30);

/// How long a check that came by itself may take.
pub const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

/// Default of `network.call_timeout_ms`: the deadline of a call whose client names none.
pub const CALL_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);

/// The longest deadline a call can have; a client that asks for more gets this.
pub const CALL_TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// Operations of one pipeline in flight; a server that has as many reads no further.
pub const PIPELINE_OPERATIONS_MAX: usize = 16_384;

/// Bytes of the operations of one pipeline in flight, unless a single message has more.
pub const PIPELINE_BYTES_MAX: usize = 16 << 20;

/// Bytes of one message with answers, unless a single answer is larger. With as many waiting to be sent, a pipeline reads
/// no further and executes no reads.
#[expect(clippy::cast_possible_truncation, reason = "asserted below")]
pub const PIPELINE_BATCH_BYTES_MAX: usize = protocol::PIPELINE_BATCH_BYTES_MAX as usize;

/// Writes of one pipeline in flight whose answers hold what keys held, and may be large: nothing stops those of a log
/// entry from coming together.
pub const PIPELINE_RETURNING_MAX: usize = 1024;

/// Operations of one pipeline that run as calls of their own, such as reads of the past, whose answers may be large.
pub const PIPELINE_CALLS_MAX: usize = 64;

/// Rounds of reads of one pipeline under way; what arrives meanwhile shares the next, as consensus would have it anyway.
pub const PIPELINE_ROUNDS_MAX: usize = 2;

/// Messages that a pipeline takes in before other streams of its connection have their turn.
pub const PIPELINE_MESSAGES_PER_TURN: usize = 16;

/// Shortest pause between two looks at the deadlines of a pipeline's operations.
pub const PIPELINE_DEADLINES_PAUSE: Duration = Duration::from_millis(1);

/// Default of `raft.snapshot.max_log_entries_before_snapshot`.
pub const SNAPSHOT_LOG_ENTRIES_DEFAULT: u64 = 100_000;

/// Default of `raft.snapshot.max_log_bytes_before_snapshot`: what a restart may have to read of the log at most, and a
/// member that is a little behind of its leader's.
pub const SNAPSHOT_LOG_BYTES_DEFAULT: u64 = 256 << 20;

/// Default of `raft.snapshot.retained_log_entries`.
pub const RETAINED_LOG_ENTRIES_DEFAULT: u64 = 5_000;

/// Bytes of the log that are kept for members that are behind, by the average entry; fewer entries if they are large.
pub const RETAINED_LOG_BYTES_MAX: u64 = 64 << 20;

/// How often a node looks whether a snapshot is due.
pub const SNAPSHOT_CHECK_PERIOD: Duration = Duration::from_millis(250);

/// Pause after a snapshot that could not be built.
pub const SNAPSHOT_RETRY_PAUSE: Duration = Duration::from_secs(10);

/// How long after a piece of a snapshot was sent the transfer may still go on with it: so long none replaces it.
pub const SNAPSHOT_TRANSFER_PAUSE_MAX: Duration = Duration::from_secs(10);

/// By how much the log may outgrow what a snapshot is due at while the last one is being sent.
pub const SNAPSHOT_OVERDUE_FACTOR: u64 = 4;

/// Bytes of one piece of a snapshot on its way.
pub const SNAPSHOT_CHUNK_BYTES: usize = 256 << 10;

/// Pieces of a snapshot that are sent and not yet written by the receiver: enough to keep a disk busy, and little that
/// anything else waits behind.
pub const SNAPSHOT_CHUNKS_IN_FLIGHT_MAX: usize = 4;

/// Bytes of a snapshot that a receiver writes before it waits for the disk. The log's next write waits behind them: the
/// kernel would let a large file gather in memory, and then write hundreds of megabytes in one go.
pub const SNAPSHOT_UNSYNCED_BYTES_MAX: u64 = 4 << 20;

/// Bytes of the disk that a snapshot which is received leaves to the log.
pub const SNAPSHOT_DISK_RESERVED_BYTES: u64 = 64 << 20;

/// Watches of a node. An idle one costs about a kilobyte.
pub const WATCHES_MAX: usize = 262_144;

/// Watches of one stream.
pub const WATCHES_PER_STREAM_MAX: usize = 65_536;

/// Bytes of events, encoded form included, that a node keeps for those who watch and are a little slow. Who is slower
/// is served from the memory of the state machine, and then from disk.
pub const WATCH_WINDOW_BYTES_MAX: usize = 32 << 20;

/// Bytes of an answer with events, unless a single event is larger.
pub const WATCH_FRAME_BYTES_MAX: usize = 1 << 20;

/// Bytes of changes that a watch which is behind looks through in one step.
pub const WATCH_CHUNK_BYTES: usize = 256 << 10;

/// Watches of a node that read the history on disk at the same time.
pub const WATCH_READERS_MAX: usize = 8;

/// Watches of one stream that read the history on disk at the same time, or hold what they read.
pub const WATCH_READS_PER_LANE_MAX: usize = 2;

/// How often an idle watch is told how far the store has come.
pub const WATCH_BOOKMARK_PERIOD: Duration = Duration::from_secs(5);

/// How long watches stay on a node that knows no leader. Longer than an election, so that only a node that is cut off,
/// or a cluster without a quorum, sends its watches away.
pub const WATCH_WITHOUT_LEADER_MAX: Duration = Duration::from_secs(5);

/// Connections to the monitoring port at the same time.
pub const MONITORING_CONNECTIONS_MAX: usize = 64;

/// How long a connection to the monitoring port may last: probes come and go, and a silent one holds a place.
pub const MONITORING_CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);

/// How long a connection may take to speak TLS before it gives its place back.
pub const TLS_HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);

/// How long a connection that is refused stays open for its peer to read why.
pub const TLS_ALERT_TIME_MAX: Duration = Duration::from_secs(1);

/// Shortest pause between two log lines of connections that are refused: whoever is, comes again and again.
pub const TLS_LOG_PAUSE: Duration = Duration::from_secs(1);

/// Default of `tls.reload_interval_ms`.
pub const TLS_RELOAD_INTERVAL_MS_DEFAULT: u64 = 10_000;

/// Shortest `tls.reload_interval_ms`: looking reads the files.
pub const TLS_RELOAD_INTERVAL_MS_MIN: u64 = 100;

/// Longest `tls.reload_interval_ms`: a day.
pub const TLS_RELOAD_INTERVAL_MS_MAX: u64 = 86_400_000;

/// Default of `raft.read_consistency.lease_duration_ms`.
pub const LEASE_MS_DEFAULT: u64 = 250;

/// Shortest lease: a third of it is the pause between heartbeats, and disks take milliseconds to acknowledge.
pub const LEASE_MS_MIN: u64 = 50;

/// Longest of all Raft times: nobody waits longer for a new leader on purpose.
pub const RAFT_TIME_MS_MAX: u64 = 60_000;

/// Shortest pause between two heartbeats.
pub const HEARTBEAT_MS_MIN: u64 = 10;

/// Heartbeats that fit in the shortest election timeout at least: one or two may be lost without an election.
pub const HEARTBEATS_PER_ELECTION_MIN: u64 = 3;

/// Heartbeats that fit in one lease at least: it must not lapse between two of them.
pub const HEARTBEATS_PER_LEASE_MIN: u64 = 2;

/// Heartbeats in one lease, or in the shortest election timeout if that is shorter, unless configured. As few as may
/// be: openraft gives up on a heartbeat when the next is due, and its answer waits for the writes before it, so the
/// pause must exceed a round trip and an fsync.
pub const HEARTBEATS_PER_LEASE_DEFAULT: u64 = 3;

/// How far the rates of two members' clocks may differ, in percent.
pub const CLOCK_DRIFT_PERCENT_MAX: u64 = 5;

/// The shortest maximum election timeout, exclusive, that is safe with a lease: a voter that acknowledged the leader
/// grants no other vote for the maximum election timeout by its own clock, so the lease, measured by a slower clock,
/// must be over before.
#[must_use]
pub const fn election_timeout_max_ms_above(lease_ms: u64) -> u64 {
    (lease_ms * (100 + CLOCK_DRIFT_PERCENT_MAX)).div_ceil(100)
}

/// The default of the maximum election timeout, for the larger of lease and minimum election timeout.
#[must_use]
pub const fn election_timeout_max_ms_default(lease_or_min_ms: u64) -> u64 {
    lease_or_min_ms + lease_or_min_ms.div_ceil(2)
}

const _: () = {
    assert!(protocol::REQUEST_BYTES_MAX <= u32::MAX as u64, "the constant above must not truncate");
    // A key, and a whole page of a range, fit in what a request or an answer may carry.
    assert!(protocol::KEY_BYTES_MAX < protocol::REQUEST_BYTES_MAX);
    // A log entry travels in one message, beside its neighbours and its envelope.
    assert!(2 * BATCH_BYTES_MAX < PEER_MESSAGE_BYTES_MAX);
    assert!(2 * CLIENT_MESSAGE_BYTES_MAX < PEER_MESSAGE_BYTES_MAX);
    // A piece of a snapshot, and its envelope, travel in one message.
    assert!(2 * SNAPSHOT_CHUNK_BYTES < PEER_MESSAGE_BYTES_MAX);
    // The smallest budget still admits any request, and two full batches behind it.
    assert!(CLIENT_MESSAGE_BYTES_MAX + 2 * BATCH_BYTES_MAX <= PENDING_BYTES_MIN);
    assert!(PENDING_BYTES_MIN <= PENDING_BYTES_DEFAULT);
    // By default every entry in flight can be full.
    assert!(ENTRIES_IN_FLIGHT_MAX * BATCH_BYTES_MAX <= PENDING_BYTES_DEFAULT);
    // A request never stalls half-way for window updates.
    assert!(CLIENT_MESSAGE_BYTES_MAX <= STREAM_WINDOW_BYTES as usize);
    assert!(STREAM_WINDOW_BYTES <= CONNECTION_WINDOW_BYTES);
    // What a connection may have in flight can wait for one confirmation.
    assert!(STREAMS_PER_CONNECTION_DEFAULT as usize <= READS_WAITING_MAX);
    // The defaults follow their own rules, also at the smallest lease.
    assert!(election_timeout_max_ms_above(LEASE_MS_MIN) < election_timeout_max_ms_default(LEASE_MS_MIN));
    assert!(election_timeout_max_ms_above(LEASE_MS_DEFAULT) < election_timeout_max_ms_default(LEASE_MS_DEFAULT));
    assert!(HEARTBEAT_MS_MIN * HEARTBEATS_PER_LEASE_DEFAULT <= LEASE_MS_MIN);
    assert!(HEARTBEATS_PER_ELECTION_MIN <= HEARTBEATS_PER_LEASE_DEFAULT);
    assert!(HEARTBEATS_PER_LEASE_MIN <= HEARTBEATS_PER_LEASE_DEFAULT);
    // The largest event, a large value over another one, and what frames it fit in the 4 MiB that stubs accept.
    assert!(2 * protocol::REQUEST_BYTES_MAX + 4 * protocol::KEY_BYTES_MAX + 1024 < 4 << 20);
    assert!(WATCH_FRAME_BYTES_MAX + 1024 < 4 << 20);
    assert!(WATCHES_PER_STREAM_MAX <= WATCHES_MAX);
    assert!(protocol::PIPELINE_BATCH_BYTES_MAX <= u32::MAX as u64, "the constant above must not truncate");
    // A message with the largest operation, or with as many as may be, can be read, and the next one beside it.
    assert!(PIPELINE_BATCH_BYTES_MAX <= CLIENT_MESSAGE_BYTES_MAX);
    assert!(2 * CLIENT_MESSAGE_BYTES_MAX <= PIPELINE_BYTES_MAX);
    // No pipeline fills the queue of proposals, or of reads, by itself.
    assert!(PIPELINE_BYTES_MAX + PIPELINE_OPERATIONS_MAX * 256 < PENDING_BYTES_DEFAULT);
    assert!(PIPELINE_OPERATIONS_MAX <= READS_WAITING_MAX);
    // An entry's worth of commands fits, and some in flight before it.
    assert!(2 * BATCH_COMMANDS_MAX <= PIPELINE_OPERATIONS_MAX);
    assert!(CALL_TIMEOUT_DEFAULT.as_millis() <= CALL_TIMEOUT_MAX.as_millis());
    // A stream cannot fill the queue of renewals by itself, and a full command is far below a request.
    assert!(KEEP_ALIVES_PER_STREAM_MAX < RENEWALS_WAITING_MAX);
    assert!(RENEWALS_PER_COMMAND_MAX * 11 < REQUEST_BYTES_MAX);
    assert!(HISTORY_RETENTION_MS_MIN <= HISTORY_RETENTION_MS_DEFAULT);
    assert!(HISTORY_RETENTION_MS_DEFAULT <= HISTORY_RETENTION_MS_MAX);
    // Storage and peers have files left when the monitoring port is full.
    assert!(2 * MONITORING_CONNECTIONS_MAX < FILES_RESERVED);
    assert!(TLS_RELOAD_INTERVAL_MS_MIN <= TLS_RELOAD_INTERVAL_MS_DEFAULT);
    assert!(TLS_RELOAD_INTERVAL_MS_DEFAULT <= TLS_RELOAD_INTERVAL_MS_MAX);
    assert!(KEEPALIVE_TIMEOUT.as_millis() < KEEPALIVE_INTERVAL.as_millis());
};
