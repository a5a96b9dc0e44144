//! Where the program's own log goes: standard error, filtered by the environment.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::server::LogFormat;

/// Starts logging. `D_ENGINE_LOG`, or else `RUST_LOG`, says how much; otherwise `default` does.
pub(crate) fn start(format: LogFormat, default: &str) {
    let wish = ["D_ENGINE_LOG", "RUST_LOG"].iter().find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()));
    let filter = EnvFilter::try_new(wish.as_deref().unwrap_or(default)).unwrap_or_else(|error| {
        eprintln!("d-engine: the log filter is ignored: {error}");
        EnvFilter::new(default)
    });
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
}
