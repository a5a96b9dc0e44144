//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use d_engine_client::{Client, ClientBuilder, Consistency, Revision, TlsOptions};

use crate::compact::CompactArgs;
use crate::encoding::Encoding;
use crate::failure::{EXIT_CODES, Failure};
use crate::kv::KvCommand;
use crate::lease::LeaseCommand;
use crate::lock::{ElectArgs, LockArgs};
use crate::member::MemberCommand;
use crate::server::ServerArgs;
use crate::snapshot::SnapshotCommand;
use crate::watch::WatchArgs;

const ABOUT_BYTES: &str = "\
Keys and values are bytes. On the command line and in tables they are written as --encoding says. As text, `\\xNN` \
stands for any byte and `\\\\` for a backslash, so that what is printed can be given back. JSON output has `key` and \
`value` if they are text, and always `key_base64` and `value_base64`.";

/// Runs a d-engine server, or talks to a cluster
#[derive(Debug, Parser)]
#[command(name = "d-engine", version, max_term_width = 100, after_help = EXIT_CODES)]
#[command(after_long_help = format!("{ABOUT_BYTES}\n\n{EXIT_CODES}"))]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a server
    Server(ServerArgs),
    /// Reads and writes keys
    #[command(subcommand, after_help = EXIT_CODES)]
    Kv(KvCommand),
    /// Shows changes of keys as they happen, or from a past revision on
    Watch(WatchArgs),
    /// Opens, prolongs, ends and shows leases
    #[command(subcommand, after_help = EXIT_CODES)]
    Lease(LeaseCommand),
    /// Waits for a lock and holds it while a command runs, or until Ctrl-C
    Lock(LockArgs),
    /// Waits to be elected and leads while a command runs, or until Ctrl-C
    Elect(ElectArgs),
    /// Forgets the history before a revision; current values stay
    Compact(CompactArgs),
    /// Has all members compare their states; one whose state is not the cluster's stops
    Check,
    /// Saves, examines and restores backups
    #[command(subcommand, after_help = EXIT_CODES)]
    Snapshot(SnapshotCommand),
    /// Shows the state of every member
    Status,
    /// Shows and changes who belongs to the cluster, and who leads it
    #[command(subcommand, after_help = EXIT_CODES)]
    Member(MemberCommand),
    /// Prints a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// How output is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// Columns for people
    #[default]
    Table,
    /// JSON for programs: one document, or one a line where output goes on
    Json,
}

/// How reads are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Reads {
    /// The latest committed value; relies on no clock
    Linearizable,
    /// The latest committed value, from the leader's lease
    Lease,
    /// A committed value, from the nearest node
    Eventual,
}

/// What every command that talks to a cluster understands.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Options for talking to a cluster")]
pub(crate) struct ClientArgs {
    /// Nodes to start from; one that answers is enough
    #[arg(long, global = true, env = "D_ENGINE_ENDPOINTS", value_name = "HOST:PORT,...", value_delimiter = ',')]
    #[arg(default_value = "127.0.0.1:9081")]
    pub(crate) endpoints: Vec<String>,
    /// Budget of each call, such as 500ms or 5s [default: 5s, for status 2s]
    #[arg(long, global = true, value_name = "DURATION", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
    /// Speak TLS, and trust servers whose certificate comes from a CA in this PEM file
    #[arg(long, global = true, env = "D_ENGINE_TLS_CA", value_name = "PATH")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Show the certificate in this PEM file
    #[arg(long, global = true, env = "D_ENGINE_TLS_CERT", value_name = "PATH")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert, a PEM file
    #[arg(long, global = true, env = "D_ENGINE_TLS_KEY", value_name = "PATH")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Expect this name in the servers' certificates instead of the host they are reached at
    #[arg(long, global = true, env = "D_ENGINE_TLS_SERVER_NAME", value_name = "NAME")]
    pub(crate) tls_server_name: Option<String>,
    /// Layout of the output
    #[arg(long, short, global = true, value_name = "LAYOUT", default_value = "table")]
    pub(crate) output: Layout,
    /// How keys and values are written on the command line and in tables
    #[arg(long, global = true, value_name = "ENCODING", default_value = "text")]
    pub(crate) encoding: Encoding,
    /// How reads are served [default: as the server is configured]
    #[arg(long, global = true, value_name = "POLICY")]
    pub(crate) consistency: Option<Reads>,
    /// Read only from a node that has applied this revision
    #[arg(long, global = true, value_name = "REVISION", default_value_t = 0, hide_default_value = true)]
    pub(crate) min_revision: u64,
}

