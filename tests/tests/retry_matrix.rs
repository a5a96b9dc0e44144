//! The retry matrix: what a client does after each error and each fault, and what its caller sees, on real servers.
//!
//! `retry_matrix/table.rs` says what is right, and was written by hand: for each fault, with the leader of before and
//! with another one, for a write without a session, one under a session, and a read. A combination that cannot be is
//! named there with the reason. Here each of the others is made to happen, through the fault points of the servers and
//! through proxies, with a client and a key of its own; then the store is read behind all of that.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::fmt;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use d_engine_client::{Client, Consistency, Error, Outcome};
use d_engine_proto::{ErrorCode, v1};
use d_engine_tests::cluster::{Cluster, Reign, Shape};
use d_engine_tests::proxy::{Mishap, Proxy, Way};
use d_engine_tests::transports::Transport;
use d_engine_tests::wait;

#[path = "retry_matrix/table.rs"]
mod table;

/// A call that is to run out of time.
const SHORT: Duration = Duration::from_secs(2);
/// One of which only an attempt is to run out of time: it has a quarter of the call's.
const MEDIUM: Duration = Duration::from_secs(6);
/// The same, and over before a keep-alive can end its connection.
const BRIEF: Duration = Duration::from_secs(4);
/// Longer than an attempt of a medium call, and so short that the second one has its answer.
const LATE: Duration = Duration::from_millis(2400);
/// Any other call: no attempt of it runs out of time, however busy the machine is.
const LONG: Duration = Duration::from_secs(40);
/// What a busy machine may add to a deadline.
const MARGIN: Duration = Duration::from_secs(2);
/// How often a case is tried in which an election came in between that nobody asked for.
const TRIES: usize = 5;

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Write,
    WriteUnderSession,
    Read,
}

impl Call {
    const ALL: [Self; 3] = [Self::Write, Self::WriteUnderSession, Self::Read];

    fn method(self) -> &'static str {
        if self == Self::Read { "Get" } else { "Put" }
    }
}

/// What the table says of one case, or what was seen of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Course {
    /// `ok`, or the kind of the error and the outcome.
    seen: String,
    attempts: usize,
    /// Whether more attempts are as right.
    at_least: bool,
    /// How often it was applied: by the version of its key.
    applied: u64,
}

impl Course {
    /// Reads a cell: `ok`, or kind and outcome; the attempts; how often applied. `None` if it does not say so.
    fn read(cell: &str) -> Option<Self> {
        let words: Vec<&str> = cell.split_whitespace().collect();
        let [seen @ .., attempts, applied] = &words[..] else { return None };
        let applied = ["never", "once"].iter().position(|known| known == applied)? as u64;
        let at_least = attempts.ends_with('+');
        let attempts = attempts.trim_end_matches('+').parse().ok()?;
        let seen = seen.join(" ");
        (!seen.is_empty()).then_some(Self { seen, attempts, at_least, applied })
    }

    fn allows(&self, seen: &Self) -> bool {
        let attempts = if self.at_least { seen.attempts >= self.attempts } else { seen.attempts == self.attempts };
        attempts && (&self.seen, self.applied) == (&seen.seen, seen.applied)
    }
}

impl fmt::Display for Course {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let applied = match self.applied {
            0 => "never",
            1 => "once",
            _ => "TWICE",
        };
        write!(f, "{} {} {applied}", self.seen, self.attempts)
    }
}

/// Where a fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At a fault point of the leader.
    Point(&'static str),
    /// On the way to or from the leader.
    Proxy(Way),
    /// At the leader's port, before there is a connection.
    Port,
}

/// A fault, as the table names it.
#[derive(Clone, Copy, Debug)]
struct Fault {
    place: Place,
    what: &'static str,
}

impl Fault {
    fn new(place: &'static str, what: &'static str) -> Self {
        let place = match place {
            "request" => Place::Proxy(Way::Request),
            "answer" => Place::Proxy(Way::Answer),
            "connect" => Place::Port,
            point => Place::Point(point),
        };
        Self { place, what }
    }

