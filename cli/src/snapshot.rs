//! `d-engine snapshot`: backups. Saving talks to a node; the rest works on files, without any server.

use std::fs::{self, File};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use d_engine_proto::NodeId;
use d_engine_server::backup::{Archive, BackupError, NewNode, Restored, recover, restore};
use d_engine_server::clock::unix_time;
use d_engine_server::config::LogEngine;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::args::{ClientArgs, Layout};
use crate::block_on;
use crate::failure::Failure;
use crate::output;
use crate::status::{size, uptime};

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Saves the state of the first endpoint into a file, and verifies it
    Save {
        /// The file; it must not exist
        file: PathBuf,
    },
    /// Shows what a file holds, and whether every byte of it is as it was written
    Inspect {
        /// The file
        file: PathBuf,
    },
    /// Makes the data directory of one fresh node, which is a cluster of its own
    #[command(long_about = RESTORE)]
    Restore(RestoreArgs),
}

const RESTORE: &str = "\
Makes the data directory of one fresh node, which is a cluster of its own: a new cluster id, the next restore epoch, \
itself as the only voter. Start it, then let empty nodes join it.

The revision continues behind any that was issued, older history counts as compacted, sessions end, and leases begin \
anew with their full time to live. Clients and members of the old cluster are refused, and refuse.

Everything that was written after the snapshot is lost. With --from-data-dir, for when a majority of the voters is lost \
for good: what the survivor had not received is lost, although it may have been acknowledged, and what it had received \
and no majority had is kept, although its writer may have been told nothing. First make sure that no other member of \
the old cluster runs or ever comes back: two clusters would serve.";

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("source").required(true).args(["file", "from_data_dir"]))]
pub(crate) struct RestoreArgs {
    /// The file to restore
    file: Option<PathBuf>,
    /// Recover from the data directory of a survivor, which must not run; it stays as it is
    #[arg(long, value_name = "PATH")]
    from_data_dir: Option<PathBuf>,
    /// The directory to make: empty, or not there yet
    #[arg(long, value_name = "PATH")]
    data_dir: PathBuf,
    /// Number of the node
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u32).range(1..))]
    node_id: u32,
    /// Where peers will reach the node
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9081")]
    address: String,
    /// Where clients will reach it [default: as peers]
    #[arg(long, value_name = "HOST:PORT")]
    advertise_address: Option<String>,
    /// Which files the node's log is kept in: its raft.persistence.engine
    #[arg(long, value_name = "ENGINE", default_value = "RocksDB")]
    engine: Engine,
}

/// As the configuration names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    #[value(name = "RocksDB")]
    RocksDb,
    #[value(name = "Segments")]
    Segments,
}

pub(crate) fn run(command: SnapshotCommand, args: &ClientArgs) -> Result<(), Failure> {
    match command {
        SnapshotCommand::Save { file } => block_on(save(&file, args)),
        SnapshotCommand::Inspect { file } => inspect(&file, args.output),
        SnapshotCommand::Restore(restore) => make(restore, args.output),
    }
}

/// Written under a name that nobody takes for a backup, until it is whole and durable.
async fn save(file: &Path, args: &ClientArgs) -> Result<(), Failure> {
    if file.exists() {
        return Err(Failure::Usage(format!("{} exists already: choose another name", file.display())));
    }
    let mut name = file.as_os_str().to_owned();
    name.push(".partial");
    let partial = PathBuf::from(name);
    let saved = receive(&partial, args).await.and_then(|()| {
        Archive::open(&partial).and_then(Archive::verify).map_err(refused)?;
        fs::rename(&partial, file).map_err(Failure::io(format!("cannot rename {}", partial.display())))?;
        let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(Failure::io("cannot make the file durable"))
    });
    if saved.is_err() {
        // It may not have been made; the error says what counts.
        let _ = fs::remove_file(&partial);
    }
    saved?;
    let archive = Archive::open(file).map_err(refused)?;
    let manifest = archive.manifest();
    match args.output {
        Layout::Json => output::json(&described(file, &archive, true)),
        Layout::Table => output::line(&format!(
            "saved revision {} with {} keys ({}) to {}, verified",
            manifest.revision,
            manifest.keys,
            size(length(file)),
            file.display()
        )),
    }
}

async fn receive(partial: &Path, args: &ClientArgs) -> Result<(), Failure> {
    let client = args.client()?;
    let endpoint = args.endpoints.first().map_or("", |endpoint| endpoint);
    let mut snapshot = client.snapshot(endpoint).await?;
    let failed = || Failure::io(format!("cannot write {}", partial.display()));
    let mut out = File::create(partial).map_err(failed())?;
    let bar = progress(snapshot.total_bytes());
    while let Some(piece) = snapshot.next().await? {
        out.write_all(&piece).map_err(failed())?;
        bar.inc(piece.len() as u64);
    }
    bar.finish_and_clear();
    out.sync_all().map_err(failed())
}

