//! A command that runs only while something is held: a lock, or a leadership.
//!
//! It is ended when what it needs is lost, or when this program is asked to end: by SIGTERM, and by SIGKILL once its grace
//! is over. What it started itself ends with it: it leads a process group of its own, unless it may want to read from
//! the terminal, which is for the group of the shell's job only.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::pin::pin;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use clap::Args;
use d_engine_client::FencingToken;
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, interval, sleep_until};

use crate::args::duration;
use crate::failure::Failure;
use crate::signals::{EndSignals, INTERRUPT};

/// How often a group that was told to end is looked at.
const PACE: Duration = Duration::from_millis(20);

/// How `--help` ends for commands that run another one.
pub(crate) const EXIT_CODES: &str = "\
Exit codes: that of the command, 128 + n if signal n ended it, 126 or 127 if it could not be run.
Without a command, or before it runs: 0 released, 128 + n if signal n came while waiting, else as all commands.
  7  what was held was lost; the command was ended";

/// The command to run.
#[derive(Debug, Args)]
pub(crate) struct WorkArgs {
    /// Time between SIGTERM and SIGKILL when the command must end
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "5s")]
    pub(crate) grace: Duration,
    /// The command and its arguments, after `--`
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

/// How it ended.
#[derive(Debug)]
pub(crate) enum End {
    /// By itself, or because this program was asked to end.
    Finished(ExitStatus),
    /// It was ended, since what it needs was lost.
    Lost,
}

impl WorkArgs {
    /// Runs the command until it ends, or must end because `lost` is ready. It finds the token in the environment, and
    /// what it is the token of in `variable`.
    pub(crate) async fn run(
        &self,
        (variable, name): (&str, &str),
        token: FencingToken,
        lost: impl Future<Output = ()>,
        signals: &mut EndSignals,
    ) -> Result<End, Failure> {
        // Before there is a child: no change of it is missed.
        let mut changes = signal(SignalKind::child()).map_err(Failure::io("cannot listen for signals"))?;
        let mut work = Work::start(&self.command, |command| {
            command.env("D_ENGINE_FENCING_TOKEN", token.to_string()).env(variable, name);
        })?;
        let mut lost = pin!(lost);
        let (mut is_lost, mut is_killed) = (false, false);
        let mut kill_at = None;
        let status = loop {
            if let Some(status) = work.ended()? {
                break status;
            }
            tokio::select! {
                _ = changes.recv() => {}
                () = &mut lost, if !is_lost => {
                    is_lost = true;
                    work.signal(Signal::TERM);
                    kill_at.get_or_insert(Instant::now() + self.grace);
                }
                signal = signals.next() => match kill_at {
                    // Ctrl-C has reached the command, too: it knows what that means to it.
                    None if signal == INTERRUPT && !work.leads => {}
                    None => {
                        work.signal(Signal::TERM);
                        kill_at = Some(Instant::now() + self.grace);
                    }
                    // Asked twice: for whoever cannot wait.
                    Some(_) => work.signal(Signal::KILL),
                },
                () = sleep_until(kill_at.unwrap_or_else(Instant::now)), if kill_at.is_some() && !is_killed => {
                    is_killed = true;
                    work.signal(Signal::KILL);
                }
            }
        };
        if let Some(kill_at) = kill_at {
            work.end_rest(kill_at).await;
        }
        Ok(if is_lost { End::Lost } else { End::Finished(status) })
    }
}

/// The exit code that a shell gives to this status.
pub(crate) fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

/// A running command.
struct Work {
    child: Child,
    id: Pid,
    /// Whether it leads a process group, whose number is its own.
    leads: bool,
}

impl Work {
    fn start(words: &[OsString], prepare: impl FnOnce(&mut Command)) -> Result<Self, Failure> {
        let (program, arguments) =
            words.split_first().ok_or_else(|| Failure::Usage("a command is missing after --".to_owned()))?;
        let mut command = Command::new(program);
        command.args(arguments);
        prepare(&mut command);
        let leads = !std::io::stdin().is_terminal();
        if leads {
            command.process_group(0);
        }
        let failed = |source| Failure::Command { program: program.to_string_lossy().into_owned(), source };
        let child = command.spawn().map_err(failed)?;
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let id = id.ok_or_else(|| failed(std::io::ErrorKind::InvalidData.into()))?;
        Ok(Self { child, id, leads })
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>, Failure> {
        self.child.try_wait().map_err(Failure::io("cannot wait for the command"))
    }

    /// It has not been waited for, so its number is its own. An error means that it has ended.
    fn signal(&self, signal: Signal) {
        let _ = if self.leads { kill_process_group(self.id, signal) } else { kill_process(self.id, signal) };
    }

    /// Gives what is left of its group until `kill_at`.
    async fn end_rest(&self, kill_at: Instant) {
        let mut pace = interval(PACE);
        while self.leads && test_kill_process_group(self.id).is_ok() {
            if Instant::now() >= kill_at {
                self.signal(Signal::KILL);
                return;
            }
            pace.tick().await;
        }
    }
}