impl ClientArgs {
    /// The client these arguments describe. Within a runtime.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        Ok(self.builder()?.build()?)
    }

    /// What the TLS flags say; `None` if there is none of them.
    fn tls(&self) -> Result<Option<TlsOptions>, Failure> {
        let Some(ca) = &self.tls_ca else {
            let others = self.tls_cert.is_some() || self.tls_key.is_some() || self.tls_server_name.is_some();
            let problem = "--tls-ca is missing: the other TLS options have no effect without it";
            return if others { Err(Failure::Usage(problem.to_owned())) } else { Ok(None) };
        };
        let mut tls = TlsOptions::new().ca_file(ca);
        match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => tls = tls.identity_files(certificate, key),
            (None, None) => {}
            _ => return Err(Failure::Usage("--tls-cert and --tls-key go together".to_owned())),
        }
        Ok(Some(match &self.tls_server_name {
            Some(name) => tls.server_name(name),
            None => tls,
        }))
    }

    pub(crate) fn builder(&self) -> Result<ClientBuilder, Failure> {
        let mut builder = Client::builder().endpoints(&self.endpoints);
        if let Some(timeout) = self.timeout {
            builder = builder.call_timeout(timeout).connect_timeout(timeout.min(Duration::from_secs(1)));
        }
        if let Some(tls) = self.tls()? {
            builder = builder.tls(tls);
        }
        Ok(match self.consistency {
            None => builder,
            Some(Reads::Linearizable) => builder.default_consistency(Consistency::Linearizable),
            Some(Reads::Lease) => builder.default_consistency(Consistency::Lease),
            Some(Reads::Eventual) => builder.default_consistency(Consistency::Eventual),
        })
    }

    pub(crate) fn min_revision(&self) -> Revision {
        Revision(self.min_revision)
    }
}

/// Reads a duration: a number and `ms`, `s`, `m`, `h` or `d`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => 0,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(milliseconds)) {
        Some(total) if total > 0 => Ok(Duration::from_millis(total)),
        _ => Err("a number above 0 with a unit is expected, such as 500ms, 5s, 10m, 1h or 7d".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_stand_before_and_after_the_command() {
        for line in ["d-engine -o json --endpoints a:1,b:2 kv get k", "d-engine kv get k -o json --endpoints a:1,b:2"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.client.endpoints, ["a:1", "b:2"]);
            assert_eq!(cli.client.output, Layout::Json);
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("36h"), Ok(Duration::from_secs(36 * 3600)));
        assert_eq!(duration("7d"), Ok(Duration::from_secs(7 * 24 * 3600)));
        for text in ["", "5", "s", "0s", "-1s", "1w", "1.5s", "99999999999999999999s", "18446744073709551615m"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            "d-engine kv cas k new",
            "d-engine kv cas k new --expected a --missing",
            "d-engine kv put k v --file f",
            "d-engine kv put k",
            "d-engine kv del k --prefix --range-end z",
            "d-engine kv range k --prefix p",
            "d-engine kv range --keys-only --count-only",
            "d-engine server --dev --data-dir d",
            "d-engine kv get k --consistency strong",
            "d-engine kv get k --history --revision 3",
            "d-engine kv put k v --ttl 5s --lease 3",
            "d-engine watch",
            "d-engine watch k --prefix p",
            "d-engine watch --range a",
            "d-engine watch k --snapshot --from 3",
            "d-engine watch k --puts --deletes",
            "d-engine lease grant 5",
            "d-engine lease revoke 0",
            "d-engine elect e",
            "d-engine elect e v --observe",
            "d-engine compact",
            "d-engine compact 3 --older-than 1h",
            "d-engine member remove 0",
            "d-engine member add",
            "d-engine member transfer 0",
            "d-engine snapshot restore --data-dir d --node-id 1",
            "d-engine snapshot restore f --from-data-dir o --data-dir d --node-id 1",
            "d-engine snapshot restore f --node-id 1",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
