//! A server, and commands that talk to it.
#![allow(dead_code, reason = "each test program uses a part")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long is waited for what should happen soon.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_d-engine");

/// A server of one node, in a temporary directory of its own.
pub(crate) struct Server {
    pub(crate) process: Child,
    pub(crate) address: String,
    /// Where it makes its directory: being killed, it cannot tidy up.
    _temporary: TempDir,
}

impl Server {
    pub(crate) fn start() -> Self {
        // Asked of the system, and free again: another program may take it meanwhile, and the server would not start.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let temporary = TempDir::new().unwrap();
        let process = Command::new(PROGRAM)
            .env("TMPDIR", temporary.path())
            .args(["server", "--dev", "--listen-address", &address])
            .env("D_ENGINE_LOG", "error")
            .spawn()
            .unwrap();
        let mut server = Self { process, address, _temporary: temporary };
        let begun = Instant::now();
        while !server.run(&["status"]).status.success() {
            assert_eq!(server.process.try_wait().unwrap(), None, "the server ended");
            assert!(begun.elapsed() < PATIENCE, "the server never got ready");
        }
        server
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        run(&self.address, arguments, b"")
    }

    /// What a successful command prints.
    pub(crate) fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let text = self.text(&[&["-o", "json"], arguments].concat());
        serde_json::from_str(&text).unwrap()
    }

    /// The exit code of a command that fails, and what it says.
    pub(crate) fn failure(&self, arguments: &[&str]) -> (i32, String) {
        code_and_message(self.run(arguments))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn run(endpoint: &str, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(PROGRAM)
        .args(arguments)
        .env("D_ENGINE_ENDPOINTS", endpoint)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that reads nothing may have ended already.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

pub(crate) fn code_and_message(output: Output) -> (i32, String) {
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// A command that goes on. Killed on drop.
pub(crate) struct Running {
    child: Child,
    _input: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Server {
    /// Starts a command whose output is read line by line.
    pub(crate) fn spawn(&self, arguments: &[&str]) -> Running {
        // The tests may run where Ctrl-C is ignored.
        self.spawn_with("--default-signal=INT", arguments)
    }

    /// Starts it with signals set by `env` as this option says.
    pub(crate) fn spawn_with(&self, signals: &str, arguments: &[&str]) -> Running {
        let mut child = Command::new("env")
            .args([signals, PROGRAM])
            .args(arguments)
            .env("D_ENGINE_ENDPOINTS", &self.address)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, lines) = mpsc::sync_channel(1024);
        std::thread::spawn(move || {
            BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Running { child, _input: input, lines }
    }

    /// Asks again and again until the command prints this.
    pub(crate) fn prints(&self, arguments: &[&str], expected: &str) {
        let begun = Instant::now();
        while self.run(arguments).stdout != expected.as_bytes() {
            assert!(begun.elapsed() < PATIENCE, "{arguments:?} never printed {expected:?}");
        }
    }
}

impl Running {
    /// The next line.
    pub(crate) fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).unwrap()
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for its end; the exit code.
    pub(crate) fn code(&mut self) -> i32 {
        ended(&mut self.child).code().unwrap()
    }

    /// The lines that were not read yet, up to the last, once it has ended.
    pub(crate) fn rest(&self) -> Vec<String> {
        self.lines.iter().collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for the end of a process.
pub(crate) fn ended(child: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "it never ended");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}
