//! A wall clock of a node's own: libfaketime shifts what the process reads as the time of day by the offset in a file,
//! and leaves the monotonic clocks alone, as a step by an operator or a time server does.

use std::path::{Path, PathBuf};

use crate::cluster::Node;

/// The wall clock of one node.
#[derive(Clone, Debug)]
pub struct WallClock {
    offset: PathBuf,
}

impl WallClock {
    /// Gives the node a wall clock of its own, from its next start on. Its offset is kept in a file in `directory`.
    ///
    /// # Panics
    /// When libfaketime is not installed: see `scripts/setup`.
    #[must_use]
    pub fn give(node: &mut Node, directory: &Path) -> Self {
        let clock = Self { offset: directory.join(format!("n{}-wall-clock", node.id)) };
        clock.step(0);
        node.set_environment("LD_PRELOAD", libfaketime());
        node.set_environment("FAKETIME_TIMESTAMP_FILE", &clock.offset);
        node.set_environment("FAKETIME_NO_CACHE", "1");
        node.set_environment("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        clock
    }

    /// Sets it to be `offset` seconds ahead of the machine's.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn step(&self, offset: i64) {
        // By renaming, so that the node never reads half a file.
        let new = self.offset.with_extension("new");
        std::fs::write(&new, format!("{offset:+}\n")).expect("the offset can be written");
        std::fs::rename(&new, &self.offset).expect("the offset can be replaced");
    }
}

/// The library of the package, for programs with threads. The command that would name it keeps notes in shared memory that
/// outlive it, and refuses when it finds another's.
///
/// # Panics
/// When it is not installed: see `scripts/setup`.
#[must_use]
pub fn libfaketime() -> PathBuf {
    const WITHIN: &str = "faketime/libfaketimeMT.so.1";
    let mut directories = std::fs::read_dir("/usr/lib").expect("a system has libraries").flatten();
    let library = directories.find_map(|directory| Some(directory.path().join(WITHIN)).filter(|path| path.exists()));
    library.expect("faketime is installed: see scripts/setup")
}
