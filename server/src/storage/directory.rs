//! Whose directory this is: one process at a time, one kind of content, a known format.
//!
//! Every directory of the storage module holds a file `FORMAT`, one line of text with a checksum:
//!
//! ```text
//! d-engine raft-log 1 1f2e3d4c
//! ```
//!
//! It is written last. Whoever makes the content writes `FORMAT.new` first, fills the directory, makes that durable and
//! then [seals](Directory::seal) it by renaming, so a directory without `FORMAT` never held anything acknowledged, and a
//! directory with `FORMAT` but without content lost it. A directory that is not ours is left as it was found.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::StorageError;

const FORMAT: &str = "FORMAT";
const FORMAT_NEW: &str = "FORMAT.new";
const MAGIC: &str = "d-engine";

/// What a directory is meant to hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// The kind of content, one word.
    pub(super) kind: &'static str,
    /// The newest format known, and the one written.
    pub(super) version: u32,
    /// The oldest format that can still be read.
    pub(super) oldest: u32,
}

/// A directory of ours, held against other processes until dropped.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Used to make names durable, too.
    held: Held,
    sealed: bool,
}

impl Directory {
    /// Takes the directory at `path`, making it if there is none.
    ///
    /// # Errors
    /// [`StorageError::Locked`], [`StorageError::Foreign`], [`StorageError::OtherEngine`], [`StorageError::NewerFormat`],
    /// [`StorageError::OlderFormat`], [`StorageError::Corrupt`] or [`StorageError::Io`]; a directory that was there is
    /// unchanged then.
    pub(super) fn claim(path: &Path, layout: Layout) -> Result<Self, StorageError> {
        if path.exists() && !path.is_dir() {
            return Err(StorageError::Foreign { path: path.into(), message: "it is a file".into() });
        }
        create_durably(path).map_err(|error| io_error("create directory", path, &error))?;
        let held = hold(path)?;
        let mut directory = Self { path: path.into(), held, sealed: true };
        match directory.read_marker(FORMAT)? {
            Some(text) => check_marker(&text, path, layout)?,
            None => {
                directory.sealed = false;
                directory.begin(layout)?;
            }
        }
        Ok(directory)
    }

    /// Makes the names of the files in it durable.
    pub(super) fn sync_names(&self) -> io::Result<()> {
        self.held.0.sync_all()
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its content was completed once. Until then it may be made anew.
    pub(super) fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Declares the content complete. It must be durable already; this call is, on return.
    pub(super) fn seal(&mut self) -> Result<(), StorageError> {
        let renamed = fs::rename(self.path.join(FORMAT_NEW), self.path.join(FORMAT));
        renamed
            .and_then(|()| self.held.0.sync_all())
            .map_err(|error| io_error("complete directory", &self.path, &error))?;
        self.sealed = true;
        Ok(())
    }

    /// Marks an empty directory, or one whose making was interrupted, as being made.
    fn begin(&self, layout: Layout) -> Result<(), StorageError> {
        let others = self.other_names()?;
        if !others.is_empty() {
            let interrupted =
                self.read_marker(FORMAT_NEW)?.filter(|text| check_marker(text, &self.path, layout).is_ok());
            return match interrupted {
                Some(_) => Ok(()),
                None => Err(StorageError::Foreign {
                    path: self.path.clone(),
                    message: format!("it holds {} and no file {FORMAT}", others.join(", ")),
                }),
            };
        }
        let write = || {
            let mut file = File::create(self.path.join(FORMAT_NEW))?;
            file.write_all(marker(layout).as_bytes())?;
            file.sync_all()?;
            self.held.0.sync_all()
        };
        write().map_err(|error| io_error("write to", &self.path, &error))
    }

    /// A few names in the directory that do not belong to its marker.
    fn other_names(&self) -> Result<Vec<String>, StorageError> {
        let list = || {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.path)? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                // A file system's own directory at the top of a volume.
                if name != FORMAT_NEW && name != "lost+found" {
                    names.push(name);
                }
            }
            names.sort();
            names.truncate(3);
            Ok(names)
        };
        list().map_err(|error| io_error("list", &self.path, &error))
    }

    fn read_marker(&self, name: &str) -> Result<Option<String>, StorageError> {
        let path = self.path.join(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("read", &path, &error)),
        }
    }
}

