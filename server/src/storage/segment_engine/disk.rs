//! What the engine does to the disk, call by call. In tests it is recorded, so that a crash can be imagined before,
//! after and in the midst of every one of them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::storage::StorageError;
use crate::storage::directory::io_error;

/// A file of the engine's, open for reading and writing.
#[derive(Debug)]
pub(super) struct SegmentFile {
    file: File,
    path: PathBuf,
}

impl SegmentFile {
    /// Makes an empty file, or empties one that a crash has left.
    pub(super) fn create(path: &Path) -> Result<Self, StorageError> {
        let created = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        #[cfg(test)]
        record::note(record::Step::Create(path.into()));
        created.map(|file| Self { file, path: path.into() }).map_err(|error| io_error("create", path, &error))
    }

    pub(super) fn open(path: &Path) -> Result<Self, StorageError> {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        opened.map(|file| Self { file, path: path.into() }).map_err(|error| io_error("open", path, &error))
    }

    /// Where it was when opened, or renamed to.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in it.
    pub(super) fn length(&self) -> Result<u64, StorageError> {
        self.file.metadata().map(|metadata| metadata.len()).map_err(|error| io_error("read", &self.path, &error))
    }

    /// Reads as much as there is, at most `buffer.len()` bytes.
    pub(super) fn read(&self, mut buffer: &mut [u8], mut offset: u64) -> Result<usize, StorageError> {
        let wanted = buffer.len();
        while !buffer.is_empty() {
            match self.file.read_at(buffer, offset) {
                Ok(0) => break,
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_error("read", &self.path, &error)),
            }
        }
        Ok(wanted - buffer.len())
    }

    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        #[cfg(test)]
        record::note(record::Step::Write(
            self.path.clone(),
            usize::try_from(offset).unwrap_or(usize::MAX),
            bytes.to_vec(),
        ));
        self.file.write_all_at(bytes, offset).map_err(|error| io_error("write log to", &self.path, &error))
    }

    /// Brings the content to the disk, and the length if it grew.
    pub(super) fn sync(&self) -> Result<(), StorageError> {
        let synced = self.file.sync_data().map_err(|error| io_error("sync", &self.path, &error));
        #[cfg(test)]
        record::note(record::Step::Sync(self.path.clone()));
        synced
    }

    /// Gives it another name, in place of whatever has it. Not durable before the directory is.
    pub(super) fn rename(&mut self, path: &Path) -> Result<(), StorageError> {
        fs::rename(&self.path, path).map_err(|error| io_error("rename", &self.path, &error))?;
        #[cfg(test)]
        record::note(record::Step::Rename(self.path.clone(), path.into()));
        self.path = path.into();
        Ok(())
    }
}

/// Removes a file by name; who has it open may read on.
pub(super) fn remove(path: &Path) -> Result<(), StorageError> {
    #[cfg(test)]
    record::note(record::Step::Remove(path.into()));
    fs::remove_file(path).map_err(|error| io_error("remove", path, &error))
}

#[cfg(test)]
pub(super) mod record {
    use std::cell::RefCell;
    use std::path::PathBuf;

    /// One call, or what the test says in between.
    #[derive(Clone, Debug)]
    pub(in super::super) enum Step {
        Create(PathBuf),
        Write(PathBuf, usize, Vec<u8>),
        Sync(PathBuf),
        Rename(PathBuf, PathBuf),
        Remove(PathBuf),
        SyncDirectory,
        /// So many writes were acknowledged, the last of them as being on the disk or not.
        Acknowledged {
            writes: usize,
            on_disk: bool,
        },
    }

    thread_local! {
        static STEPS: RefCell<Option<Vec<Step>>> = const { RefCell::new(None) };
    }

    pub(in super::super) fn note(step: Step) {
        STEPS.with_borrow_mut(|steps| steps.as_mut().map(|steps| steps.push(step)));
    }

    /// Records what this thread does.
    pub(in super::super) fn during<T>(work: impl FnOnce() -> T) -> (T, Vec<Step>) {
        STEPS.set(Some(Vec::new()));
        let result = work();
        (result, STEPS.take().unwrap_or_default())
    }
}
