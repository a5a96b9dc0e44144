//! Where the program's own log goes: standard error, a server's also to files; filtered by the environment.

use std::io::IsTerminal;
use std::path::Path;

use tracing_appender::non_blocking::{NonBlocking, WorkerGuard};
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

use crate::export::Export;
use crate::failure::Failure;
use crate::server::LogFormat;

/// Days of log files that are kept.
const FILES_MAX: usize = 14;

/// Writes what is left to the files when it is dropped.
#[must_use]
pub(crate) struct Logging(#[expect(dead_code, reason = "held for its drop")] Option<WorkerGuard>);

/// Starts logging, into `directory` too if there is one. `D_ENGINE_LOG`, or else `RUST_LOG`, says how much; otherwise
/// `default` does. The spans of traced calls go to `export`, whatever the log takes.
pub(crate) fn start(
    format: LogFormat,
    default: &str,
    directory: Option<&Path>,
    export: Option<&Export>,
) -> Result<Logging, Failure> {
    let wish = ["D_ENGINE_LOG", "RUST_LOG"].iter().find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()));
    let filter = EnvFilter::try_new(wish.as_deref().unwrap_or(default)).unwrap_or_else(|error| {
        eprintln!("d-engine: the log filter is ignored: {error}");
        EnvFilter::new(default)
    });
    let (files, guard) = directory.map(files).transpose()?.unzip();
    let terminal = std::io::stderr().is_terminal();
    let log = match format {
        LogFormat::Text => fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(terminal)
            .and_then(files.map(|files| fmt::layer().with_writer(files).with_ansi(false)))
            .boxed(),
        LogFormat::Json => fmt::layer()
            .json()
            .with_writer(std::io::stderr)
            .and_then(files.map(|files| fmt::layer().json().with_writer(files)))
            .boxed(),
    };
    Registry::default().with(log.with_filter(filter)).with(export.map(Export::layer)).init();
    Ok(Logging(guard))
}

/// One file a day, written by a thread of its own, so that a slow disk never holds up the server.
fn files(directory: &Path) -> Result<(NonBlocking, WorkerGuard), Failure> {
    let appender = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("d-engine")
        .filename_suffix("log")
        .max_log_files(FILES_MAX)
        .build(directory)
        .map_err(|error| Failure::Server(format!("cannot log into {}: {error}", directory.display())))?;
    Ok(tracing_appender::non_blocking(appender))
}