/// A directory that is held against other processes, and other claims of this one, until this is dropped.
#[derive(Debug)]
pub(super) struct Held(File);

impl Drop for Held {
    fn drop(&mut self) {
        // Closing is not enough: a process that is being spawned has copies of all descriptors until its program begins,
        // and the directory would look taken for so long. The lock itself is theirs and ours; this gives it up.
        let _ = self.0.unlock();
    }
}

pub(super) fn hold(path: &Path) -> Result<Held, StorageError> {
    let handle = File::open(path).map_err(|error| io_error("open directory", path, &error))?;
    match handle.try_lock() {
        Ok(()) => Ok(Held(handle)),
        Err(TryLockError::WouldBlock) => Err(StorageError::Locked { path: path.into() }),
        Err(TryLockError::Error(error)) => Err(io_error("lock directory", path, &error)),
    }
}

/// Declares a directory that somebody else filled complete. Its files must be durable already; on return so are their
/// names and the declaration.
pub(super) fn seal_made(path: &Path, layout: Layout) -> Result<(), StorageError> {
    let seal = || {
        let mut file = File::create(path.join(FORMAT_NEW))?;
        file.write_all(marker(layout).as_bytes())?;
        file.sync_all()?;
        let directory = File::open(path)?;
        directory.sync_all()?;
        fs::rename(path.join(FORMAT_NEW), path.join(FORMAT))?;
        directory.sync_all()
    };
    seal().map_err(|error| io_error("complete directory", path, &error))
}

/// Bytes on disk of everything below `path`; what vanishes or cannot be read meanwhile counts nothing.
#[must_use]
pub fn disk_bytes(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => disk_bytes(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

pub(super) fn io_error(action: &'static str, path: &Path, error: &io::Error) -> StorageError {
    StorageError::Io { action, path: path.into(), message: error.to_string() }
}

/// Creates a directory and those above it, each made durable in its parent.
fn create_durably(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    create_durably(parent)?;
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => File::open(parent)?.sync_all(),
    }
}

/// The storage engine whose log a directory of this kind is, as the configuration names it.
fn engine_of(kind: &str) -> Option<&'static str> {
    match kind {
        "raft-log" => Some("RocksDB"),
        "raft-log-segments" => Some("Segments"),
        _ => None,
    }
}

fn marker(layout: Layout) -> String {
    let content = format!("{MAGIC} {} {}", layout.kind, layout.version);
    format!("{content} {:08x}\n", crc32c::crc32c(content.as_bytes()))
}