    /// The point at which `call` meets it: a read is not proposed, nor is it committed.
    fn point(point: &str, call: Call) -> &str {
        match (call, point) {
            (Call::Read, "before-propose") => "received",
            (Call::Read, "after-commit") => "before-reply",
            _ => point,
        }
    }

    fn mishap(self) -> Mishap {
        match self.what {
            "reset" => Mishap::Reset,
            "truncate" => Mishap::Truncate,
            "black hole" => Mishap::BlackHole,
            "half open" => Mishap::HalfOpen,
            "late" => Mishap::Delay(LATE),
            "goaway" => Mishap::GoAway,
            "goaway later" => Mishap::GoAwayLater,
            "refuse stream" => Mishap::RefuseStream,
            other => panic!("no such mishap: {other}"),
        }
    }

    /// Whether nothing comes over the connection any more.
    fn kills_the_connection(self) -> bool {
        ["black hole", "half open"].contains(&self.what)
    }

    /// Whether its calls are to run out of time.
    fn is_silent(self) -> bool {
        ["silence", "black hole", "half open", "late", "refused"].contains(&self.what) || self.what.starts_with("delay")
    }
}

struct Matrix {
    cluster: Cluster,
    transport: Transport,
    cases: usize,
}

impl Matrix {
    fn proxy(&self, id: u32) -> Proxy {
        self.cluster.node(id).proxy.clone().unwrap()
    }

    fn ids(&self) -> Vec<u32> {
        self.cluster.nodes().iter().map(|node| node.id).collect()
    }

    /// A client that knows the leader, and has its session.
    async fn client(&self, call: Call, timeout: Duration) -> Client {
        let client =
            self.transport.client().endpoints(self.cluster.addresses()).sessions(call == Call::WriteUnderSession);
        let client =
            client.default_consistency(Consistency::Linearizable).call_timeout(timeout).connect().await.unwrap();
        // What it learns at its start it must not ask for again later, or it would know of a new leader too soon.
        wait::until("the client to know the leader", wait::PATIENCE, || async { client.leader() }).await;
        client.put("warm", "").timeout(LONG).await.unwrap();
        client
    }

    /// Everything as it should be, for the next case.
    async fn mend(&mut self, points: &[String]) {
        for id in self.ids() {
            self.proxy(id).accept().await;
            if self.cluster.node(id).runs() {
                for point in points {
                    self.cluster.node_mut(id).faults().disarm(point).await;
                }
            }
        }
        self.cluster.start_all().await;
    }

    /// How often calls of this method have come to any node. A node that died was heard out.
    async fn arrived(&mut self, call: Call) -> usize {
        let point = format!("received/{}", call.method());
        let mut arrived = 0;
        for id in self.ids() {
            let runs = self.cluster.node(id).runs();
            let faults = self.cluster.node_mut(id).faults();
            if runs {
                // Its answer comes behind all that it had to tell.
                faults.disarm("received/Nothing").await;
            }
            arrived += faults.reached(&point);
        }
        arrived
    }

    /// Has leadership move to another node, which no client is told.
    async fn depose(&mut self, reign: Reign) {
        let point = "received/Delete";
        self.cluster.node_mut(reign.leader).faults().arm(point, 1, "step-down").await;
        let leader = self.cluster.node(reign.leader).direct(wait::PATIENCE);
        let request = leader.timed(v1::DeleteRequest { key: "nobody".into(), ..v1::DeleteRequest::default() });
        // By then it does not lead.
        let _ = leader.kv().delete(request).await;
    }

