//! The `d-engine` command: one binary that runs a server and talks to a cluster.
//!
//! Each subcommand is a module; each prints through `output` and fails through `failure`, which maps every failure to
//! an exit code. Nothing here decides anything about the cluster: that is the client's or the server's part.

mod args;
mod encoding;
mod failure;
mod kv;
mod logging;
mod member;
mod output;
mod server;
mod status;
mod txn;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, ClientArgs, Command};
use failure::Failure;
use server::LogFormat;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let Cli { client, command } = Cli::parse();
    match run(command, &client) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(command: Command, args: &ClientArgs) -> Result<(), Failure> {
    match command {
        Command::Server(server) => server::run(&server),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "d-engine", &mut script);
            output::bytes(&script)
        }
        Command::Kv(command) => block_on(kv::run(command, args)),
        Command::Status => block_on(status::run(args)),
        Command::Member(command) => block_on(member::run(command, args)),
    }
}

/// Runs a command that talks to a cluster, on this thread.
fn block_on(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let _logging = logging::start(LogFormat::Text, "warn", None)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::io("cannot start the runtime"))?;
    runtime.block_on(command)
}