/// On standard error, and only where somebody looks.
fn progress(total_bytes: u64) -> ProgressBar {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(Some(total_bytes), target);
    let style = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}

fn inspect(file: &Path, layout: Layout) -> Result<(), Failure> {
    let archive = Archive::open(file).map_err(refused)?;
    let description = described(file, &archive, true);
    let manifest = archive.manifest().clone();
    archive.verify().map_err(refused)?;
    if layout == Layout::Json {
        return output::json(&description);
    }
    let content: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    let age = unix_time().saturating_sub(Duration::from_millis(manifest.created_unix_ms));
    let rows = [
        ("cluster", format!("{:016x}", manifest.cluster_id)),
        ("epoch", manifest.epoch.to_string()),
        ("revision", manifest.revision.to_string()),
        ("oldest revision", manifest.compacted_revision.to_string()),
        ("log entry", format!("{} of term {}", manifest.index, manifest.term)),
        ("keys", manifest.keys.to_string()),
        ("leases", manifest.leases.to_string()),
        ("sessions", manifest.sessions.to_string()),
        ("saved from", format!("node {}, d-engine {}", manifest.node_id, manifest.version)),
        ("age", uptime(age)),
        ("store time", uptime(Duration::from_nanos(manifest.store_time_ns))),
        ("files", format!("{} with {}", manifest.files.len(), size(content))),
        ("size", size(length(file))),
        ("checksums", "verified".to_owned()),
    ];
    output::table(["WHAT", "VALUE"], rows.map(|(what, value)| [what.to_owned(), value]))
}

fn described(file: &Path, archive: &Archive, verified: bool) -> serde_json::Value {
    let manifest = archive.manifest();
    json!({
        "file": file,
        "cluster_id": format!("{:016x}", manifest.cluster_id),
        "epoch": manifest.epoch,
        "revision": manifest.revision,
        "compacted_revision": manifest.compacted_revision,
        "term": manifest.term,
        "index": manifest.index,
        "keys": manifest.keys,
        "leases": manifest.leases,
        "sessions": manifest.sessions,
        "node_id": manifest.node_id,
        "version": manifest.version,
        "created_unix_ms": manifest.created_unix_ms,
        "bytes": length(file),
        "verified": verified,
    })
}

fn make(args: RestoreArgs, layout: Layout) -> Result<(), Failure> {
    let client_address = args.advertise_address.unwrap_or_else(|| args.address.clone());
    let node = NewNode {
        data_directory: args.data_dir,
        node_id: NodeId(args.node_id),
        peer_address: args.address,
        client_address,
        log_engine: match args.engine {
            Engine::RocksDb => LogEngine::RocksDb,
            Engine::Segments => LogEngine::Segments,
        },
    };
    // What the server takes for granted need not be said.
    let engine = match args.engine {
        Engine::RocksDb => "",
        Engine::Segments => "D_ENGINE__RAFT__PERSISTENCE__ENGINE=Segments ",
    };
    let restored = match (&args.file, &args.from_data_dir) {
        (Some(file), _) => restore(file, &node),
        (None, Some(survivor)) => recover(survivor, &node),
        (None, None) => return Err(Failure::Usage("name a file or --from-data-dir".to_owned())),
    };
    let Restored { cluster_id, epoch, revision_before, revision, keys, leases } = restored.map_err(refused)?;
    match layout {
        Layout::Json => output::json(&json!({
            "data_dir": node.data_directory,
            "node_id": node.node_id.get(),
            "cluster_id": format!("{cluster_id:016x}"),
            "epoch": epoch.get(),
            "revision_before": revision_before.get(),
            "revision": revision.get(),
            "keys": keys,
            "leases": leases,
        })),
        Layout::Table => {
            output::line(&format!(
                "made {}: node {} of the new cluster {cluster_id:016x}, restore epoch {epoch}, with {keys} keys of \
                 revision {revision_before}; the revision goes on from {revision}",
                node.data_directory.display(),
                node.node_id,
            ))?;
            output::line(&format!(
                "start it: {engine}d-engine server --node-id {} --initial-cluster {}={} --data-dir {}",
                node.node_id,
                node.node_id,
                node.peer_address,
                node.data_directory.display(),
            ))
        }
    }
}

fn length(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |metadata| metadata.len())
}

fn refused(error: BackupError) -> Failure {
    match error {
        BackupError::Io { action, path, source } if source.kind() == ErrorKind::NotFound => {
            Failure::Usage(format!("cannot {action} {}: {source}", path.display()))
        }
        error => Failure::Backup(error),
    }
}
