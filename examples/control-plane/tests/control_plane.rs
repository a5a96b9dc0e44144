//! Real agents, real PostgreSQL and real writers, in a network whose links can be cut. Agents are killed, paused and cut
//! off, chosen by a seed; afterwards every acknowledged row is there, and no two primaries have acknowledged at a time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use d_engine_client::Client;
use d_engine_tests::network::{self, End, PrivateNetwork};
use d_engine_tests::process::Process;
use d_engine_tests::seed::seed;
use d_engine_tests::transcript;
use d_engine_tests::wait;
use fastrand::Rng;
use tempfile::TempDir;

const AGENTS: u32 = 3;
const WITNESS: u32 = 3;
const PATIENCE: Duration = Duration::from_secs(120);

/// A row whose insertion was acknowledged.
#[derive(Clone, Debug)]
struct Acknowledged {
    row: String,
    /// Whose PostgreSQL.
    agent: u32,
    /// PostgreSQL's own count of promotions.
    timeline: u32,
    begun: Duration,
    ended: Duration,
}

/// Judges that no primary acknowledged what was begun after a later one had acknowledged already, and that each
/// timeline was one agent's. Returns how many timelines there were.
fn judge(acknowledged: &[Acknowledged]) -> Result<usize, String> {
    let mut owners = BTreeMap::new();
    for ack in acknowledged {
        let owner = *owners.entry(ack.timeline).or_insert(ack.agent);
        if owner != ack.agent {
            return Err(format!("timeline {} is acknowledged by agents {owner} and {}", ack.timeline, ack.agent));
        }
    }
    for &timeline in owners.keys() {
        let first = acknowledged.iter().filter(|ack| ack.timeline > timeline).min_by_key(|ack| ack.ended);
        let last = acknowledged.iter().filter(|ack| ack.timeline == timeline).max_by_key(|ack| ack.begun);
        if let (Some(first), Some(last)) = (first, last)
            && last.begun > first.ended
        {
            return Err(format!("two primaries at a time: {last:?} after {first:?}"));
        }
    }
    Ok(owners.len())
}

/// What the agents agree on, as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    term: u64,
    primary: u32,
    standby: Option<u32>,
}

struct Agents {
    network: PrivateNetwork,
    directory: TempDir,
    processes: BTreeMap<u32, Process>,
    client: Client,
}

impl Agents {
    fn start() -> Self {
        let network = PrivateNetwork::lay(AGENTS);
        let directory = tempfile::Builder::new().prefix("d-engine-control-plane-").tempdir().unwrap();
        // PostgreSQL runs as another user.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let address = |id: u32| format!("{}:9081", End::Node(id).address());
        let members: Vec<String> =
            (1..=AGENTS).map(|id| format!("{{ id = {id}, address = \"{}\" }}", address(id))).collect();
        for id in 1..=AGENTS {
            let own = if id == WITNESS { String::new() } else { format!("{}:5432", End::Node(id).address()) };
            let text = format!(
                "[cluster]\nnode_id = {id}\napplication_address = \"{own}\"\ninitial_cluster = [{}]\n\
                 db_root_dir = \"{}\"\n[network]\ncall_timeout_ms = 1000\n",
                members.join(", "),
                directory.path().join(format!("engine{id}")).display(),
            );
            std::fs::write(directory.path().join(format!("n{id}.toml")), text).unwrap();
        }
        let client = Client::builder().endpoints((1..=AGENTS).map(address)).build().unwrap();
        let mut agents = Self { network, directory, processes: BTreeMap::new(), client };
        for id in 1..=AGENTS {
            agents.start_one(id);
        }
        agents
    }

    fn start_one(&mut self, id: u32) {
        let mut command = PrivateNetwork::command(id);
        command.args(["setpriv", "--pdeathsig", "KILL", env!("CARGO_BIN_EXE_control-plane"), "--config"]);
        command.arg(self.directory.path().join(format!("n{id}.toml")));
        command.arg("--postgres").arg(self.directory.path().join(format!("postgres{id}")));
        let log = self.directory.path().join(format!("agent{id}.log"));
        self.processes.insert(id, Process::start(command, &log));
    }

    fn kill(&mut self, id: u32) {
        self.processes.remove(&id).expect("it runs").kill();
    }

    async fn state(&self) -> Option<State> {
        let found = self.client.get("postgres/state").await.ok()?.into_value()?;
        let found: serde_json::Value = serde_json::from_slice(&found).unwrap();
        let number = |name: &str| found[name].as_u64();
        let agent = |name: &str| number(name).map(|agent| u32::try_from(agent).unwrap());
        Some(State { term: number("term")?, primary: agent("primary")?, standby: agent("standby") })
    }

