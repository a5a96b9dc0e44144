//! One PostgreSQL server: its directory, its configuration and its process. It decides nothing; `agent` does.
//!
//! The server always starts in the careful way: a commit waits for the standby. Only an explicit call lets it acknowledge
//! alone, and no restart keeps that.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::process::{Pid, Signal, kill_process};

use crate::Result;

/// The operating system's user that the server runs as if the agent is root.
const OWNER: &str = "postgres";
/// How long the server may take to stop before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// A standby that has less than this to catch up with is waited for, in bytes of the log.
const NEAR_BYTES: i64 = 16 << 20;

/// What the primary knows of its standby.
pub(crate) struct Standby {
    /// Whether it is connected, and has not much to catch up with.
    pub(crate) is_near: bool,
    /// The end of the log that it has on its disk.
    pub(crate) flushed: u64,
}

/// A PostgreSQL server of this agent.
pub(crate) struct Postgres {
    name: String,
    host: String,
    port: u16,
    directory: PathBuf,
    programs: PathBuf,
    process: Option<Child>,
}

impl Postgres {
    /// The server at `address`, with everything in `directory`.
    pub(crate) fn new(agent: u32, address: &str, directory: &Path) -> Result<Self> {
        let (host, port) = split(address)?;
        make_directory(directory)?;
        let directory = directory.canonicalize()?;
        Ok(Self { name: name(agent), host, port, directory, programs: programs()?, process: None })
    }

    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// The term that the data belongs to; 0: of none yet; `None`: there is no data.
    pub(crate) fn term(&self) -> Result<Option<u64>> {
        match fs::read_to_string(self.data().join("term")) {
            Ok(text) => Ok(Some(text.trim().parse()?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes note that the data belongs to this term.
    pub(crate) fn set_term(&self, term: u64) -> Result<()> {
        write_durably(&self.data(), "term", &term.to_string())
    }

    /// Makes an empty database, of no term yet.
    pub(crate) async fn initialise(&mut self) -> Result<()> {
        let fresh = self.empty("fresh")?;
        let mut command = self.program("initdb");
        command.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--pgdata"]).arg(&fresh);
        output_of(command).await?;
        write_durably(&fresh, "term", "0")?;
        Ok(fs::rename(fresh, self.data())?)
    }

    /// Stops, and puts a copy of the primary in the place of the data. The old data stays until the copy is complete.
    pub(crate) async fn clone_from(&mut self, primary: &str, term: u64) -> Result<()> {
        self.kill().await;
        let fresh = self.empty("fresh")?;
        let mut command = self.program("pg_basebackup");
        command.args(["--checkpoint=fast", "--wal-method=stream", "--dbname", &connection(primary)?, "--pgdata"]);
        command.arg(&fresh);
        output_of(command).await?;
        write_durably(&fresh, "standby.signal", "")?;
        write_durably(&fresh, "term", &term.to_string())?;
        if self.data().exists() {
            renameat_with(CWD, &fresh, CWD, self.data(), RenameFlags::EXCHANGE)?;
            fs::remove_dir_all(fresh)?;
        } else {
            fs::rename(fresh, self.data())?;
        }
        Ok(())
    }

    /// Makes sure that the server runs, as the data says: primary or standby of `peer`. A commit waits for the peer.
    /// Returns whether it was started by this call.
    pub(crate) fn start(&mut self, peer: u32, peer_address: &str) -> Result<bool> {
        if let Some(process) = &mut self.process {
            match process.try_wait()? {
                None => return Ok(false),
                Some(status) => println!("PostgreSQL ended by itself with {status}"),
            }
        }
        self.configure(peer, peer_address, true)?;
        let log = OpenOptions::new().create(true).append(true).open(self.directory.join("log"))?;
        let mut command = self.program("postgres");
        command.arg("-D").arg(self.data()).arg("-c").arg(format!("config_file={}", self.settings().display()));
        self.process = Some(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?);
        Ok(true)
    }

    /// Whether it is a standby; an error if it does not answer.
    pub(crate) async fn is_standby(&self) -> Result<bool> {
        Ok(self.ask("SELECT pg_is_in_recovery()").await? == "t")
    }

    /// Whether it receives the primary's log.
    pub(crate) async fn receives(&self) -> Result<bool> {
        Ok(self.ask("SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'").await? == "1")
    }

    /// Makes the standby a primary. It stops receiving first, then applies all it has received: no commit of the old
    /// primary is acknowledged from here on, and none that was is missing. Does not wait for the end of it.
    pub(crate) async fn promote(&self) -> Result<()> {
        self.ask("SELECT pg_promote(false)").await.map(drop)
    }

    /// The end of the log on the disk.
    pub(crate) async fn flushed(&self) -> Result<u64> {
        Ok(self.ask("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint").await?.parse()?)
    }

    /// What the primary knows of its standby.
    pub(crate) async fn standby(&self, peer: u32) -> Result<Standby> {
        let name = name(peer);
        let answer = self
            .ask(&format!(
                "SELECT (flush_lsn - '0/0')::bigint, (pg_current_wal_lsn() - flush_lsn)::bigint FROM pg_stat_replication \
                 WHERE application_name = '{name}' AND state = 'streaming' AND flush_lsn IS NOT NULL"
            ))
            .await?;
        let Some((flushed, behind)) = answer.lines().next().and_then(|line| line.split_once('|')) else {
            return Ok(Standby { is_near: false, flushed: 0 });
        };
        Ok(Standby { is_near: behind.parse::<i64>()? < NEAR_BYTES, flushed: flushed.parse()? })
    }

    /// Lets commits be acknowledged without the standby.
    pub(crate) async fn acknowledge_alone(&self, peer: u32, peer_address: &str) -> Result<()> {
        self.configure(peer, peer_address, false)?;
        self.ask("SELECT pg_reload_conf()").await.map(drop)
    }

    /// Has every commit wait for the standby again; in force when this returns.
    pub(crate) async fn wait_for_standby(&self, peer: u32, peer_address: &str) -> Result<()> {
        self.configure(peer, peer_address, true)?;
        self.ask("SELECT pg_reload_conf()").await?;
        // Reloading takes effect later. A new connection that sees the new setting proves that the checkpointer has been
        // told to reload, and a checkpoint asked for after that proves that it has: it is the one that makes commits wait.
        if self.ask("SHOW synchronous_standby_names").await? != name(peer) {
            return Err("the configuration is not reloaded yet".into());
        }
        self.ask("CHECKPOINT").await.map(drop)
    }

    /// Stops at once: nothing is acknowledged any more when this returns.
    pub(crate) async fn kill(&mut self) {
        self.end(Signal::QUIT).await;
    }

    /// Stops in good order: the standby has everything when this returns, if it is there.
    pub(crate) async fn stop(&mut self) {
        self.end(Signal::INT).await;
    }

    async fn end(&mut self, signal: Signal) {
        let Some(mut process) = self.process.take() else { return };
        if let Some(id) = i32::try_from(process.id()).ok().and_then(Pid::from_raw) {
            // It fails if it has ended by itself, which is as good.
            let _ = kill_process(id, signal);
        }
        let ended = async {
            let mut pace = tokio::time::interval(Duration::from_millis(10));
            while let Ok(None) = process.try_wait() {
                pace.tick().await;
            }
        };
        if tokio::time::timeout(STOP_PATIENCE, ended).await.is_err() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    fn settings(&self) -> PathBuf {
        self.directory.join("postgresql.conf")
    }

    fn configure(&self, peer: u32, peer_address: &str, careful: bool) -> Result<()> {
        let Self { name: me, host, port, directory, .. } = self;
        let directory = directory.display();
        let (waits_for, primary) = (if careful { name(peer) } else { String::new() }, connection(peer_address)?);
        let text = format!(
            "listen_addresses = '{host}'\n\
             port = {port}\n\
             unix_socket_directories = '{directory}'\n\
             hba_file = '{directory}/pg_hba.conf'\n\
             synchronous_commit = on\n\
             synchronous_standby_names = '{waits_for}'\n\
             primary_conninfo = '{primary} application_name={me}'\n\
             wal_keep_size = '256MB'\n\
             # The other side may be gone without a word.\n\
             wal_sender_timeout = '2s'\n\
             wal_receiver_timeout = '2s'\n\
             wal_receiver_status_interval = '1s'\n\
             wal_retrieve_retry_interval = '500ms'\n"
        );
        let access = "local all all trust\nhost all all samenet trust\nhost replication all samenet trust\n";
        write_durably(&self.directory, "pg_hba.conf", access)?;
        write_durably(&self.directory, "postgresql.conf", &text)
    }

    /// Asks the server of this agent, through its socket.
    async fn ask(&self, sql: &str) -> Result<String> {
        let mut command = Command::new("timeout");
        command.arg("5").arg(self.programs.join("psql")).args(["-XAtq", "-U", "postgres", "-d", "postgres", "-h"]);
        command.arg(&self.directory).args(["-p", &self.port.to_string(), "-c", sql]);
        output_of(command).await
    }

    /// A program of PostgreSQL, as the user that owns the data. The kernel kills it when the thread that starts it ends.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new("setpriv");
        if is_root() {
            command.args(["--reuid", OWNER, "--regid", OWNER, "--init-groups"]);
        }
        command.args(["--pdeathsig", "KILL", "--"]).arg(self.programs.join(name)).current_dir(&self.directory);
        command
    }

    /// A place for new data, where perhaps an earlier attempt has left something.
    fn empty(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(path),
        }
    }
}

/// What the server of this agent is called in the other's settings.
fn name(agent: u32) -> String {
    format!("agent{agent}")
}

fn split(address: &str) -> Result<(String, u16)> {
    let (host, port) = address.rsplit_once(':').ok_or_else(|| format!("{address:?} is not host:port"))?;
    Ok((host.to_owned(), port.parse()?))
}

/// How to reach the other server, and how soon to give up.
fn connection(address: &str) -> Result<String> {
    let (host, port) = split(address)?;
    Ok(format!("host={host} port={port} user=postgres connect_timeout=2 tcp_user_timeout=2000 keepalives_idle=2"))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn make_directory(path: &Path) -> Result<()> {
    let mut command = Command::new("install");
    if is_root() {
        command.args(["-o", OWNER, "-g", OWNER]);
    }
    run(command.args(["-m", "755", "-d"]).arg(path)).map(drop)
}

/// Where Debian puts the programs of PostgreSQL; the newest version, if there are several.
fn programs() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").map_err(|_| "no PostgreSQL here: apt-get install postgresql")?;
    let version = |entry: std::io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse::<u32>().ok();
    let newest = versions.filter_map(version).max().ok_or("no PostgreSQL in /usr/lib/postgresql")?;
    Ok(format!("/usr/lib/postgresql/{newest}/bin").into())
}

/// Replaces a file, whatever happens in between.
fn write_durably(directory: &Path, name: &str, text: &str) -> Result<()> {
    let new = directory.join(format!("{name}.new"));
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(new, directory.join(name))?;
    Ok(File::open(directory)?.sync_all()?)
}

/// What a command prints, beside everything else that goes on.
async fn output_of(mut command: Command) -> Result<String> {
    tokio::task::spawn_blocking(move || run(&mut command)).await?
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?.trim().to_owned());
    }
    let program = command.get_program().to_string_lossy().into_owned();
    Err(format!("{program} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()).into())
}
