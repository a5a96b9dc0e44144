//! A client in a process of its own, `d-engine-puppet`, that does what it is told line by line: what is done to a
//! process, such as stopping it, can then be done to a client.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};

use rustix::process::Signal;
use tokio::sync::mpsc;

use crate::process::{bound_to_this_thread, send};
use crate::wait;

/// Lines that nobody has read yet.
const LINES_MAX: usize = 1024;

/// See the module's description. Killed on drop.
#[derive(Debug)]
pub struct Puppet {
    child: Child,
    orders: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Puppet {
    /// Starts the binary at `program` with a client of these endpoints.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(program: &Path, endpoints: &[String]) -> Self {
        let mut command = bound_to_this_thread(program);
        command.args(endpoints).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let orders = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let (said, lines) = mpsc::channel(LINES_MAX);
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if said.blocking_send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, orders, lines }
    }

    /// Gives an order. It waits in the pipe if the process stands still.
    ///
    /// # Panics
    /// When the process has ended.
    pub fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").and_then(|()| self.orders.flush()).expect("the puppet takes orders");
    }

    /// The next line it says.
    ///
    /// # Panics
    /// When it has ended, or says nothing.
    pub async fn line(&mut self) -> String {
        let line = tokio::time::timeout(wait::PATIENCE, self.lines.recv()).await;
        line.expect("the puppet says something").expect("the puppet lives")
    }

    /// SIGSTOP.
    pub fn pause(&self) {
        send(&self.child, Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        send(&self.child, Signal::CONT);
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