    async fn in_sync(&self) -> State {
        wait::until("a standby in sync", PATIENCE, || async {
            self.state().await.filter(|state| state.standby.is_some())
        })
        .await
    }

    fn print(&self) {
        for id in 1..=AGENTS {
            let log = std::fs::read_to_string(self.directory.path().join(format!("agent{id}.log")));
            println!("--- agent {id}\n{}", log.unwrap_or_default());
        }
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        if thread::panicking() {
            self.print();
            self.directory.disable_cleanup(true);
            println!("the files are kept in {}", self.directory.path().display());
        }
    }
}

fn psql() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed: scripts/setup test");
    let newest = versions.map(|entry| entry.unwrap().path()).max().expect("a version of PostgreSQL");
    newest.join("bin/psql")
}

/// What a statement on an agent's PostgreSQL answers; `None`: it failed, or nobody knows.
fn sql(psql: &Path, agent: u32, statement: &str) -> Option<String> {
    let server = format!("host={} user=postgres dbname=postgres connect_timeout=2", End::Node(agent).address());
    let output = Command::new("timeout").arg("4").arg(psql).args(["-XAtq", "-c", statement, &server]).output().unwrap();
    // A commit whose wait for the standby was cut short is reported with a warning.
    (output.status.success() && output.stderr.is_empty())
        .then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

/// How many rows each agent's PostgreSQL has acknowledged.
static ACKNOWLEDGED: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

fn count_of(agent: u32) -> &'static AtomicU64 {
    &ACKNOWLEDGED[agent as usize - 1]
}

/// Inserts into one agent's PostgreSQL all the time, primary or not.
fn write_to(agent: u32, writer: u32, start: Instant, stop: &'static AtomicBool) -> JoinHandle<Vec<Acknowledged>> {
    let psql = psql();
    thread::spawn(move || {
        let mut acknowledged = Vec::new();
        for number in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let row = format!("{agent}-{writer}-{number}");
            let insert = format!(
                "INSERT INTO written VALUES ('{row}') RETURNING substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)"
            );
            let begun = start.elapsed();
            if let Some(timeline) = sql(&psql, agent, &insert) {
                let timeline = u32::from_str_radix(&timeline, 16).unwrap();
                count_of(agent).fetch_add(1, Ordering::Relaxed);
                acknowledged.push(Acknowledged { row, agent, timeline, begun, ended: start.elapsed() });
            }
        }
        acknowledged
    })
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    Pause,
    CutOffFromAgents,
    CutOffFromAll,
}

#[derive(Clone, Copy, Debug)]
enum Target {
    Primary,
    Standby,
    Witness,
}

/// Every fault to the primary that promotes the other, in any order, and some to others.
fn schedule(rng: &mut Rng) -> Vec<(Fault, Target)> {
    let cut = if rng.bool() { Fault::CutOffFromAgents } else { Fault::CutOffFromAll };
    let mut faults: Vec<_> = [Fault::Kill, Fault::Pause, cut].map(|fault| (fault, Target::Primary)).to_vec();
    let other = rng.choice([Fault::Kill, Fault::Pause, cut]).unwrap();
    faults.push((other, Target::Standby));
    faults.push((rng.choice([Fault::Kill, Fault::Pause, cut]).unwrap(), Target::Witness));
    rng.shuffle(&mut faults);
    faults
}

async fn inflict(agents: &mut Agents, rng: &mut Rng, fault: Fault, target: Target) {
    let state = agents.in_sync().await;
    let before = count_of(state.primary).load(Ordering::Relaxed);
    wait::until("rows from the primary", PATIENCE, || async {
        (count_of(state.primary).load(Ordering::Relaxed) >= before + 10).then_some(())
    })
    .await;
    let id = match target {
        Target::Primary => state.primary,
        Target::Standby => state.standby.unwrap(),
        Target::Witness => WITNESS,
    };
    println!("{fault:?} of {target:?}, agent {id}, in term {}", state.term);
    match fault {
        Fault::Kill => agents.kill(id),
        Fault::Pause => agents.processes[&id].pause(),
        Fault::CutOffFromAgents => agents.network.isolate(End::Node(id), false),
        Fault::CutOffFromAll => agents.network.isolate(End::Node(id), true),
    }
    if matches!(target, Target::Primary) {
        wait::until("the promotion of the standby", PATIENCE, || async {
            agents.state().await.filter(|now| now.term > state.term)
        })
        .await;
    }
    wait::pass(Duration::from_millis(rng.u64(500..4_000))).await;
    match fault {
        Fault::Kill => agents.start_one(id),
        Fault::Pause => agents.processes[&id].resume(),
        Fault::CutOffFromAgents | Fault::CutOffFromAll => agents.network.heal(),
    }
}

