//! Two processes that both believe to hold a lock, and the resource that knows better.
//!
//! ```text
//!   first holder    looks: held | stopped ............ | goes on, writes with token 7: refused
//!   second holder                | gets the lock, writes with token 9: accepted
//! ```
//!
//! The first holder is a process of its own, this program started with [`HOLDER`], so that it can be stopped as a whole.
//! It speaks in lines over its pipes: `held`, then waits to be told `go`, then `write`, then waits for the answer.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ExitCode, Stdio};
use std::time::{Duration, Instant};

use d_engine_client::{Client, FencingToken};
use d_engine_tests::process::bound_to_this_thread;
use d_engine_tests::wait::PATIENCE;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::mpsc;

use crate::tally::Tally;

/// First argument of the program when it is to be the first holder; endpoints follow.
pub(crate) const HOLDER: &str = "hold-a-lock";
const LOCK: &str = "demo/lock";
const TTL: Duration = Duration::from_secs(1);

/// What the lock guards. It keeps the greatest token it has seen and refuses smaller ones: that is all it needs.
#[derive(Debug, Default)]
struct Resource {
    greatest: Option<FencingToken>,
}

impl Resource {
    /// Whether the write was accepted.
    fn write(&mut self, token: FencingToken) -> bool {
        let accepted = self.greatest.is_none_or(|greatest| token >= greatest);
        if accepted {
            self.greatest = Some(token);
        }
        accepted
    }
}

/// How it went.
#[derive(Debug)]
pub(crate) struct Fenced {
    pub(crate) refused: FencingToken,
    pub(crate) accepted: FencingToken,
    /// From the stop of the first holder to the lock of the second.
    pub(crate) takeover: Duration,
}

/// Plays it through.
pub(crate) async fn play(client: &Client, endpoints: &[String], tally: &Tally) -> Fenced {
    let mut resource = Resource::default();
    let mut first = Holder::start(endpoints);
    let token = first.says("held").await;
    first.hears("go");
    let written = first.says("write").await;
    check(tally, resource.write(written), "the only holder of the lock was refused");
    first.hears("accepted");

    // It has looked, and is stopped before it writes: no look can be late enough.
    check(tally, first.says("held").await == token, "a holder's token changed");
    first.signal(Signal::STOP);
    let stopped = Instant::now();
    let second = client.lock(LOCK).ttl(TTL).timeout(PATIENCE).acquire().await.unwrap();
    let takeover = stopped.elapsed();
    let accepted = second.token();
    check(tally, accepted > token, "a later holder got a token that is not greater");
    check(tally, resource.write(accepted), "the new holder of the lock was refused");

    first.signal(Signal::CONT);
    first.hears("go");
    let refused = first.says("write").await;
    check(tally, !resource.write(refused), "a holder that had lost the lock was accepted");
    first.hears("refused");
    check(tally, first.says("lost").await == token, "a holder that was stopped too long believes to hold the lock");
    second.release().await.unwrap();
    Fenced { refused, accepted, takeover }
}

fn check(tally: &Tally, holds: bool, otherwise: &str) {
    if !holds {
        tally.violation(otherwise.to_owned());
    }
}

/// The process of the first holder. Killed on drop.
struct Holder {
    child: Child,
    input: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Holder {
    fn start(endpoints: &[String]) -> Self {
        let program = std::env::current_exe().unwrap();
        let mut command = bound_to_this_thread(&program);
        command.arg(HOLDER).args(endpoints).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel(16);
        std::thread::spawn(move || {
            BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.blocking_send(line))
        });
        Self { child, input, lines }
    }

    /// The token in the next line, which says this.
    async fn says(&mut self, word: &str) -> FencingToken {
        let line = tokio::time::timeout(PATIENCE, self.lines.recv()).await.unwrap().unwrap();
        line.strip_prefix(word).and_then(|rest| rest.trim().parse().ok()).unwrap()
    }

    fn hears(&mut self, word: &str) {
        writeln!(self.input, "{word}").unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first holder.
pub(crate) fn hold(endpoints: &[String]) -> ExitCode {
    // The lease is kept alive by the runtime's own thread, while this one waits for its lines.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let guard = runtime.block_on(async {
        let client = Client::builder().endpoints(endpoints).build().unwrap();
        client.lock(LOCK).ttl(TTL).timeout(PATIENCE).acquire().await.unwrap()
    });
    let token = guard.token();
    let mut answers = std::io::stdin().lines().map_while(Result::ok);
    while guard.is_held() {
        println!("held {token}");
        if answers.next().is_none() {
            return ExitCode::FAILURE;
        }
        println!("write {token}");
        if answers.next().is_none() {
            return ExitCode::FAILURE;
        }
    }
    println!("lost {token}");
    ExitCode::SUCCESS
}
