//! What the kernel tells of the server processes.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// The server processes that this one has started.
#[must_use]
pub fn servers() -> Vec<u32> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id| {
        let Some(fields) = stat(*id) else { return false };
        fields.name == "d-engine" && fields.parent == own
    })
    .collect()
}

/// CPU time spent so far, in user and kernel mode.
#[must_use]
pub fn cpu_time(id: u32) -> Duration {
    let ticks_per_second = rustix::param::clock_ticks_per_second();
    stat(id).map_or(Duration::ZERO, |fields| Duration::from_secs_f64(fields.cpu_ticks as f64 / ticks_per_second as f64))
}

/// Open descriptors.
#[must_use]
pub fn descriptors(id: u32) -> u64 {
    fs::read_dir(format!("/proc/{id}/fd")).map_or(0, |entries| entries.count() as u64)
}

/// Resident memory.
#[must_use]
pub fn resident_bytes(id: u32) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{id}/statm")).ok();
    let pages: Option<u64> = pages.and_then(|text| text.split_whitespace().nth(1)?.parse().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

/// Bytes of the files in a directory and below it. What vanishes meanwhile does not count.
#[must_use]
pub fn directory_bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(file) if file.is_dir() => directory_bytes(&entry.path()),
        Ok(file) => file.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

struct Stat {
    name: String,
    parent: u32,
    cpu_ticks: u64,
}

/// The fields of `/proc/<id>/stat` in use; see proc(5).
fn stat(id: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (name, rest) = text.split_once('(')?.1.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat { name: name.to_owned(), parent: u32::try_from(number(1)?).ok()?, cpu_ticks: number(11)? + number(12)? })
}
