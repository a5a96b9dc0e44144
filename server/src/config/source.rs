//! Where values come from: files and single settings, and the place of a key in them for error messages.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::ConfigError;
use super::file::FileConfig;

/// Where a key was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1; `None` if unknown.
        line: Option<usize>,
    },
    /// By an environment variable or a flag of this name.
    Setting(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line: Some(line) } => write!(f, "{}:{line}", path.display()),
            Self::File { path, line: None } => write!(f, "{}", path.display()),
            Self::Setting(name) => f.write_str(name),
        }
    }
}

/// Something that sets keys.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// A file, with its content.
    File { path: PathBuf, text: String },
    /// One key, by an environment variable or a flag.
    Setting { origin: String, key: String, value: String },
}

impl Source {
    /// The keys it sets.
    pub(super) fn parse(&self) -> Result<FileConfig, ConfigError> {
        match self {
            Self::File { path, text } => toml::from_str(text).map_err(|error| {
                let line = error.span().map(|span| line_number(text, span.start));
                let shown = line.and_then(|line| text.lines().nth(line - 1)).map_or_else(String::new, |line| {
                    let line = line.trim();
                    if line.is_empty() { String::new() } else { format!(" in `{line}`") }
                });
                let place = Place::File { path: path.clone(), line };
                ConfigError::Malformed { place, message: format!("{}{shown}", error.message()) }
            }),
            Self::Setting { origin, key, value } => parse_setting(key, value).map_err(|message| {
                let place = Place::Setting(origin.clone());
                ConfigError::Malformed { place, message: format!("{message} in `{key} = {value}`") }
            }),
        }
    }

    /// Where it sets `key`, if it does.
    pub(super) fn place_of(&self, key: &str) -> Option<Place> {
        match self {
            Self::File { path, text } => {
                let document = DeTable::parse(text).ok()?;
                let offset = offset_of(document.get_ref(), key)?;
                Some(Place::File { path: path.clone(), line: Some(line_number(text, offset)) })
            }
            Self::Setting { origin, key: own, .. } => (own == key).then(|| Place::Setting(origin.clone())),
        }
    }
}

/// The content of a file whose path may leave out `.toml`.
pub(super) fn read(path: &Path) -> Result<(PathBuf, String), ConfigError> {
    let mut candidates = vec![path.to_owned()];
    if path.extension().is_none_or(|extension| extension != "toml") {
        let mut name = path.as_os_str().to_owned();
        name.push(".toml");
        candidates.push(name.into());
    }
    let with_extension = candidates.get(1).cloned();
    for candidate in candidates {
        if candidate.is_file() {
            return match std::fs::read_to_string(&candidate) {
                Ok(text) => Ok((candidate, text)),
                Err(source) => Err(ConfigError::Unreadable { path: candidate, source }),
            };
        }
    }
    Err(ConfigError::NotFound { path: path.to_owned(), with_extension })
}

/// Reads `value` as TOML, and as a bare string where that does not fit.
fn parse_setting(key: &str, value: &str) -> Result<FileConfig, String> {
    let parsed =
        toml::from_str::<toml::Table>(&format!("value = {value}")).ok().and_then(|mut table| table.remove("value"));
    let text = toml::Value::String(value.to_owned());
    let result = FileConfig::deserialize(nested(key, parsed.clone().unwrap_or_else(|| text.clone())));
    match result {
        Err(first) if parsed.is_some() => FileConfig::deserialize(nested(key, text)).map_err(|_| first),
        result => result,
    }
    .map_err(|error| error.message().to_owned())
}

/// `a.b = value` as nested tables.
fn nested(key: &str, value: toml::Value) -> toml::Value {
    key.rsplit('.').fold(value, |value, name| toml::Table::from_iter([(name.to_owned(), value)]).into())
}

fn offset_of(table: &DeTable<'_>, key: &str) -> Option<usize> {
    let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
    let (name, value): (&Spanned<_>, &Spanned<DeValue<'_>>) =
        table.iter().find(|(name, _)| name.get_ref().as_ref() == first)?;
    match (rest, value.get_ref()) {
        (None, _) => Some(name.span().start),
        (Some(rest), DeValue::Table(table)) => offset_of(table, rest),
        _ => None,
    }
}

fn line_number(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}
