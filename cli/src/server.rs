//! `d-engine server`: from flags and a file to a running node.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use d_engine_server::config::{ConfigError, RaftNodeConfig};
use d_engine_server::node::Node;
use d_engine_server::services::raise_open_files_limit;
use tokio::signal::unix::{SignalKind, signal};

use crate::export::Export;
use crate::failure::Failure;
use crate::logging;

/// openraft tells of every step, and of every failed attempt to reach a peer.
const LOG_FILTER: &str = "info,openraft=error";

/// How long threads may take to end after a fault.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// How the server logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

/// A flag wins over the environment (D_ENGINE__CLUSTER__NODE_ID=1), which wins over --config, which wins over the file
/// that CONFIG_PATH names
#[derive(Debug, Args)]
pub(crate) struct ServerArgs {
    /// Configuration file in TOML
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// One node with a temporary directory that is deleted at the end; no configuration needed
    #[arg(long, conflicts_with_all = ["config", "data_dir", "initial_cluster"])]
    dev: bool,
    /// Number of this node
    #[arg(long, value_name = "ID")]
    node_id: Option<u32>,
    /// Where clients and peers connect to
    #[arg(long, value_name = "HOST:PORT")]
    listen_address: Option<String>,
    /// Under which address clients are told to reach this node
    #[arg(long, value_name = "HOST:PORT")]
    advertise_address: Option<String>,
    /// The members of a new cluster, this node included; the same list on every node
    #[arg(long, value_name = "ID=HOST:PORT,...", value_delimiter = ',')]
    initial_cluster: Vec<InitialMember>,
    /// Directory of the node's data
    #[arg(long, value_name = "PATH")]
    data_dir: Option<PathBuf>,
    /// Where metrics and health are served over HTTP
    #[arg(long, value_name = "HOST:PORT")]
    monitoring_address: Option<String>,
    /// Collector that the spans of traced calls are sent to, over OTLP (gRPC)
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// Format of the log on standard error; D_ENGINE_LOG or RUST_LOG say how much (default: info)
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// One `id=host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct InitialMember {
    id: u32,
    address: String,
}

impl FromStr for InitialMember {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed = || "id=host:port is expected, such as 1=127.0.0.1:9081".to_owned();
        let (id, address) = text.split_once('=').ok_or_else(malformed)?;
        Ok(Self { id: id.parse().map_err(|_| malformed())?, address: address.to_owned() })
    }
}

impl ServerArgs {
    /// What the flags and everything below them amount to.
    fn configuration(&self, dev_directory: Option<&std::path::Path>) -> Result<RaftNodeConfig, ConfigError> {
        let mut config = match (dev_directory, &self.config) {
            (Some(directory), _) => RaftNodeConfig::dev(directory),
            (None, Some(path)) => RaftNodeConfig::new()?.with_override_config(path)?,
            (None, None) => RaftNodeConfig::new()?,
        };
        for (flag, key, value) in self.settings() {
            config = config.with_setting(flag, key, &value)?;
        }
        config.validate()
    }

    /// The flags that stand for a key of the configuration, values as in a file.
    fn settings(&self) -> Vec<(&'static str, &'static str, String)> {
        let text = |text: &Option<String>| text.as_deref().map(quoted);
        let data_dir = self.data_dir.as_ref().map(|path| quoted(&path.to_string_lossy()));
        let members = self.initial_cluster.iter();
        let members: Vec<_> =
            members.map(|m| format!("{{ id = {}, address = {} }}", m.id, quoted(&m.address))).collect();
        let members = (!members.is_empty()).then(|| format!("[{}]", members.join(", ")));
        [
            ("--node-id", "cluster.node_id", self.node_id.map(|id| id.to_string())),
            ("--listen-address", "cluster.listen_address", text(&self.listen_address)),
            ("--advertise-address", "cluster.advertise_address", text(&self.advertise_address)),
            ("--initial-cluster", "cluster.initial_cluster", members),
            ("--data-dir", "cluster.db_root_dir", data_dir),
            ("--monitoring-address", "monitoring.listen_address", text(&self.monitoring_address)),
            ("--otlp-endpoint", "monitoring.otlp_endpoint", text(&self.otlp_endpoint)),
        ]
        .into_iter()
        .filter_map(|(flag, key, value)| Some((flag, key, value?)))
        .collect()
    }
}