fn check_marker(text: &str, path: &Path, layout: Layout) -> Result<(), StorageError> {
    let foreign = |message: String| StorageError::Foreign { path: path.into(), message };
    let corrupt = |message: &str| StorageError::Corrupt {
        what: format!("file {FORMAT}"),
        path: path.into(),
        message: message.into(),
    };

    if !text.starts_with(MAGIC) {
        return Err(foreign(format!("its file {FORMAT} is another program's")));
    }
    let (content, checksum) = text.trim_end().rsplit_once(' ').ok_or_else(|| corrupt("cut off"))?;
    if checksum != format!("{:08x}", crc32c::crc32c(content.as_bytes())) {
        return Err(corrupt("checksum mismatch"));
    }
    let mut words = content.split(' ').skip(1);
    let (Some(kind), Some(version)) = (words.next(), words.next().and_then(|word| word.parse().ok())) else {
        return Err(corrupt("unreadable"));
    };
    if let (Some(found), Some(expected), true) = (engine_of(kind), engine_of(layout.kind), kind != layout.kind) {
        return Err(StorageError::OtherEngine { path: path.into(), found, expected });
    }
    if kind != layout.kind {
        return Err(foreign(format!("it holds d-engine's {kind}, not its {}", layout.kind)));
    }
    if version > layout.version {
        return Err(StorageError::NewerFormat { path: path.into(), found: version, supported: layout.version });
    }
    if version < layout.oldest {
        return Err(StorageError::OlderFormat { path: path.into(), found: version, supported: layout.oldest });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { kind: "raft-log", version: 2, oldest: 1 };

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn write_marker(path: &Path, content: &str) {
        let checksum = crc32c::crc32c(content.as_bytes());
        fs::write(path.join(FORMAT), format!("{content} {checksum:08x}\n")).unwrap();
    }

    #[test]
    fn a_directory_is_new_until_sealed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b/c");
        assert!(!Directory::claim(&path, LAYOUT).unwrap().is_sealed());
        fs::write(path.join("half"), "made").unwrap();

        let mut again = Directory::claim(&path, LAYOUT).unwrap();
        assert!(!again.is_sealed());
        again.seal().unwrap();
        drop(again);

        assert!(Directory::claim(&path, LAYOUT).unwrap().is_sealed());
        assert_eq!(names(&path), [FORMAT, "half"]);
    }

    #[test]
    fn a_claimed_directory_is_locked_until_dropped() {
        let root = tempfile::tempdir().unwrap();
        let first = Directory::claim(root.path(), LAYOUT).unwrap();
        assert!(matches!(Directory::claim(root.path(), LAYOUT), Err(StorageError::Locked { .. })));
        // As a process has that is being spawned.
        let _copy = first.held.0.try_clone().unwrap();
        drop(first);
        Directory::claim(root.path(), LAYOUT).unwrap();
    }

    #[test]
    fn a_foreign_directory_is_refused_and_left_alone() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("thesis.tex"), "years of work").unwrap();
        let refused = Directory::claim(root.path(), LAYOUT).unwrap_err();
        assert!(
            matches!(&refused, StorageError::Foreign { message, .. } if message.contains("thesis.tex")),
            "{refused}"
        );
        assert_eq!(names(root.path()), ["thesis.tex"]);

        let file = root.path().join("thesis.tex");
        assert!(matches!(Directory::claim(&file, LAYOUT), Err(StorageError::Foreign { .. })));
        assert!(matches!(
            Directory::claim(&file.join("below"), LAYOUT),
            Err(StorageError::Io { action: "create directory", .. })
        ));
    }

    #[test]
    fn a_marker_that_was_cut_off_while_being_written_is_written_again() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join(FORMAT_NEW), "d-eng").unwrap();
        fs::create_dir(root.path().join("lost+found")).unwrap();
        Directory::claim(root.path(), LAYOUT).unwrap().seal().unwrap();
        assert!(Directory::claim(root.path(), LAYOUT).unwrap().is_sealed());
    }

    #[test]
    fn other_formats_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let claim = |content: &str| {
            write_marker(root.path(), content);
            Directory::claim(root.path(), LAYOUT).map(|_| ())
        };
        assert!(claim("d-engine raft-log 1").is_ok());
        assert!(claim("d-engine raft-log 2").is_ok());
        assert!(matches!(claim("d-engine raft-log 3"), Err(StorageError::NewerFormat { found: 3, supported: 2, .. })));
        assert!(matches!(claim("d-engine raft-log 0"), Err(StorageError::OlderFormat { found: 0, supported: 1, .. })));
        assert!(matches!(claim("d-engine versions 1"), Err(StorageError::Foreign { .. })));
        let other = claim("d-engine raft-log-segments 1").unwrap_err();
        assert!(matches!(other, StorageError::OtherEngine { found: "Segments", expected: "RocksDB", .. }), "{other}");
        assert!(matches!(claim("d-engine raft-log many"), Err(StorageError::Corrupt { .. })));
        assert!(matches!(claim("another-engine raft-log 1"), Err(StorageError::Foreign { .. })));
    }

    #[test]
    fn no_flipped_byte_of_the_marker_goes_unnoticed() {
        let root = tempfile::tempdir().unwrap();
        let good = marker(LAYOUT);
        for position in 0..good.trim_end().len() {
            let mut bytes = good.clone().into_bytes();
            bytes[position] ^= 1;
            fs::write(root.path().join(FORMAT), bytes).unwrap();
            assert!(Directory::claim(root.path(), LAYOUT).is_err(), "flip at {position} of {good:?}");
        }
    }

    #[test]
    fn disk_bytes_counts_all_below() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(disk_bytes(&root.path().join("absent")), 0);
        fs::create_dir(root.path().join("a")).unwrap();
        fs::write(root.path().join("a/one"), [0; 700]).unwrap();
        fs::write(root.path().join("two"), [0; 300]).unwrap();
        let directory = fs::metadata(root.path().join("a")).unwrap().len();
        assert!((1000..=1000 + directory).contains(&disk_bytes(root.path())));
    }
}
