//! Who leads, and for how long that may be believed.
//!
//! The read lease runs from the *send* time of the last append a quorum acknowledged. A voter that acknowledges one
//! grants no other vote for `election_timeout_max`, and the configuration keeps the lease shorter than that by more
//! than clocks may drift apart (Raft dissertation, section 6.4.1).
//!
//! The lease stays zero until the first entry of the reign is applied here: before that, memory may lack writes that
//! an earlier leader acknowledged. It is zero for the rest of a reign whose transfer was asked for: the successor is
//! elected without waiting for it.
//!
//! ```text
//! leader A                        voter B                        A without the first rule of transfers
//! ask B to take over, lease kept  campaign, elected in T+1       "lease valid": answers a read from T
//!                                 acknowledges a write in T+1    stale
//! ```
//!
//! The store clock runs while this node leads and the first entry of its reign is applied here: from the store time
//! applied by then, by our own clock. It carries nothing over from an earlier reign: a deposed leader goes on counting
//! until it notices, while others lead or nobody does, and a lease granted meanwhile would end early by that much. For
//! the same reason what is stamped in one reign is proposed in that reign or not at all. Time that no entry carried is
//! lost with its reign, so that a lease may last longer, never shorter.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use d_engine_proto::Term;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::handle::Timings;
use super::raft_types::Raft;
use crate::clock::Moment;
use crate::metrics::Metrics;
use crate::state_machine::StoreTime;
use crate::storage::LogPosition;

/// The leader of a reign. Every reign has its own term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaderInfo {
    /// The leading node.
    pub leader_id: u32,
    /// Its term.
    pub term: u64,
}

/// What a node is doing in Raft's eyes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Replicates, without a vote.
    Learner,
    /// Replicates and votes.
    Follower,
    /// Campaigns.
    Candidate,
    /// Leads, with or without a valid lease.
    Leader,
}

/// Lease, leader and store clock of this node, kept true by [`Monitor`].
pub(super) struct Leadership {
    info: watch::Sender<Option<LeaderInfo>>,
    role: AtomicU8,
    term: AtomicU64,
    /// End of the read lease as nanoseconds of [`Moment`]; 0: none. Read without a lock on every lease read.
    lease_end: AtomicU64,
    /// What store time is ahead of [`Moment`], in nanoseconds; [`STANDS_STILL`] outside of a reign. Read without a lock
    /// on every read; changed together with `reign.clock_term`.
    store_clock: AtomicI64,
    /// Whether the store clock runs, for those who wait.
    reigning: watch::Sender<bool>,
    reign: Mutex<Reign>,
    /// When the leader was last heard, as nanoseconds of [`Moment`].
    heard: AtomicU64,
}

#[derive(Default)]
struct Reign {
    /// The term whose lease was given up for a transfer.
    renounced: Option<u64>,
    /// Transfers under way; openraft hands over whichever term it is in, so there is no lease at all meanwhile.
    transfers: u32,
    /// The term whose store clock runs.
    clock_term: Option<u64>,
}

const STANDS_STILL: i64 = i64::MIN;

/// The store time of a new batch, and the only term in which it may be proposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) store_time: StoreTime,
    pub(super) term: u64,
}