    /// Makes one case happen; `None` if an election came in between that nobody asked for.
    async fn run(&mut self, fault: Fault, other_leader: bool, call: Call, expected: &Course) -> Option<Course> {
        self.cases += 1;
        let key = format!("case {:04}", self.cases);
        let timeout = match (fault.is_silent(), &*expected.seen) {
            (false, _) => LONG,
            (true, "ok") if fault.kills_the_connection() && !other_leader => BRIEF,
            (true, "ok") => MEDIUM,
            (true, _) => SHORT,
        };
        let reign = self.cluster.reign().await;
        let client = self.client(call, timeout).await;
        let proxy = self.proxy(reign.leader);
        let (before, stats) = (self.arrived(call).await, client.stats());
        let mut armed = vec!["received/Delete".to_owned()];
        let met = proxy.met();
        match fault.place {
            Place::Point(point) => {
                let point = format!("{}/{}", Fault::point(point, call), call.method());
                // Death deposes by itself.
                let first = if other_leader && fault.what != "die" { "step-down " } else { "" };
                let action = format!("{first}{}", fault.what);
                self.cluster.node_mut(reign.leader).faults().arm(&point, 1, &action).await;
                armed.push(point);
            }
            Place::Proxy(_) | Place::Port if other_leader => self.depose(reign).await,
            Place::Proxy(_) | Place::Port => {}
        }
        match fault.place {
            Place::Proxy(way) => proxy.meet(way, &key, fault.mishap()),
            Place::Port => {
                proxy.refuse().await;
                proxy.cut();
                // Else the call could go out on the connection that ends, and nobody could say that it did not arrive.
                let address = proxy.address().to_string();
                wait::until("the client to notice", wait::PATIENCE, || async {
                    client.status(&address).await.is_err().then_some(())
                })
                .await;
            }
            Place::Point(_) => {}
        }

        let started = Instant::now();
        let result: Result<(), Error> = match call {
            Call::Read => client.get(&key).await.map(drop),
            Call::Write | Call::WriteUnderSession => client.put(&key, "value").await.map(drop),
        };
        let took = started.elapsed();
        assert!(took <= timeout + MARGIN, "{key}: the call took {took:?} of {timeout:?}");
        let attempts = 1 + usize::try_from(client.stats().retries - stats.retries).unwrap();
        // What hangs in a connection must not arrive behind the look.
        client.close();
        let happened = proxy.met() - met;
        if matches!(fault.place, Place::Proxy(_)) {
            proxy.cut();
        }
        if fault.what == "die" {
            self.cluster.node_mut(reign.leader).process().exit(wait::PATIENCE).await;
            self.cluster.node_mut(reign.leader).faults().hear_out().await;
        }
        self.cluster.bury();
        let arrived = self.arrived(call).await - before;
        // What was lost on its way did not come; and registering a session may have taken the client a retry, too.
        assert!(arrived <= attempts, "{key}: {arrived} of {attempts} attempts arrived");
        let counted_there = matches!(fault.place, Place::Point(_)) && fault.what != "die";
        let attempts = if counted_there { arrived } else { attempts };
        self.mend(&armed).await;
        let after = self.cluster.reign().await;
        assert!(!other_leader || after.term > reign.term, "{key}: nobody else came to lead");
        if !other_leader && after != reign {
            return None;
        }
        if let Place::Proxy(_) = fault.place {
            assert_eq!(happened, 1, "{key}: it did not happen: {result:?} after {attempts} attempts");
        }
        let seen = match result {
            Ok(()) => "ok".to_owned(),
            Err(error) => {
                let outcome = match error.outcome() {
                    Outcome::NotApplied => "NotApplied",
                    Outcome::Applied => "Applied",
                    Outcome::Unknown => "Unknown",
                };
                format!("{} {outcome}", error.kind().name())
            }
        };
        let leader = self.cluster.node(after.leader).direct(wait::PATIENCE);
        let kv = leader.get(&key, v1::Consistency::Linearizable, 0).await.unwrap().kv;
        Some(Course { seen, attempts, at_least: false, applied: kv.map_or(0, |kv| kv.version) })
    }
}

