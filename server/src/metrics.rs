//! What a node counts and measures, for Prometheus. `docs/metrics.md` says what each metric means; a test compares
//! the two.
//!
//! What happens is recorded as it happens; what *is*, such as an index, is asked for once per scrape ([`Figures`]),
//! so that the hot paths carry no gauge.

use std::sync::atomic::Ordering;
use std::time::Duration;

use d_engine_proto::{LogIndex, NodeId, Revision};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::clock::Moment;

/// The metrics of one node. Recording takes no lock that another thread holds for long.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    started: Moment,
    requests: Family<RequestLabels, Counter>,
    request_duration: Family<MethodLabels, Histogram>,
    connections: Gauge,
    connections_refused: Counter,
    tls_refused: Counter,
    tls_reloads: Counter,
    tls_reload_failures: Counter,
    tls_certificate_expiry: Gauge,
    term: Gauge,
    is_leader: Gauge,
    leader_changes: Counter,
    members: Family<RoleLabels, Gauge>,
    member_lag: Family<MemberLabels, Gauge>,
    membership_changes: Family<ChangeLabels, Counter>,
    leadership_transfers: Family<OutcomeLabels, Counter>,
    batch_commands: Histogram,
    log_write_duration: Histogram,
    lease_renewals: Counter,
    snapshots_built: Counter,
    snapshot_failures: Counter,
    snapshots_installed: Counter,
    snapshot_build_duration: Histogram,
    snapshot_install_duration: Histogram,
    snapshot_sent_bytes: Counter,
    snapshot_received_bytes: Counter,
    committed_index: Gauge,
    applied_index: Gauge,
    purged_index: Gauge,
    pending_bytes: Gauge,
    watches: Gauge,
    watch_events: Counter,
    watch_bookmarks: Counter,
    watch_overruns: Counter,
    watch_history_reads: Counter,
    revision: Gauge,
    compacted_revision: Gauge,
    keys: Gauge,
    leases: Gauge,
    sessions: Gauge,
    expiries: Counter,
    state_checks: Family<OutcomeLabels, Counter>,
    diverged_members: Gauge,
    snapshots_saved: Counter,
    snapshot_last_saved: Gauge,
    resident_memory: Gauge,
    open_files: Gauge,
    uptime: Gauge,
}

