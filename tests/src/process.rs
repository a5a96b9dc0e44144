//! One server process: started, signalled, and certain to die with the test.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// The `d-engine` binary built in the same workspace, or the one that the environment variable `D_ENGINE` names.
///
/// # Panics
/// When it is not there; the message says how to build it.
#[must_use]
pub fn d_engine() -> PathBuf {
    if let Some(path) = std::env::var_os("D_ENGINE") {
        return path.into();
    }
    built("d-engine")
}

/// The binary of this name built in the same workspace.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn built(name: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("a running program has a path");
    exe.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("no {name} near {}: run `cargo build --workspace --bins` first", exe.display()))
}

/// A command of which the kernel kills the process when the thread that started it ends, so that a test that dies
/// leaves no server behind. Start it from a thread that lives as long as it should: no `spawn_blocking`.
#[must_use]
pub fn bound_to_this_thread(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

/// A running process whose output goes to a file. Killed on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, appending its output to `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(mut command: Command, log: &Path) -> Self {
        let output: File = OpenOptions::new().create(true).append(true).open(log).expect("the log file opens");
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a file can be shared"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self { child, log: log.to_owned() }
    }

    /// Starts `command` as [`start`](Self::start) does, but to be talked to by standard input and output; only what it
    /// says on standard error goes to `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_to_talk_to(mut command: Command, log: &Path) -> (Self, ChildStdin, ChildStdout) {
        let errors = OpenOptions::new().create(true).append(true).open(log).expect("the log file opens");
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let (input, output) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        (Self { child, log: log.to_owned() }, input, output)
    }

    /// Everything it has printed, and those that wrote to the same file before it.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, once it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// SIGKILL: no last words. Returns when it is gone.
    pub fn kill(&mut self) {
        // SIGKILL also ends a stopped process; an error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGSTOP: it stands still and does not know it.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT: it goes on as if no time had passed.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGTERM, then waits for it to end by itself.
    ///
    /// # Panics
    /// When it does not.
    pub async fn stop(&mut self, patience: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        self.exit(patience).await
    }

    /// Waits for it to end by itself.
    ///
    /// # Panics
    /// When it does not.
    pub async fn exit(&mut self, patience: Duration) -> ExitStatus {
        let what = format!("the end of process {}", self.id());
        let child = &mut self.child;
        wait::until(&what, patience, || {
            let ended = child.try_wait().expect("a child can be waited for");
            async move { ended }
        })
        .await
    }

    fn signal(&self, signal: Signal) {
        send(&self.child, signal);
    }
}

/// Sends a signal to a child that was not waited for.
pub(crate) fn send(child: &Child, signal: Signal) {
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("process ids are positive");
    kill_process(id, signal).expect("a child can be signalled");
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
