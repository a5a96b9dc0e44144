//! The `d-engine` command: one binary that runs a server and talks to a cluster.
//!
//! Each subcommand is a module; each prints through `output` and fails through `failure`, which maps every failure to
//! an exit code. Nothing here decides anything about the cluster: that is the client's or the server's part.

mod args;
mod change;
mod check;
mod compact;
mod encoding;
mod export;
mod failure;
mod guarded;
mod history;
mod kv;
mod lease;
mod lock;
mod logging;
mod member;
mod output;
mod server;
mod signals;
mod snapshot;
mod status;
mod txn;
mod watch;

use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};

use args::{Cli, ClientArgs, Command};
use failure::Failure;
use server::LogFormat;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let Cli { client, command } = Cli::parse();
    match run(command, &client) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

fn run(command: Command, args: &ClientArgs) -> Result<ExitCode, Failure> {
    let done = match command {
        Command::Server(server) => server::run(&server),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "d-engine", &mut script);
            output::bytes(&script)
        }
        Command::Kv(command) => block_on(kv::run(command, args)),
        Command::Watch(watch) => block_on(watch::run(watch, args)),
        Command::Lease(command) => block_on(lease::run(command, args)),
        Command::Lock(lock) => return block_on(lock::lock(lock, args)),
        Command::Elect(elect) => return block_on(lock::elect(elect, args)),
        Command::Compact(compact) => block_on(compact::run(compact, args)),
        Command::Check => block_on(check::run(args)),
        Command::Snapshot(command) => snapshot::run(command, args),
        Command::Status => block_on(status::run(args)),
        Command::Member(command) => block_on(member::run(command, args)),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Runs a command that talks to a cluster, on this thread.
fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let _logging = logging::start(LogFormat::Text, "warn", None, None)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::io("cannot start the runtime"))?;
    let result = runtime.block_on(command);
    runtime.block_on(farewell());
    result
}

/// Gives what goes on in the background a moment to end, such as leaving a queue: the tasks of a client end with it.
async fn farewell() {
    const PATIENCE: Duration = Duration::from_secs(2);
    const PACE: Duration = Duration::from_millis(2);
    let tasks = tokio::runtime::Handle::current().metrics();
    let until = tokio::time::Instant::now() + PATIENCE;
    while tasks.num_alive_tasks() > 0 && tokio::time::Instant::now() < until {
        tokio::time::sleep(PACE).await;
    }
}