/// What a scrape asks of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Members with a vote.
    pub voters: usize,
    /// Members without one.
    pub learners: usize,
    /// Log entries that each of the others lacks, if this node leads.
    pub lags: Vec<(NodeId, u64)>,
    /// Last entry known to be committed.
    pub committed: LogIndex,
    /// Last entry applied.
    pub applied: LogIndex,
    /// Last entry purged from the log.
    pub purged: LogIndex,
    /// Bytes of proposals that wait for their answer.
    pub pending_bytes: usize,
    /// Revision of the store.
    pub revision: Revision,
    /// Oldest revision that can be read.
    pub compacted: Revision,
    /// Keys in the store.
    pub keys: u64,
    /// Leases in the store.
    pub leases: u64,
    /// Sessions in the store.
    pub sessions: u64,
    /// Leases and sessions that came to their deadline.
    pub expired: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabels {
    role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MemberLabels {
    member: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabels {
    change: &'static str,
    outcome: &'static str,
}

/// What came of a change of the membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeOutcome {
    /// It is committed.
    Done,
    /// Nothing was changed.
    Refused,
    /// It may still be made.
    Interrupted,
}

/// What a comparison of the members' states found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckOutcome {
    /// All hold the same.
    Same,
    /// Those that answered in time hold the same.
    Incomplete,
    /// At least one is wrong.
    Different,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Metrics that start from zero, now.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("d_engine"),
            started: Moment::now(),
            requests: Family::default(),
            request_duration: Family::new_with_constructor(latencies),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            tls_refused: Counter::default(),
            tls_reloads: Counter::default(),
            tls_reload_failures: Counter::default(),
            tls_certificate_expiry: Gauge::default(),
            term: Gauge::default(),
            is_leader: Gauge::default(),
            leader_changes: Counter::default(),
            members: Family::default(),
            member_lag: Family::default(),
            membership_changes: Family::default(),
            leadership_transfers: Family::default(),
            // 1 to 8192 commands.
            batch_commands: Histogram::new(exponential_buckets(1.0, 2.0, 14)),
            log_write_duration: latencies(),
            lease_renewals: Counter::default(),
            snapshots_built: Counter::default(),
            snapshot_failures: Counter::default(),
            snapshots_installed: Counter::default(),
            // A millisecond to a quarter of an hour.
            snapshot_build_duration: Histogram::new(exponential_buckets(0.001, 2.0, 20)),
            snapshot_install_duration: Histogram::new(exponential_buckets(0.001, 2.0, 20)),
            snapshot_sent_bytes: Counter::default(),
            snapshot_received_bytes: Counter::default(),
            committed_index: Gauge::default(),
            applied_index: Gauge::default(),
            purged_index: Gauge::default(),
            pending_bytes: Gauge::default(),
            watches: Gauge::default(),
            watch_events: Counter::default(),
            watch_bookmarks: Counter::default(),
            watch_overruns: Counter::default(),
            watch_history_reads: Counter::default(),
            revision: Gauge::default(),
            compacted_revision: Gauge::default(),
            keys: Gauge::default(),
            leases: Gauge::default(),
            sessions: Gauge::default(),
            expiries: Counter::default(),
            state_checks: Family::default(),
            diverged_members: Gauge::default(),
            snapshots_saved: Counter::default(),
            snapshot_last_saved: Gauge::default(),
            resident_memory: Gauge::default(),
            open_files: Gauge::default(),
            uptime: Gauge::default(),
        };
        metrics.register();
        metrics
    }

    // Counters get the suffix `_total` from the encoder.
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("requests", "gRPC calls answered", self.requests.clone());
        registry.register("request_duration_seconds", "Time to answer a gRPC call", self.request_duration.clone());
        registry.register("connections", "Open gRPC connections", self.connections.clone());
        let refused = self.connections_refused.clone();
        registry.register("connections_refused", "Connections closed for being too many", refused);
        let refused = self.tls_refused.clone();
        registry.register("tls_refused", "Connections and calls refused for what they showed of themselves", refused);
        registry.register("tls_reloads", "Changed certificates taken over", self.tls_reloads.clone());
        let failures = self.tls_reload_failures.clone();
        registry.register("tls_reload_failures", "Changed certificates not taken over", failures);
        let expiry = self.tls_certificate_expiry.clone();
        registry.register("tls_certificate_expiry_seconds", "When the certificate in force expires", expiry);
        registry.register("raft_term", "Current Raft term", self.term.clone());
        registry.register("raft_is_leader", "1 while this node leads, else 0", self.is_leader.clone());
        registry.register("raft_committed_index", "Last log entry known committed", self.committed_index.clone());
        registry.register("raft_applied_index", "Last log entry applied", self.applied_index.clone());
        registry.register("raft_purged_index", "Last log entry purged from the log", self.purged_index.clone());
        registry.register(
            "leader_changes",
            "Changes of the known leader, its loss included",
            self.leader_changes.clone(),
        );
        registry.register("members", "Members by their role", self.members.clone());
        registry.register("member_lag_entries", "Log entries a member lacks", self.member_lag.clone());
        let changes = self.membership_changes.clone();
        registry.register("membership_changes", "Changes of the membership by this node as the leader", changes);
        let transfers = self.leadership_transfers.clone();
        registry.register("leadership_transfers", "Transfers of leadership that this node tried", transfers);
        let pending = self.pending_bytes.clone();
        registry.register("proposals_pending_bytes", "Bytes of proposals that wait for their answer", pending);
        registry.register("batch_commands", "Commands that shared a log entry", self.batch_commands.clone());
        let log_write = self.log_write_duration.clone();
        registry.register(
            "log_write_duration_seconds",
            "Time of one group write to the log, fsync included",
            log_write,
        );
        registry.register("watches", "Watches of this node", self.watches.clone());
        registry.register("watch_events", "Events handed to watches", self.watch_events.clone());
        registry.register("watch_bookmarks", "Bookmarks handed to watches", self.watch_bookmarks.clone());
        registry.register("watch_overruns", "Times a watch fell behind", self.watch_overruns.clone());
        let reads = self.watch_history_reads.clone();
        registry.register("watch_history_reads", "Reads of the history by watches that are behind", reads);
        registry.register("store_revision", "Revision of the store", self.revision.clone());
        let compacted = self.compacted_revision.clone();
        registry.register("store_compacted_revision", "Oldest revision that can be read", compacted);
        registry.register("store_keys", "Keys in the store", self.keys.clone());
        registry.register("leases", "Leases, those of keys with a time to live included", self.leases.clone());
        registry.register("lease_renewals", "Renewals of leases proposed", self.lease_renewals.clone());
        registry.register("snapshots_built", "Snapshots built", self.snapshots_built.clone());
        registry.register("snapshot_failures", "Snapshots that could not be built", self.snapshot_failures.clone());
        registry.register("snapshots_installed", "Snapshots installed", self.snapshots_installed.clone());
        let duration = self.snapshot_build_duration.clone();
        registry.register("snapshot_build_duration_seconds", "Time to build a snapshot", duration);
        let duration = self.snapshot_install_duration.clone();
        registry.register("snapshot_install_duration_seconds", "Time to install a snapshot", duration);
        registry.register("snapshot_sent_bytes", "Bytes of snapshots sent", self.snapshot_sent_bytes.clone());
        registry.register(
            "snapshot_received_bytes",
            "Bytes of snapshots written",
            self.snapshot_received_bytes.clone(),
        );
        registry.register("sessions", "Client sessions", self.sessions.clone());
        registry.register("expiries", "Leases and sessions that came to their deadline", self.expiries.clone());
        let checks = self.state_checks.clone();
        registry.register("state_checks", "Comparisons of the members' states", checks);
        let diverged = self.diverged_members.clone();
        registry.register("diverged_members", "Members whose state the last comparison found to be wrong", diverged);
        registry.register("snapshots_saved", "Backups taken from this node", self.snapshots_saved.clone());
        let saved = self.snapshot_last_saved.clone();
        registry.register("snapshot_last_saved_seconds", "When the last backup was taken from this node", saved);
        registry.register("process_resident_memory_bytes", "Resident memory", self.resident_memory.clone());
        registry.register("process_open_fds", "Open file descriptors", self.open_files.clone());
        registry.register("process_uptime_seconds", "Time since the node started", self.uptime.clone());
    }

    /// A gRPC call was answered. Both labels come from fixed sets, so that no client can make new time series.
    pub fn request(&self, method: &'static str, code: &'static str, elapsed: Duration) {
        self.requests.get_or_create(&RequestLabels { method, code }).inc();
        self.request_duration.get_or_create(&MethodLabels { method }).observe(elapsed.as_secs_f64());
    }

    /// Many calls were answered together, as [`request`](Self::request) records one.
    pub fn requests(&self, calls: impl Iterator<Item = (&'static str, &'static str, Duration)>) {
        // Most are alike, and looking metrics up costs more than counting.
        let mut last = None;
        for (method, code, elapsed) in calls {
            let (_, requests, durations) = match last.take() {
                Some(found @ (labels, _, _)) if labels == (method, code) => last.insert(found),
                _ => last.insert((
                    (method, code),
                    self.requests.get_or_create(&RequestLabels { method, code }).clone(),
                    self.request_duration.get_or_create(&MethodLabels { method }).clone(),
                )),
            };
            requests.inc();
            durations.observe(elapsed.as_secs_f64());
        }
    }

    /// A gRPC connection was accepted.
    pub fn connection_opened(&self) {
        self.connections.inc();
    }

    /// An accepted gRPC connection has ended.
    pub fn connection_closed(&self) {
        self.connections.dec();
    }

    /// A gRPC connection was closed at once, since there are too many.
    pub fn connection_refused(&self) {
        self.connections_refused.inc();
    }

    /// A connection failed its handshake, or a call between members came from somebody who is none.
    pub fn tls_refused(&self) {
        self.tls_refused.inc();
    }

    /// Changed certificates came into force.
    pub fn tls_reloaded(&self) {
        self.tls_reloads.inc();
    }

    /// Changed certificates do not serve.
    pub fn tls_reload_failed(&self) {
        self.tls_reload_failures.inc();
    }

    /// The certificate now in force expires so many seconds after 1970 began.
    pub fn tls_certificate(&self, expiry_seconds: u64) {
        self.tls_certificate_expiry.set(saturating(expiry_seconds));
    }

    /// Raft's term and whether this node leads in it.
    pub fn raft_role(&self, term: u64, is_leader: bool) {
        self.term.set(saturating(term));
        self.is_leader.set(i64::from(is_leader));
    }

    /// Another leader is known, or none is any more.
    pub fn leader_changed(&self) {
        self.leader_changes.inc();
    }

    /// As the leader, this node came to the end of a change of the membership, which is named as commands name it.
    pub fn membership_change(&self, change: &'static str, outcome: ChangeOutcome) {
        let outcome = match outcome {
            ChangeOutcome::Done => "done",
            ChangeOutcome::Refused => "refused",
            ChangeOutcome::Interrupted => "interrupted",
        };
        self.membership_changes.get_or_create(&ChangeLabels { change, outcome }).inc();
    }

    /// This node tried to hand over leadership.
    pub fn leadership_transfer(&self, succeeded: bool) {
        let outcome = if succeeded { "done" } else { "failed" };
        self.leadership_transfers.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// An entry with this many commands was proposed.
    #[expect(clippy::cast_precision_loss, reason = "a batch has thousands of commands at most")]
    pub fn batch(&self, commands: usize) {
        self.batch_commands.observe(commands as f64);
    }

    /// A group of log operations was written and made durable.
    pub fn log_write(&self, elapsed: Duration) {
        self.log_write_duration.observe(elapsed.as_secs_f64());
    }

    /// A snapshot was built.
    pub fn snapshot_built(&self, elapsed: Duration) {
        self.snapshots_built.inc();
        self.snapshot_build_duration.observe(elapsed.as_secs_f64());
    }

    /// A snapshot could not be built.
    pub fn snapshot_failed(&self) {
        self.snapshot_failures.inc();
    }

    /// A snapshot from the leader was installed.
    pub fn snapshot_installed(&self, elapsed: Duration) {
        self.snapshots_installed.inc();
        self.snapshot_install_duration.observe(elapsed.as_secs_f64());
    }

    /// A piece of a snapshot was sent.
    pub fn snapshot_sent(&self, bytes: usize) {
        self.snapshot_sent_bytes.inc_by(bytes as u64);
    }

    /// A piece of a snapshot was received and written.
    pub fn snapshot_received(&self, bytes: usize) {
        self.snapshot_received_bytes.inc_by(bytes as u64);
    }

    /// A watch began.
    pub fn watch_opened(&self) {
        self.watches.inc();
    }

    /// A watch ended.
    pub fn watch_closed(&self) {
        self.watches.dec();
    }

    /// A watch took this many events.
    pub fn watch_events(&self, events: usize) {
        self.watch_events.inc_by(events as u64);
    }

    /// A watch took a bookmark.
    pub fn watch_bookmark(&self) {
        self.watch_bookmarks.inc();
    }

    /// A watch was too slow for what is kept for it, and catches up.
    pub fn watch_overrun(&self) {
        self.watch_overruns.inc();
    }

    /// A watch that is behind needs the history on disk.
    pub fn watch_history_read(&self) {
        self.watch_history_reads.inc();
    }

    /// So many renewals of leases were proposed.
    pub fn leases_renewed(&self, renewals: usize) {
        self.lease_renewals.inc_by(renewals as u64);
    }

    /// As the leader, this node had the members' states compared; so many were wrong.
    pub fn state_checked(&self, outcome: CheckOutcome, wrong: usize) {
        let label = match outcome {
            CheckOutcome::Same => "same",
            CheckOutcome::Incomplete => "incomplete",
            CheckOutcome::Different => "different",
        };
        self.state_checks.get_or_create(&OutcomeLabels { outcome: label }).inc();
        self.diverged_members.set(saturating(wrong as u64));
    }

    /// A backup was taken from this node, at this time since 1970.
    pub fn snapshot_saved(&self, at: Duration) {
        self.snapshots_saved.inc();
        self.snapshot_last_saved.set(saturating(at.as_secs()));
    }

    /// Everything, in the text format of OpenMetrics.
    ///
    /// # Errors
    /// Never in practice: writing to a string does not fail.
    pub fn encode(&self, figures: &Figures) -> Result<String, std::fmt::Error> {
        for (role, members) in [("voter", figures.voters), ("learner", figures.learners)] {
            self.members.get_or_create(&RoleLabels { role }).set(saturating(members as u64));
        }
        // Who was removed, or is followed by another leader now, is shown no more.
        self.member_lag.clear();
        for (member, lag) in &figures.lags {
            self.member_lag.get_or_create(&MemberLabels { member: member.get() }).set(saturating(*lag));
        }
        self.committed_index.set(saturating(figures.committed.get()));
        self.applied_index.set(saturating(figures.applied.get()));
        self.purged_index.set(saturating(figures.purged.get()));
        self.pending_bytes.set(saturating(figures.pending_bytes as u64));
        self.revision.set(saturating(figures.revision.get()));
        self.compacted_revision.set(saturating(figures.compacted.get()));
        self.keys.set(saturating(figures.keys));
        self.leases.set(saturating(figures.leases));
        self.sessions.set(saturating(figures.sessions));
        // Counted where it happens, in the state machine, which knows no metrics.
        self.expiries.inner().store(figures.expired, Ordering::Relaxed);
        self.resident_memory.set(saturating(resident_memory_bytes().unwrap_or(0)));
        self.open_files.set(saturating(open_files().unwrap_or(0)));
        self.uptime.set(saturating(Moment::now().since(self.started).as_secs()));
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// 50 µs to 6.5 s: from an fsync on a good disk to a call that runs into its default deadline.
fn latencies() -> Histogram {
    Histogram::new(exponential_buckets(50e-6, 2.0, 18))
}

fn saturating(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// `None` where the system has no `/proc`.
fn resident_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

fn open_files() -> Option<u64> {
    // One of them is the listing itself.
    std::fs::read_dir("/proc/self/fd").ok().map(|files| (files.count() as u64).saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn scrape(metrics: &Metrics) -> String {
        metrics.encode(&Figures { revision: Revision(42), keys: 7, ..Figures::default() }).unwrap()
    }

    #[test]
    fn what_was_recorded_is_scraped() {
        let metrics = Metrics::new();
        metrics.request("Kv/Put", "Ok", Duration::from_millis(3));
        metrics.request("Kv/Put", "NotLeader", Duration::from_millis(3));
        metrics.raft_role(9, true);
        metrics.leader_changed();
        metrics.batch(100);
        metrics.log_write(Duration::from_millis(1));
        let text = scrape(&metrics);
        for line in [
            "d_engine_requests_total{method=\"Kv/Put\",code=\"Ok\"} 1",
            "d_engine_requests_total{method=\"Kv/Put\",code=\"NotLeader\"} 1",
            "d_engine_request_duration_seconds_count{method=\"Kv/Put\"} 2",
            "d_engine_raft_term 9",
            "d_engine_raft_is_leader 1",
            "d_engine_leader_changes_total 1",
            "d_engine_batch_commands_bucket{le=\"128.0\"} 1",
            "d_engine_batch_commands_bucket{le=\"64.0\"} 0",
            "d_engine_log_write_duration_seconds_count 1",
            "d_engine_store_revision 42",
            "d_engine_store_keys 7",
        ] {
            assert!(text.lines().any(|found| found == line), "`{line}` is missing in\n{text}");
        }
    }

    #[test]
    fn the_lag_of_a_member_is_shown_while_this_node_follows_it() {
        let metrics = Metrics::new();
        let lags = |lags: &[(u32, u64)]| {
            let lags: Vec<_> = lags.iter().map(|(id, lag)| (NodeId(*id), *lag)).collect();
            let text = metrics.encode(&Figures { voters: 2, learners: 1, lags, ..Figures::default() }).unwrap();
            for line in ["d_engine_members{role=\"voter\"} 2", "d_engine_members{role=\"learner\"} 1"] {
                assert!(text.lines().any(|found| found == line), "`{line}` is missing in\n{text}");
            }
            let shown = text.lines().filter(|line| line.starts_with("d_engine_member_lag_entries{"));
            shown.map(str::to_owned).collect::<BTreeSet<_>>()
        };
        let both = ["d_engine_member_lag_entries{member=\"2\"} 7", "d_engine_member_lag_entries{member=\"3\"} 0"];
        assert_eq!(lags(&[(2, 7), (3, 0)]), both.map(str::to_owned).into());
        assert_eq!(lags(&[(2, 7)]), both[..1].iter().map(|line| (*line).to_owned()).collect());
        assert_eq!(lags(&[]), BTreeSet::new(), "it leads no more");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_is_measured() {
        assert!(resident_memory_bytes().unwrap() > 100_000);
        assert!(open_files().unwrap() >= 3);
    }

    #[test]
    fn the_document_lists_exactly_the_metrics_there_are() {
        let metrics = Metrics::new();
        // Metrics with labels appear with their first label.
        metrics.state_checked(CheckOutcome::Same, 0);
        metrics.request("Kv/Put", "Ok", Duration::ZERO);
        metrics.membership_change("add", ChangeOutcome::Done);
        metrics.leadership_transfer(true);
        let text = metrics.encode(&Figures { lags: vec![(NodeId(2), 0)], ..Figures::default() }).unwrap();
        let counters = |kind: &str| if kind == "counter" { "_total" } else { "" };
        let registered: BTreeSet<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
            .map(|(name, kind)| format!("{name}{} {kind}", counters(kind)))
            .collect();
        let document = include_str!("../../docs/metrics.md");
        let documented: BTreeSet<String> = document
            .lines()
            .filter_map(|line| line.strip_prefix("| `d_engine_"))
            .map(|line| {
                let mut cells = line.split('|').map(str::trim);
                let (name, kind) = (cells.next().unwrap(), cells.next().unwrap());
                let name = name.split(['`', '{']).next().unwrap();
                format!("d_engine_{name} {kind}")
            })
            .collect();
        assert_eq!(registered, documented);
        assert!(registered.len() > 10);
    }
}
