//! On what machine a measurement was made.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use super::report::Spread;
use crate::callers::micros;

const SYNCS: usize = 100;
const BLOCK: [u8; 4096] = [b'x'; 4096];

/// Processor, cores, memory, kernel, and what an fdatasync costs where the servers keep their data.
pub(crate) fn description() -> String {
    let directory = std::env::temp_dir();
    format!(
        "{} cores of {}, {} MiB of memory, Linux {}, {} on {}, where an fdatasync of 4 KiB takes {:.0} µs",
        std::thread::available_parallelism().map_or(1, usize::from),
        field("/proc/cpuinfo", "model name"),
        field("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse::<u64>().unwrap_or(0) / 1024,
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        directory.display(),
        file_system(&directory),
        sync_us(&directory),
    )
}

/// The first value of this name in a file of the kernel with lines of `name: value`.
fn field(path: &str, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.find(|(key, _)| key.trim() == name).map_or_else(String::new, |(_, value)| value.trim().to_owned())
}

/// The type of the file system a directory is on.
fn file_system(directory: &Path) -> String {
    let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let holding = mounts.filter(|(point, _)| directory.starts_with(point));
    holding.max_by_key(|(point, _)| point.len()).map_or_else(String::new, |(_, kind)| kind.to_owned())
}

/// The median time of an append and its fdatasync.
fn sync_us(directory: &Path) -> f64 {
    let mut file = tempfile::tempfile_in(directory).expect("a temporary file");
    let times = (0..SYNCS).map(|_| {
        let began = Instant::now();
        file.write_all(&BLOCK).and_then(|()| file.sync_data()).expect("a temporary file can be written");
        micros(began.elapsed()) as f64
    });
    Spread::of(times).map_or(0.0, |times| times.median)
}