impl Leadership {
    pub(super) fn new() -> Self {
        Self {
            info: watch::Sender::new(None),
            role: AtomicU8::new(0),
            term: AtomicU64::new(0),
            lease_end: AtomicU64::new(0),
            store_clock: AtomicI64::new(STANDS_STILL),
            reigning: watch::Sender::new(false),
            reign: Mutex::default(),
            heard: AtomicU64::new(0),
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Option<LeaderInfo>> {
        self.info.subscribe()
    }

    pub(super) fn info(&self) -> Option<LeaderInfo> {
        *self.info.borrow()
    }

    /// Whether this node leads and may answer reads from memory, by the clock of this very moment.
    pub(super) fn lease_is_valid(&self) -> bool {
        nanoseconds(Moment::now()) < self.lease_end.load(Ordering::Acquire)
    }

    /// Zero without a lease.
    fn lease_left(&self) -> Duration {
        let end = self.lease_end.load(Ordering::Acquire);
        Duration::from_nanos(end.saturating_sub(nanoseconds(Moment::now())))
    }

    pub(super) fn term(&self) -> Term {
        Term(self.term.load(Ordering::Relaxed))
    }

    pub(super) fn role(&self) -> Role {
        match self.role.load(Ordering::Relaxed) {
            1 => Role::Follower,
            2 => Role::Candidate,
            3 => Role::Leader,
            _ => Role::Learner,
        }
    }

    /// Gives up the lease for the rest of `term`, and any lease until the result is dropped. From the return on no
    /// read is served under one.
    #[must_use]
    pub(super) fn renounce(self: &Arc<Self>, term: u64) -> Renounced {
        let mut reign = self.reign.lock();
        reign.renounced = Some(term);
        reign.transfers += 1;
        self.lease_end.store(0, Ordering::Release);
        Renounced(self.clone())
    }

    /// Sets the end of the lease of node `me`, unless it gave that up; then it is no leader either, as far as anybody is
    /// told. Answers who is.
    fn grant(&self, me: u32, info: Option<LeaderInfo>, lease_end: u64) -> Option<LeaderInfo> {
        let reign = self.reign.lock();
        let given_up = |info: &LeaderInfo| reign.transfers > 0 || reign.renounced == Some(info.term);
        let info = info.filter(|info| info.leader_id != me || !given_up(info));
        self.lease_end.store(if info.is_some() { lease_end } else { 0 }, Ordering::Release);
        info
    }

    /// Whether the lease of `term` was given up in a transfer that is over: if this node still leads in it, it failed.
    pub(super) fn has_renounced(&self, term: u64) -> bool {
        let reign = self.reign.lock();
        reign.transfers == 0 && reign.renounced == Some(term)
    }

    /// How long the leader has been silent; since ever, if none was heard.
    pub(super) fn silence(&self) -> Duration {
        Duration::from_nanos(nanoseconds(Moment::now()).saturating_sub(self.heard.load(Ordering::Relaxed)))
    }

    /// To be called when an append of the current leader was accepted.
    pub(super) fn leader_was_heard(&self) {
        self.heard.fetch_max(nanoseconds(Moment::now()), Ordering::Relaxed);
    }

    /// Store time at this moment; `None` unless this node reigns. Within a reign it never goes back, and a batch that is
    /// stamped later carries no less.
    pub(super) fn store_time(&self) -> Option<StoreTime> {
        let ahead = self.store_clock.load(Ordering::Acquire);
        (ahead != STANDS_STILL)
            .then(|| StoreTime(Duration::from_nanos(nanoseconds(Moment::now()).saturating_add_signed(ahead))))
    }

    /// As [`store_time`](Self::store_time), but gives a reign that has just begun the time to apply its first entry.
    pub(super) async fn store_time_within(&self, patience: Duration) -> Option<StoreTime> {
        if let Some(now) = self.store_time() {
            return Some(now);
        }
        let mut reigning = self.reigning.subscribe();
        // Late or not, the clock has the last word.
        let _ = tokio::time::timeout(patience, reigning.wait_for(|reigning| *reigning)).await;
        self.store_time()
    }

    /// Follows whether [`store_time`](Self::store_time) has an answer.
    pub(super) fn reigning(&self) -> watch::Receiver<bool> {
        self.reigning.subscribe()
    }

    /// The stamp of a new batch; `None` before the clock runs: applying never lets store time go back.
    pub(super) fn stamp(&self) -> Option<Stamp> {
        let reign = self.reign.lock();
        Some(Stamp { store_time: self.store_time()?, term: reign.clock_term? })
    }

    /// Starts the store clock at `applied` if the reign is a new one; without a reign it stands still.
    fn keep_store_clock(&self, reign_of: Option<u64>, applied: StoreTime) {
        let mut reign = self.reign.lock();
        match reign_of {
            Some(_) if reign.clock_term == reign_of => return,
            Some(_) => {
                // Read after what is applied was: whatever that contains was proposed before this moment.
                let now = nanoseconds(Moment::now()).cast_signed();
                let applied = duration_nanoseconds(applied.0).cast_signed();
                self.store_clock.store(applied.saturating_sub(now), Ordering::Release);
            }
            None => self.store_clock.store(STANDS_STILL, Ordering::Release),
        }
        reign.clock_term = reign_of;
        drop(reign);
        self.reigning
            .send_if_modified(|reigning| std::mem::replace(reigning, reign_of.is_some()) != reign_of.is_some());
    }
}

/// While it lives this node has no lease, in any term.
pub(super) struct Renounced(Arc<Leadership>);

impl Drop for Renounced {
    fn drop(&mut self) {
        let term = self.0.term().get();
        let mut reign = self.0.reign.lock();
        reign.transfers -= 1;
        // The reign of now may be the one that was handed over.
        reign.renounced = reign.renounced.max(Some(term));
    }
}

fn nanoseconds(moment: Moment) -> u64 {
    u64::try_from(moment.since(Moment::default()).as_nanos()).unwrap_or(u64::MAX)
}

/// How far the state machine has come, as the applier publishes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Applied {
    pub(super) position: Option<LogPosition>,
    pub(super) store_time: StoreTime,
}

/// The task that watches openraft and keeps [`Leadership`] true.
pub(super) struct Monitor {
    pub(super) raft: Raft,
    pub(super) leadership: Arc<Leadership>,
    pub(super) applied: watch::Receiver<Applied>,
    pub(super) timings: Timings,
    pub(super) metrics: Arc<Metrics>,
}

/// What the monitor needs of openraft's metrics, copied out quickly: holding them blocks the core.
struct Observed {
    role: Role,
    term: u64,
    leader: Option<u32>,
    quorum_acknowledged: Option<Moment>,
    sole_voter: bool,
}

impl Monitor {
    /// Runs until openraft stops.
    pub(super) async fn run(mut self) {
        let mut changes = self.raft.server_metrics();
        // The lease ends by the clock, whatever this task does; the period only bounds how soon that is published
        // and how much of a renewed lease is used.
        let mut tick = tokio::time::interval(self.timings.lease / 8);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if self.observe().is_none() {
                break;
            }
            let lease_left = self.leadership.lease_left();
            tokio::select! {
                changed = WatchReceiver::changed(&mut changes) => if changed.is_err() {
                    break;
                },
                // Readiness follows the first entry of a reign at once.
                changed = self.applied.changed(), if self.leadership.info().is_none() => if changed.is_err() {
                    break;
                },
                // The end of the lease is published at once.
                () = tokio::time::sleep(lease_left), if !lease_left.is_zero() => {}
                _ = tick.tick() => {}
            }
        }
        self.leadership.role.store(0, Ordering::Relaxed);
        self.leadership.keep_store_clock(None, StoreTime::default());
        self.publish(None, 0);
    }