/// Goes through the table, and answers which cells are wrong.
async fn go_through(mut matrix: Matrix, only: Option<String>) -> Vec<String> {
    let transport = matrix.transport;
    matrix.cluster.start_all().await;
    let (mut report, mut wrong) = (Table::new(), Vec::new());
    report.load_style(presets::ASCII_MARKDOWN);
    report.set_header(["where", "what", "leader", "write", "write under a session", "read"]);
    for &(place, what, kept, changed) in table::TABLE {
        let fault = Fault::new(place, what);
        if only.as_ref().is_some_and(|only| !format!("{place} {what}").contains(only)) {
            continue;
        }
        for (leader, cells) in [("the same", kept), ("another", changed)] {
            let mut line = vec![place.to_owned(), what.to_owned(), leader.to_string()];
            for (call, cell) in Call::ALL.into_iter().zip(cells) {
                if let Some(reason) = cell.strip_prefix("impossible: ") {
                    assert!(!reason.is_empty(), "{place} {what}: no reason");
                    line.push(cell.to_owned());
                    continue;
                }
                let expected = Course::read(cell).unwrap_or_else(|| panic!("{place} {what}: no expectation: {cell:?}"));
                let mut seen = None;
                for _ in 0..TRIES {
                    seen = matrix.run(fault, leader == "another", call, &expected).await;
                    if seen.is_some() {
                        break;
                    }
                }
                let seen = seen.expect("elections come and go without end");
                if !expected.allows(&seen) {
                    wrong
                        .push(format!("{transport:?}, {place}, {what}, {leader} leader, {call:?}: {seen}, not {cell}"));
                }
                line.push(seen.to_string());
            }
            // A matrix that stops half way has shown something, too.
            println!("{transport:?}: {}", line.join(" | "));
            report.add_row(line);
        }
    }
    println!("{transport:?}: what was seen, how many attempts, how often applied; {} cases\n{report}", matrix.cases);
    wrong
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_each_fault_the_client_does_and_says_what_the_table_says() {
    let only = std::env::var("ONLY").ok();
    let shape = || {
        // So that a busy machine holds no elections of its own.
        let extra = "[raft.read_consistency]\nlease_duration_ms = 1000\n".to_owned();
        Shape { extra, proxied: true, faulty: true, ..Shape::default() }
    };
    // Most of the time calls run out of time; so the transports do at the same time.
    let clusters = Cluster::prepare_together(Transport::ALL.map(|_| shape())).await;
    let matrices = clusters.into_iter().zip(Transport::ALL);
    let matrices = matrices.map(|(cluster, transport)| Matrix { cluster, transport, cases: 0 });
    let runs: Vec<_> = matrices.map(|matrix| tokio::spawn(go_through(matrix, only.clone()))).collect();
    let mut wrong = Vec::new();
    for run in runs {
        wrong.extend(run.await.unwrap());
    }
    assert!(wrong.is_empty(), "{} cells are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Every error that a server can answer has a line, before and after the write was applied, or cannot be.
#[test]
fn no_error_is_without_an_expectation() {
    let mut missing = Vec::new();
    for code in ErrorCode::ALL {
        for outcome in ["NotApplied", "Applied", "Unknown"] {
            let what = format!("refuse {} {outcome}", code.name());
            let lines = table::TABLE.iter().filter(|(_, line, ..)| *line == what).count();
            let reasons = table::IMPOSSIBLE.iter().filter(|(codes, said, reason)| {
                assert!(!reason.is_empty());
                *said == outcome && codes.contains(code)
            });
            match (lines, reasons.count()) {
                (1.., 0) | (0, 1) => {}
                found => missing.push(format!("{what}: (lines, reasons) = {found:?}")),
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn a_cell_that_says_nothing_is_no_expectation_and_a_wrong_course_is_seen() {
    let read = |cell| Course::read(cell).unwrap();
    let expected = read("Unavailable Unknown 1 once");
    assert!(expected.allows(&read("Unavailable Unknown 1 once")));
    for seen in
        ["ok 1 once", "Unavailable NotApplied 1 once", "Unavailable Unknown 2 once", "Unavailable Unknown 1 never"]
    {
        assert!(!expected.allows(&read(seen)), "{seen}");
    }
    assert!(read("ok 2+ once").allows(&read("ok 3 once")));
    assert!(!read("ok 2+ once").allows(&read("ok 1 once")));
    for nothing in ["", "ok", "ok once", "1 once", "ok 1 twice", "ok some once"] {
        assert_eq!(Course::read(nothing), None, "{nothing:?}");
    }
}
