//! What the kernel tells of the server processes.

use std::fs;
use std::time::Duration;

/// The server processes that this one has started.
pub(crate) fn servers() -> Vec<u32> {
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
pub(crate) fn cpu_time(id: u32) -> Duration {
    let ticks_per_second = rustix::param::clock_ticks_per_second();
    stat(id).map_or(Duration::ZERO, |fields| Duration::from_secs_f64(fields.cpu_ticks as f64 / ticks_per_second as f64))
}

/// Resident memory.
pub(crate) fn resident_bytes(id: u32) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{id}/statm")).ok();
    let pages: Option<u64> = pages.and_then(|text| text.split_whitespace().nth(1)?.parse().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
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