    /// `None` once openraft has stopped.
    fn observe(&mut self) -> Option<()> {
        // Before what it is compared with: a pause in between must not make a lease longer.
        let now = Moment::now();
        let observed = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.running_state.as_ref().ok()?;
            let membership = metrics.membership_config.membership();
            let mut voters = membership.voter_ids();
            Observed {
                role: match metrics.state {
                    ServerState::Leader => Role::Leader,
                    ServerState::Candidate => Role::Candidate,
                    ServerState::Follower => Role::Follower,
                    _ => Role::Learner,
                },
                term: metrics.current_term,
                // Known by its address too: what is published can be reached.
                leader: metrics.current_leader.filter(|leader| membership.get_node(leader).is_some()),
                quorum_acknowledged: metrics.last_quorum_acked.map(|acknowledged| acknowledged.into_inner().0),
                sole_voter: voters.next() == Some(metrics.id) && voters.next().is_none(),
            }
        };
        let applied = *self.applied.borrow_and_update();
        let reign_is_applied = applied.position.is_some_and(|position| position.term.get() == observed.term);
        self.leadership.role.store(
            match observed.role {
                Role::Learner => 0,
                Role::Follower => 1,
                Role::Candidate => 2,
                Role::Leader => 3,
            },
            Ordering::Relaxed,
        );
        self.leadership.term.store(observed.term, Ordering::Relaxed);
        self.metrics.raft_role(observed.term, observed.role == Role::Leader);
        let (info, lease_end) = if observed.role == Role::Leader {
            let acknowledged = if observed.sole_voter { Some(now) } else { observed.quorum_acknowledged };
            let end = acknowledged.map(|acknowledged| acknowledged + self.timings.lease);
            let valid = end.filter(|end| reign_is_applied && *end > now);
            (valid.map(|_| self.raft.node_id()), valid.map_or(0, nanoseconds))
        } else {
            let heard = self.leadership.heard.load(Ordering::Relaxed);
            let fresh = nanoseconds(now).saturating_sub(heard) < duration_nanoseconds(self.timings.election_max);
            (observed.leader.as_ref().filter(|_| fresh && reign_is_applied), 0)
        };
        let info = info.map(|leader_id| LeaderInfo { leader_id: *leader_id, term: observed.term });
        let reigns = observed.role == Role::Leader && reign_is_applied;
        // Before the lease is published: under a lease there is a store time.
        self.leadership.keep_store_clock(reigns.then_some(observed.term), applied.store_time);
        self.publish(info, lease_end);
        Some(())
    }

    fn publish(&self, info: Option<LeaderInfo>, lease_end: u64) {
        let info = self.leadership.grant(*self.raft.node_id(), info, lease_end);
        let changed = self.leadership.info.send_if_modified(|current| {
            let changed = *current != info;
            *current = info;
            changed
        });
        if changed {
            match info {
                Some(info) => tracing::info!(leader = info.leader_id, term = info.term, "leader known"),
                None => tracing::info!("no leader"),
            }
            self.metrics.leader_changed();
        }
    }
}

