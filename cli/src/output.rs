//! Standard output: tables for people, JSON for programs.

use std::io::Write;

use comfy_table::{Table, presets};
use d_engine_client::{Header, KeyValue};
use serde::Serialize;

use crate::encoding::base64;
use crate::failure::Failure;

/// Prints a line.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    bytes(format!("{text}\n").as_bytes())
}

/// Prints bytes as they are.
pub(crate) fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(Failure::io("cannot write to standard output"))
}

/// Prints one JSON document.
pub(crate) fn json(document: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(document)
        .map_err(|error| Failure::Io { what: "cannot write JSON".to_owned(), source: error.into() })?;
    line(&text)
}

/// Prints one JSON document on a line of its own, for output that goes on.
pub(crate) fn json_line(document: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(document)
        .map_err(|error| Failure::Io { what: "cannot write JSON".to_owned(), source: error.into() })?;
    line(&text)
}

/// Prints columns under their names. Without rows: nothing but the names.
pub(crate) fn table<const N: usize>(
    names: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(names);
    for row in rows {
        table.add_row(row);
    }
    // The layout pads every cell on both sides; the first column starts at the margin.
    for row in table.lines() {
        line(row.strip_prefix(' ').unwrap_or(&row).trim_end())?;
    }
    Ok(())
}

/// A header as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct HeaderJson {
    cluster_id: String,
    epoch: u64,
    revision: u64,
    node_id: u32,
    term: u64,
}

impl From<Header> for HeaderJson {
    fn from(header: Header) -> Self {
        Self {
            // As text: a number of this size loses digits in many JSON readers.
            cluster_id: format!("{:016x}", header.cluster_id),
            epoch: header.epoch.get(),
            revision: header.revision.get(),
            node_id: header.node_id.get(),
            term: header.term.get(),
        }
    }
}

/// Bytes as JSON text, if they are UTF-8.
pub(crate) fn text(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes).ok().map(str::to_owned)
}

/// A key as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct KeyJson {
    /// Left out if the key is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    key_base64: String,
}

impl KeyJson {
    pub(crate) fn of(key: &[u8]) -> Self {
        Self { key: text(key), key_base64: base64(key) }
    }
}

/// A key and its value as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct KeyValueJson {
    #[serde(flatten)]
    key: KeyJson,
    /// Left out if the value is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    value_base64: String,
    create_revision: u64,
    mod_revision: u64,
    version: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<u64>,
}

impl From<&KeyValue> for KeyValueJson {
    fn from(kv: &KeyValue) -> Self {
        Self {
            key: KeyJson::of(&kv.key),
            value: text(&kv.value),
            value_base64: base64(&kv.value),
            create_revision: kv.create_revision.get(),
            mod_revision: kv.mod_revision.get(),
            version: kv.version,
            lease: kv.lease.map(|lease| lease.get()),
        }
    }
}