/// PostgreSQL runs as a user of its own, if this one is root or looks like it in namespaces of its own.
fn may_become_postgres(test: &str) -> bool {
    let status = Command::new("setpriv").args(["--reuid", "postgres", "true"]).status();
    let may = status.is_ok_and(|status| status.success());
    if !may {
        // Past the capture of the test runner: a test that was not run must be seen.
        drop(writeln!(std::io::stderr(), "{test}: not run: this user may not become the user postgres"));
    }
    may
}

#[test]
fn no_acknowledged_row_is_lost_and_no_two_primaries_acknowledge() {
    const TEST: &str = "no_acknowledged_row_is_lost_and_no_two_primaries_acknowledge";
    if !may_become_postgres(TEST) {
        return;
    }
    network::inside(TEST, || async {
        static STOP: AtomicBool = AtomicBool::new(false);
        let mut rng = Rng::with_seed(seed());
        let mut agents = Agents::start();
        let psql = psql();
        let first = agents.in_sync().await;
        sql(&psql, first.primary, "CREATE TABLE written (row text PRIMARY KEY)").expect("the primary answers");

        let start = Instant::now();
        let writers: Vec<_> = (0..4).map(|writer| write_to(1 + writer % 2, writer, start, &STOP)).collect();
        for (fault, target) in schedule(&mut rng) {
            inflict(&mut agents, &mut rng, fault, target).await;
        }
        let last = agents.in_sync().await;
        STOP.store(true, Ordering::Relaxed);
        let mut acknowledged: Vec<_> = writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect();
        acknowledged.sort_by_key(|ack| ack.ended);

        let timelines = judge(&acknowledged).unwrap();
        let silence = acknowledged.windows(2).map(|pair| pair[1].ended - pair[0].ended).max().unwrap();
        println!(
            "{} rows acknowledged on {timelines} timelines in {:?}, the longest silence {silence:?}",
            acknowledged.len(),
            start.elapsed(),
        );
        assert!(last.term >= first.term + 3, "the faults to the primary promoted the other: {last:?}");
        assert!(timelines >= 4, "rows were acknowledged by every primary");

        for agent in [last.primary, last.standby.unwrap()] {
            wait::until(&format!("every acknowledged row on agent {agent}"), PATIENCE, || async {
                let rows = sql(&psql, agent, "SELECT row FROM written").unwrap_or_default();
                let rows: BTreeSet<&str> = rows.lines().collect();
                let lost: Vec<_> = acknowledged.iter().filter(|ack| !rows.contains(ack.row.as_str())).collect();
                assert!(agent != last.primary || rows.is_empty() || lost.is_empty(), "lost on the primary: {lost:?}");
                lost.is_empty().then_some(())
            })
            .await;
        }
        for mut process in std::mem::take(&mut agents.processes).into_values() {
            assert!(process.stop(PATIENCE).await.success(), "an agent stops in good order");
        }
    });
}

#[test]
fn the_readme_shows_what_happens() {
    if !may_become_postgres("the_readme_shows_what_happens") {
        return;
    }
    let example = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for part in ["Makefile", "config"] {
        let copied = Command::new("cp").arg("-r").arg(example.join(part)).arg(directory.path()).status();
        assert!(copied.unwrap().success());
    }
    let session = transcript::session(&std::fs::read_to_string(example.join("README.md")).unwrap());
    assert!(session.len() > 3, "the README shows a session");
    let differences = transcript::run(&session, directory.path());
    assert!(differences.is_empty(), "the README shows what is not so:\n{}", differences.join("\n"));
}

#[test]
fn a_planted_second_primary_is_caught() {
    let ack = |agent, timeline, begun, ended| Acknowledged {
        row: String::new(),
        agent,
        timeline,
        begun: Duration::from_secs(begun),
        ended: Duration::from_secs(ended),
    };
    assert_eq!(judge(&[ack(1, 1, 1, 2), ack(1, 1, 3, 6), ack(2, 2, 4, 5), ack(1, 3, 7, 8)]), Ok(3));
    assert!(judge(&[ack(1, 1, 1, 2), ack(2, 2, 4, 5), ack(1, 1, 6, 7)]).unwrap_err().contains("two primaries"));
    assert!(judge(&[ack(1, 1, 1, 2), ack(2, 1, 4, 5)]).unwrap_err().contains("timeline 1"));
}