fn duration_nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> StoreTime {
        StoreTime(Duration::from_secs(seconds))
    }

    #[test]
    fn the_store_clock_runs_within_a_reign_and_never_goes_back() {
        let leadership = Leadership::new();
        assert_eq!((leadership.store_time(), leadership.stamp()), (None, None));
        leadership.keep_store_clock(Some(3), seconds(1000));
        let mut last = seconds(1000);
        for _ in 0..1000 {
            let read = leadership.store_time().unwrap();
            let stamp = leadership.stamp().unwrap();
            assert!(last <= read && read <= stamp.store_time);
            assert_eq!(stamp.term, 3);
            last = stamp.store_time;
            // What is applied meanwhile does not move it.
            leadership.keep_store_clock(Some(3), seconds(5));
        }
    }

    #[test]
    fn a_lease_that_was_given_up_is_gone_at_once_and_for_the_rest_of_its_term() {
        let leadership = Arc::new(Leadership::new());
        // As the monitor does when a quorum has acknowledged.
        let renewed = |term| {
            leadership.term.store(term, Ordering::Relaxed);
            let own = LeaderInfo { leader_id: 1, term };
            leadership.grant(1, Some(own), u64::MAX) == Some(own)
        };
        assert!(renewed(3) && leadership.lease_is_valid());
        let transfer = leadership.renounce(3);
        assert!(!leadership.lease_is_valid(), "before anybody is asked to take over");
        assert!(!renewed(3) && !leadership.lease_is_valid());
        assert!(!renewed(4) && !leadership.lease_is_valid(), "whichever term it is that is handed over");
        let next = LeaderInfo { leader_id: 2, term: 5 };
        assert_eq!(leadership.grant(1, Some(next), 0), Some(next), "others lead as they do");
        leadership.term.store(4, Ordering::Relaxed);
        drop(transfer);
        assert!(!renewed(4) && !leadership.lease_is_valid(), "nobody knows whether the successor still campaigns");
        assert!(renewed(6) && leadership.lease_is_valid(), "a reign of its own");
    }

    #[test]
    fn a_new_reign_carries_nothing_over_from_the_one_before() {
        let leadership = Leadership::new();
        leadership.keep_store_clock(Some(3), seconds(1000));
        for through_nothing in [true, false] {
            if through_nothing {
                leadership.keep_store_clock(None, seconds(7));
                assert_eq!(leadership.store_time(), None);
                assert!(!*leadership.reigning().borrow());
            }
            let before = Moment::now();
            let term = leadership.stamp().map_or(8, |stamp| stamp.term + 2);
            leadership.keep_store_clock(Some(term), seconds(7));
            let Stamp { store_time, term: stamped } = leadership.stamp().unwrap();
            assert!(store_time >= seconds(7) && store_time.0 <= seconds(7).0 + Moment::now().since(before));
            assert_eq!(stamped, term);
            assert!(*leadership.reigning().borrow());
        }
    }
}
