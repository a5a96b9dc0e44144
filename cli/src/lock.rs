//! `d-engine lock` and `d-engine elect`: to hold a name, alone or while a command runs.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use d_engine_client::{ElectionLeader, Error, FencingToken, Leadership, LockGuard};
use serde_json::json;

use crate::args::{ClientArgs, Layout, duration};
use crate::encoding::base64;
use crate::failure::Failure;
use crate::guarded::{self, End, WorkArgs, exit_code};
use crate::output;
use crate::signals::EndSignals;

#[derive(Debug, Args)]
#[command(after_help = guarded::EXIT_CODES)]
pub(crate) struct LockArgs {
    /// The lock; what it keeps in the store lies below NAME/
    name: String,
    /// The lock is lost so long after the last sign of life
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "10s")]
    ttl: Duration,
    /// Do not wait: exit with 3 if somebody holds it
    #[arg(long = "try")]
    try_only: bool,
    #[command(flatten)]
    work: WorkArgs,
}

#[derive(Debug, Args)]
#[command(after_help = guarded::EXIT_CODES)]
pub(crate) struct ElectArgs {
    /// The election; what it keeps in the store lies below NAME/
    name: String,
    /// What observers hear while this candidate leads, such as its address
    #[arg(required_unless_present = "observe", conflicts_with = "observe")]
    value: Option<String>,
    /// Show who leads, and every change of it, until Ctrl-C
    #[arg(long, conflicts_with_all = ["ttl", "command"])]
    observe: bool,
    /// With --observe: exit after so many lines
    #[arg(long, value_name = "LINES", requires = "observe", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// The lead is lost so long after the last sign of life
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "10s")]
    ttl: Duration,
    #[command(flatten)]
    work: WorkArgs,
}

pub(crate) async fn lock(lock: LockArgs, args: &ClientArgs) -> Result<ExitCode, Failure> {
    let name = args.encoding.decode(&lock.name)?;
    let client = args.client()?;
    let request = client.lock(name).ttl(lock.ttl);
    let acquisition = async {
        match lock.try_only {
            true => request.try_acquire().await,
            false => request.acquire().await.map(Some),
        }
    };
    let mut signals = EndSignals::listen()?;
    let guard = unless_ended(acquisition, &mut signals).await?;
    let guard = guard.ok_or_else(|| {
        Failure::ConditionFailed(format!("lock {} is held by somebody else. Leave out --try to wait for it", lock.name))
    })?;
    Holding { variable: "D_ENGINE_LOCK_NAME", name: &lock.name, held: guard }.keep(&lock.work, args, &mut signals).await
}

pub(crate) async fn elect(elect: ElectArgs, args: &ClientArgs) -> Result<ExitCode, Failure> {
    let election = args.client()?.election(args.encoding.decode(&elect.name)?).ttl(elect.ttl);
    let Some(value) = &elect.value else {
        let mut leaders = election.observe().await?;
        let mut left = elect.count.unwrap_or(u64::MAX);
        while left > 0
            && let Some(leader) = leaders.next().await
        {
            print_leader(leader?.as_ref(), args)?;
            left -= 1;
        }
        return Ok(ExitCode::SUCCESS);
    };
    let value = args.encoding.decode(value)?;
    let mut signals = EndSignals::listen()?;
    let leadership = unless_ended(election.campaign(value), &mut signals).await?;
    let holding = Holding { variable: "D_ENGINE_ELECTION_NAME", name: &elect.name, held: leadership };
    holding.keep(&elect.work, args, &mut signals).await
}

fn print_leader(leader: Option<&ElectionLeader>, args: &ClientArgs) -> Result<(), Failure> {
    match (args.output, leader) {
        (Layout::Json, leader) => output::json_line(&json!({
            "leader": leader.and_then(|leader| output::text(&leader.value)),
            "leader_base64": leader.map(|leader| base64(&leader.value)),
            "token": leader.map(|leader| leader.token.to_string()),
        })),
        (Layout::Table, None) => output::line("nobody leads"),
        (Layout::Table, Some(leader)) => {
            output::line(&format!("{} leads, token {}", args.encoding.encode(&leader.value), leader.token))
        }
    }
}

/// What `wait` gives, unless a signal asks for the end before.
async fn unless_ended<T>(wait: impl Future<Output = Result<T, Error>>, signals: &mut EndSignals) -> Result<T, Failure> {
    tokio::select! {
        held = wait => Ok(held?),
        signal = signals.next() => Err(Failure::Interrupted { signal }),
    }
}

/// What can be held.
trait Held {
    fn token(&self) -> FencingToken;
    /// By a look at the clock.
    fn is_certain(&self) -> bool;
    fn lost(&self) -> impl Future<Output = ()>;
    async fn release(self) -> Result<(), Error>;
}

impl Held for LockGuard {
    fn token(&self) -> FencingToken {
        self.token()
    }
    fn is_certain(&self) -> bool {
        self.is_held()
    }
    fn lost(&self) -> impl Future<Output = ()> {
        self.lost()
    }
    async fn release(self) -> Result<(), Error> {
        self.release().await
    }
}

impl Held for Leadership {
    fn token(&self) -> FencingToken {
        self.token()
    }
    fn is_certain(&self) -> bool {
        self.is_leader()
    }
    fn lost(&self) -> impl Future<Output = ()> {
        self.lost()
    }
    async fn release(self) -> Result<(), Error> {
        self.resign().await
    }
}

/// Something held, and how the command learns its name.
struct Holding<'a, H> {
    variable: &'static str,
    name: &'a str,
    held: H,
}

impl<H: Held> Holding<'_, H> {
    /// Holds it while the command runs; without one, until a signal comes.
    async fn keep(self, work: &WorkArgs, args: &ClientArgs, signals: &mut EndSignals) -> Result<ExitCode, Failure> {
        let token = self.held.token();
        let code = if work.command.is_empty() {
            match args.output {
                Layout::Json => output::json_line(&json!({ "name": self.name, "token": token.to_string() }))?,
                Layout::Table => output::line(&token.to_string())?,
            }
            tokio::select! {
                () = self.held.lost() => return Err(self.lost()),
                _ = signals.next() => ExitCode::SUCCESS,
            }
        } else {
            match work.run((self.variable, self.name), token, self.held.lost(), signals).await? {
                End::Lost => return Err(self.lost()),
                // It may have been lost while this program was stopped, and its timers with it.
                End::Finished(_) if !self.held.is_certain() => return Err(self.lost()),
                End::Finished(status) => ExitCode::from(exit_code(status)),
            }
        };
        // The command has had its lock from beginning to end: what is left is to spare others a wait.
        if let Err(error) = self.held.release().await {
            eprintln!("d-engine: {} stays taken until its time to live is over: {error}", self.name);
        }
        Ok(code)
    }

    fn lost(&self) -> Failure {
        Failure::Lost { name: self.name.to_owned(), token: self.held.token().to_string() }
    }
}
