//! What an agent does, a few times a second: look at the state, and bring its PostgreSQL there.
//!
//! Everything that must not go wrong hangs on the order of two things, never on a clock:
//!
//! ```text
//! alone:      swap the state to "no standby"           then   acknowledge without the standby
//! in sync:    have every commit wait, until the         then   swap the state to "this standby"
//!             standby has all of the log before that
//! promote:    swap the state to the next term           then   promote
//! ```
//!
//! The swaps exclude each other: either the primary says first that it goes on alone, and the promotion fails, or the
//! standby is promoted first, and the primary waits for ever for a commit that nobody acknowledges. Time to live and
//! patience only decide how soon something happens.

use std::time::{Duration, Instant};

use d_engine::client::{LeaseKeeper, LeaseState};

use crate::Result;
use crate::pair::{Pair, State};
use crate::postgres::Postgres;

/// How long commits wait for a standby that is gone before the primary goes on alone.
const STANDBY_PATIENCE: Duration = Duration::from_secs(3);
/// How long a standby tries to follow before it copies the primary anew.
const FOLLOW_PATIENCE: Duration = Duration::from_secs(10);

/// How the primary acknowledges commits. Not known across restarts of PostgreSQL, which begin with `WithStandby`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Commits {
    /// Each waits for the standby, and did so from this point of the log on.
    WithStandby { from: u64 },
    /// None waits.
    Alone,
}

/// An agent that keeps a PostgreSQL.
pub(crate) struct Agent {
    id: u32,
    pair: Pair,
    postgres: Postgres,
    /// As primary of a term: its sign of life.
    life: Option<(u64, LeaseKeeper)>,
    /// As primary: how it acknowledges, once that is certain.
    commits: Option<Commits>,
    /// Since when the other PostgreSQL cannot be followed, or does not follow.
    apart_since: Option<Instant>,
    /// What was said last, which is not repeated.
    said: String,
}

impl Agent {
    pub(crate) fn new(id: u32, pair: Pair, postgres: Postgres) -> Self {
        Self { id, pair, postgres, life: None, commits: None, apart_since: None, said: String::new() }
    }