/// A TOML string.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            _ if character.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(character))),
            _ => quoted.push(character),
        }
    }
    quoted.push('"');
    quoted
}

/// Runs a server until it is told to stop.
pub(crate) fn run(args: &ServerArgs) -> Result<(), Failure> {
    let dev_directory = if args.dev {
        let created = tempfile::Builder::new().prefix("d-engine-dev-").tempdir();
        Some(created.map_err(Failure::io("cannot create a temporary directory"))?)
    } else {
        None
    };
    let directory = dev_directory.as_ref().map(tempfile::TempDir::path);
    let config = args.configuration(directory).map_err(|error| Failure::Usage(format!("configuration: {error}")))?;
    raise_open_files_limit();
    // Measured: with as many workers as cores, workers and the threads of the storage get into each other's way.
    let workers = std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .map_err(Failure::io("cannot start the runtime"))?;
    let export = {
        let _within = runtime.enter();
        Export::start(config.cluster.node_id, &config.monitoring)?
    };
    let _logging = logging::start(args.log_format, LOG_FILTER, config.cluster.log_dir.as_deref(), export.as_ref())?;
    let ended = runtime.block_on(async {
        // Before anything slow: from here on a signal means a graceful stop.
        let told_to_stop = stop_signal().map_err(Failure::io("cannot listen for signals"))?;
        let node = Node::start(config).await.map_err(|error| Failure::Server(format!("cannot start: {error}")))?;
        node.run_until(told_to_stop).await.map_err(|error| Failure::Server(format!("stopped by a fault: {error}")))
    });
    // While the runtime goes on: it does the sending.
    drop(export);
    if ended.is_err() {
        // Threads that a fault left behind must not keep the process.
        runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    }
    ended
}

/// Ends with the first SIGTERM or SIGINT. The second one ends the process at once, for whoever cannot wait.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // The node may have ended by itself; then nobody listens.
        let _ = stop.send(());
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::process::exit(130);
    });
    Ok(async move {
        let _ = stopped.await;
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn configuration(line: &str) -> Result<RaftNodeConfig, ConfigError> {
        let Command::Server(args) = Cli::parse_from(line.split(' ')).command else { panic!("{line}") };
        args.configuration(args.dev.then_some(std::path::Path::new("/tmp/dev")))
    }

    #[test]
    fn flags_alone_are_a_configuration() {
        let config = configuration(
            "d-engine server --node-id 2 --initial-cluster 1=127.0.0.1:9181,2=127.0.0.1:9182 --data-dir /tmp/a\"b \
             --monitoring-address 127.0.0.1:9282",
        )
        .unwrap();
        assert_eq!(config.cluster.node_id, 2);
        assert_eq!(config.cluster.listen_address.as_deref(), Some("127.0.0.1:9182"));
        assert_eq!(config.cluster.initial_cluster.len(), 2);
        assert_eq!(config.cluster.db_root_dir, PathBuf::from("/tmp/a\"b"));
        assert_eq!(config.monitoring.listen_address.as_deref(), Some("127.0.0.1:9282"));
    }

    #[test]
    fn a_refused_flag_is_named() {
        let error = configuration("d-engine server --node-id 3 --initial-cluster 1=127.0.0.1:9181").unwrap_err();
        assert!(error.to_string().contains("--"), "{error}");
        let error = configuration("d-engine server --config /nowhere/n1.toml").unwrap_err();
        assert!(error.to_string().contains("/nowhere/n1.toml"), "{error}");
    }

    #[test]
    fn a_dev_node_needs_nothing() {
        let config = configuration("d-engine server --dev --listen-address 127.0.0.1:9999").unwrap();
        assert_eq!(config.cluster.db_root_dir, PathBuf::from("/tmp/dev"));
        assert_eq!(config.cluster.listen_address.as_deref(), Some("127.0.0.1:9999"));
    }
}
