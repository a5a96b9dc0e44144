//! How a command ends when it does not end well: what is printed, and with which code the process exits.

use std::process::ExitCode;

use d_engine_client::{Error, ErrorKind, Outcome};
use d_engine_server::backup::BackupError;

use crate::encoding::DecodeError;

/// The exit codes, for `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the key, or the lease, does not exist
  2  wrong usage, or the request is invalid
  3  the condition of a cas or txn did not hold
  4  a write whose outcome is unknown: read the key before writing again
  5  failed, and nothing was applied
  6  the server could not start, or stopped because of a fault
  7  a lock or a lead was lost
lock and elect exit with the code of the command they run; see their help";

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A call failed.
    #[error("{0}")]
    Call(#[from] Error),
    /// The command line or a file it names makes no sense.
    #[error("{0}")]
    Usage(String),
    /// An argument stands for no bytes.
    #[error("{0}; see --encoding")]
    Encoding(#[from] DecodeError),
    /// A get found nothing.
    #[error("key {key} does not exist")]
    NotFound {
        /// As written by the chosen encoding.
        key: String,
    },
    /// A cas or txn was refused by its condition. What was found is on standard output.
    #[error("{0}")]
    ConditionFailed(String),
    /// The cluster as a whole does not serve. Its table is on standard output.
    #[error("{0}")]
    Unhealthy(String),
    /// Standard output, or a file, cannot be written or read.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A backup is not what it should be, or cannot be restored.
    #[error("{0}")]
    Backup(#[from] BackupError),
    /// The server ended.
    #[error("{0}")]
    Server(String),
    /// The command to run cannot be run.
    #[error("cannot run {program}: {source}")]
    Command {
        /// The program.
        program: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A signal asked for the end before anything was done.
    #[error("ended by signal {signal}")]
    Interrupted {
        /// Its number.
        signal: u8,
    },
    /// A lock or a lead was lost; a command that ran under it was ended.
    #[error("{name} was lost: somebody else may hold it now. Token {token} is worth nothing any more")]
    Lost {
        /// Of the lock or election.
        name: String,
        /// Its fencing token.
        token: String,
    },
}

impl Failure {
    /// For `map_err` on input and output.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// The code to exit with.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => 1,
            Self::Call(error) if error.kind() == ErrorKind::LeaseNotFound => 1,
            Self::Usage(_) | Self::Encoding(_) => 2,
            Self::ConditionFailed(_) => 3,
            Self::Call(error) if error.outcome() != Outcome::NotApplied => 4,
            Self::Call(error) if error.kind() == ErrorKind::InvalidArgument => 2,
            Self::Call(_) | Self::Unhealthy(_) | Self::Io { .. } | Self::Backup(_) => 5,
            Self::Server(_) => 6,
            Self::Lost { .. } => 7,
            // As shells do.
            Self::Command { source, .. } if source.kind() == std::io::ErrorKind::NotFound => 127,
            Self::Command { .. } => 126,
            Self::Interrupted { signal } => 128 + signal,
        }
    }

    /// Says why, and gives the code.
    pub(crate) fn report(&self) -> ExitCode {
        // Whoever reads our output may stop reading, as `head` does: that is no failure of ours to tell of.
        let silent = match self {
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::BrokenPipe,
            Self::Interrupted { .. } => true,
            _ => false,
        };
        if !silent {
            eprintln!("d-engine: {self}");
        }
        ExitCode::from(self.exit_code())
    }
}