    /// Runs until it is told to end.
    pub(crate) async fn run(mut self, told_to_end: impl Future<Output = ()>) {
        let mut told_to_end = std::pin::pin!(told_to_end);
        let mut pace = tokio::time::interval(Duration::from_millis(250));
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let turn = async {
                pace.tick().await;
                self.turn().await;
            };
            tokio::select! {
                biased;
                () = &mut told_to_end => break,
                () = turn => {}
            }
        }
        // First the server, then the sign of life: nobody is promoted while it still stops.
        self.postgres.stop().await;
        if let Some((_, life)) = self.life.take() {
            // Else it ends by itself.
            let _ = life.revoke().await;
        }
    }

    async fn turn(&mut self) {
        let mut life = self.life.as_ref().map(|(_, life)| life.states());
        let out_of_touch = async {
            match &mut life {
                Some(states) => drop(states.wait_for(|state| *state != LeaseState::Alive).await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // A third of the time to live is left: enough to stop before anybody else can be promoted.
            () = out_of_touch => {
                self.say("out of touch: PostgreSQL stops");
                self.life = None;
                self.postgres.kill().await;
            }
            done = self.step() => if let Err(error) = done {
                self.say(&format!("waits: {error}"));
            },
        }
    }

    async fn step(&mut self) -> Result<()> {
        let (peer, address) = self.pair.peer_of(self.id)?;
        match self.pair.state().await? {
            None => self.found().await,
            Some(state) if state.primary == self.id => self.reign(state, peer, &address).await,
            Some(state) => self.follow(state, &address).await,
        }
    }

    /// Makes a database, and offers it as the pair's first.
    async fn found(&mut self) -> Result<()> {
        if self.postgres.term()?.is_none() {
            self.postgres.initialise().await?;
        }
        self.pair.swap(None, &State::first(self.id)).await.map(drop)
    }

    async fn reign(&mut self, state: State, peer: u32, address: &str) -> Result<()> {
        match self.postgres.term()? {
            Some(term) if term == state.term || term + 1 == state.term => {}
            found => return Err(format!("the primary of term {} has data of term {found:?}", state.term).into()),
        }
        if self.life.as_ref().is_none_or(|(term, _)| *term != state.term) {
            self.life = Some((state.term, self.pair.live(state.term).await?));
        }
        if self.postgres.start(peer, address)? {
            self.commits = None;
            self.apart_since = None;
        }
        if self.postgres.is_standby().await? {
            self.say(&format!("is promoted to primary of term {}", state.term));
            return self.postgres.promote().await;
        }
        if self.postgres.term()? != Some(state.term) {
            self.postgres.set_term(state.term)?;
        }
        self.keep_standby(state, peer, address).await
    }

    /// As primary: waits for the standby while it is there, and goes on alone when it is not.
    async fn keep_standby(&mut self, state: State, peer: u32, address: &str) -> Result<()> {
        let commits = match self.commits {
            Some(commits) => commits,
            None => Commits::WithStandby { from: self.postgres.flushed().await? },
        };
        self.commits = Some(commits);
        let standby = self.postgres.standby(peer).await?;
        if !standby.is_near {
            let patient = self.apart_since.get_or_insert_with(Instant::now).elapsed() < STANDBY_PATIENCE;
            if patient || commits == Commits::Alone {
                return Ok(());
            }
            // Always a new state, also if it says the same: a swap still under way that says otherwise then fails.
            if self.pair.swap(Some(&state), &state.with_standby(None)).await? {
                self.commits = Some(Commits::Alone);
                if let Err(error) = self.postgres.acknowledge_alone(peer, address).await {
                    // It may wait or not. Started again, it does.
                    self.postgres.kill().await;
                    return Err(error);
                }
                self.say(&format!("primary of term {}, alone", state.term));
            }
            return Ok(());
        }
        self.apart_since = None;
        match commits {
            Commits::Alone => {
                self.postgres.wait_for_standby(peer, address).await?;
                self.commits = Some(Commits::WithStandby { from: self.postgres.flushed().await? });
            }
            Commits::WithStandby { from } if standby.flushed >= from => {
                if state.standby.is_none() {
                    self.pair.swap(Some(&state), &state.with_standby(Some(peer))).await?;
                }
                self.say(&format!("primary of term {}, agent {peer} in sync", state.term));
            }
            Commits::WithStandby { .. } => {}
        }
        Ok(())
    }

    async fn follow(&mut self, state: State, primary: &str) -> Result<()> {
        if self.life.take().is_some() {
            self.say("is primary no longer");
        }
        if self.postgres.term()? != Some(state.term) {
            // What an old primary has beyond the new one was never acknowledged.
            self.postgres.kill().await;
            self.postgres.clone_from(primary, state.term).await?;
        }
        if self.postgres.start(state.primary, primary)? {
            self.apart_since = None;
        }
        self.commits = None;
        if !self.pair.is_alive(state.term).await? {
            if state.standby != Some(self.id) {
                return Err("the primary is gone, and this standby may lack commits".into());
            }
            self.say(&format!("the primary of term {} is gone", state.term));
            return self.pair.swap(Some(&state), &state.promoted(self.id)).await.map(drop);
        }
        if self.postgres.receives().await? {
            self.apart_since = None;
            self.say(&format!("standby of term {}", state.term));
        } else if self.apart_since.get_or_insert_with(Instant::now).elapsed() > FOLLOW_PATIENCE
            && state.standby.is_none()
        {
            // Too far behind: what it needs is no longer kept.
            self.apart_since = None;
            self.postgres.clone_from(primary, state.term).await?;
        }
        Ok(())
    }

    fn say(&mut self, what: &str) {
        if self.said != what {
            println!("agent {}: {what}", self.id);
            what.clone_into(&mut self.said);
        }
    }
}
