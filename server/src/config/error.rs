//! Why a configuration is refused.

use std::path::PathBuf;

use super::source::Place;

/// Why a configuration is refused. Every variant names the place and what would be valid.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error(
        "there is no configuration file {}{}; name one that exists, or leave it out to start with the defaults",
        path.display(), with_extension.as_ref().map_or_else(String::new, |path| format!(" or {}", path.display()))
    )]
    NotFound {
        /// The path as given.
        path: PathBuf,
        /// The path with `.toml`, which was tried too.
        with_extension: Option<PathBuf>,
    },
    /// The file exists but cannot be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong kind.
    #[error("{place}: {message}")]
    Malformed {
        /// Where it stands.
        place: Place,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// A value that is out of bounds or contradicts another.
    #[error("{}{key}: {problem}; {remedy}", place.as_ref().map_or_else(String::new, |place| format!("{place}: ")))]
    Invalid {
        /// Where it was set; `None` for a default or a program's own setting.
        place: Option<Place>,
        /// The dotted key.
        key: &'static str,
        /// What is wrong.
        problem: String,
        /// What would be valid.
        remedy: String,
    },
}
