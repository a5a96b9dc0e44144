//! Receives a snapshot, piece by piece, and goes on where a transfer broke off.
//!
//! Every piece has a checksum, and so has every file; one that is not what the manifest says is fetched again. Only what
//! was received whole becomes a snapshot.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use d_engine_proto::v1;

use super::manifest::{Manifest, checksum, corrupt, io_error};
use super::{RECEIVING, Snapshot, Snapshots, remove};
use crate::limits::{SNAPSHOT_DISK_RESERVED_BYTES, SNAPSHOT_UNSYNCED_BYTES_MAX};
use crate::steps;
use crate::storage::{LogPosition, StorageError};

/// A snapshot of which some is there.
#[derive(Debug)]
pub(in crate::consensus) struct Incoming {
    directory: PathBuf,
    manifest: Manifest,
    /// The transfer that may go on with it: a newer one takes over.
    transfer: u64,
    /// The file that is being received, its open end, and what is there of it.
    file: usize,
    open: Option<File>,
    offset: u64,
    crc32c: u32,
    /// Bytes written since the disk was last waited for.
    unsynced: u64,
}

/// Why a piece is not taken.
#[derive(Debug, thiserror::Error)]
pub(in crate::consensus) enum ReceiveError {
    /// Not what was sent, or not in order.
    #[error("{0}; the transfer has to begin anew")]
    Refused(String),
    /// Another transfer has taken over.
    #[error("another transfer has taken over")]
    Superseded,
    /// The disk has no room for it.
    #[error("the snapshot needs {needed} bytes more, the disk has {free}: free some space")]
    NoSpace {
        /// Bytes missing of the snapshot.
        needed: u64,
        /// Bytes free, those kept for the log left out.
        free: u64,
    },
    /// The disk failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl Snapshots {
    /// Begins or resumes the transfer of the snapshot with this manifest. Answers the number of the transfer, and the
    /// file and the offset that it goes on with.
    pub(in crate::consensus) fn begin(
        &self,
        manifest: Manifest,
    ) -> Result<(u64, v1::snapshot_response::Resume), ReceiveError> {
        let mut slot = self.incoming.lock();
        let transfer = self.transfers.fetch_add(1, Ordering::Relaxed);
        let incoming = match slot.take() {
            Some(incoming) if incoming.manifest == manifest => incoming,
            _ => Incoming::open(self.root.join(RECEIVING), manifest)?,
        };
        let incoming = slot.insert(Incoming { transfer, ..incoming });
        let place = incoming.place();
        let needed = incoming.missing_bytes();
        let free = free_bytes(&self.root)?;
        if needed > free {
            // What is there is given back: the log needs the space more.
            let directory = incoming.directory.clone();
            *slot = None;
            remove(&directory)?;
            return Err(ReceiveError::NoSpace { needed, free });
        }
        Ok((transfer, place))
    }

    /// Takes the next piece. An error ends the transfer; a new one goes on.
    pub(in crate::consensus) fn take(&self, transfer: u64, chunk: &v1::SnapshotChunk) -> Result<(), ReceiveError> {
        let mut slot = self.incoming.lock();
        let incoming = slot.as_mut().filter(|incoming| incoming.transfer == transfer);
        let taken = incoming.ok_or(ReceiveError::Superseded)?.take(chunk);
        if let Err(ReceiveError::Storage(_)) = &taken
            && let Some(failed) = slot.take()
        {
            // A full disk, most likely, and the log needs the space more.
            drop(failed.open);
            remove(&failed.directory)?;
        }
        taken
    }

    /// Removes what was received of a snapshot that is not newer than this position.
    pub(super) fn forget_incoming(&self, position: LogPosition) -> Result<(), StorageError> {
        let mut slot = self.incoming.lock();
        let directory = self.root.join(RECEIVING);
        if Manifest::read(&directory).is_ok_and(|manifest| manifest.position() > position) {
            return Ok(());
        }
        *slot = None;
        remove(&directory)
    }

    /// Whether every file is there.
    pub(in crate::consensus) fn is_received(&self, transfer: u64) -> bool {
        let slot = self.incoming.lock();
        slot.as_ref().is_some_and(|incoming| incoming.transfer == transfer && incoming.is_whole())
    }

    /// Makes what was received a whole snapshot, which is not the current one yet. It stands after a crash, and is then
    /// [installed](super::recover) by the next start if it is newer than the state.
    pub(in crate::consensus) fn received(&self, transfer: u64) -> Result<Arc<Snapshot>, ReceiveError> {
        let mut slot = self.incoming.lock();
        let whole = |incoming: &mut Incoming| incoming.transfer == transfer && incoming.is_whole();
        let incoming = slot.take_if(whole).ok_or(ReceiveError::Superseded)?;
        incoming.manifest.write(&incoming.directory)?;
        steps::passed("receive/described")?;
        let snapshot = self.finish(&incoming.directory, incoming.manifest)?;
        steps::passed("receive/renamed")?;
        Ok(snapshot)
    }
}

impl Incoming {
    /// Goes on with what an earlier process left, if it is of this snapshot.
    fn open(directory: PathBuf, manifest: Manifest) -> Result<Self, StorageError> {
        if Manifest::read(&directory).ok().as_ref() != Some(&manifest) {
            remove(&directory)?;
            fs::create_dir_all(&directory).map_err(|error| io_error("create", &directory, &error))?;
            manifest.write(&directory)?;
        }
        steps::passed("receive/begun")?;
        let mut incoming =
            Self { directory, manifest, transfer: 0, file: 0, open: None, offset: 0, crc32c: 0, unsynced: 0 };
        incoming.look()?;
        Ok(incoming)
    }

    /// Finds the first file that is not whole, and makes it ready to be appended to.
    fn look(&mut self) -> Result<(), StorageError> {
        while let Some(file) = self.manifest.files().get(self.file) {
            let path = self.directory.join(&file.path);
            let failed = |error| io_error("open", &path, &error);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(failed)?;
            }
            let mut open = OpenOptions::new().append(true).create(true).open(&path).map_err(failed)?;
            let (mut length, mut crc32c) = checksum(&path, u64::MAX).map_err(failed)?;
            if length == file.bytes && crc32c == file.crc32c {
                open.sync_all().map_err(failed)?;
                self.file += 1;
                continue;
            }
            if length >= file.bytes {
                open.set_len(0).and_then(|()| open.flush()).map_err(failed)?;
                (length, crc32c) = (0, 0);
            }
            (self.open, self.offset, self.crc32c) = (Some(open), length, crc32c);
            return Ok(());
        }
        (self.open, self.offset) = (None, 0);
        Ok(())
    }

    fn take(&mut self, chunk: &v1::SnapshotChunk) -> Result<(), ReceiveError> {
        let refused = |message: &str| Err(ReceiveError::Refused(message.to_owned()));
        if (chunk.file as usize, chunk.offset) != (self.file, self.offset) {
            return refused("a piece out of order");
        }
        if chunk.crc32c != crc32c::crc32c(&chunk.data) {
            return refused("a piece that was damaged on its way");
        }
        let Some((file, open)) = self.manifest.files().get(self.file).zip(self.open.as_mut()) else {
            return refused("a piece too many");
        };
        let path = self.directory.join(&file.path);
        let length = self.offset + chunk.data.len() as u64;
        if chunk.data.is_empty() || length > file.bytes {
            return refused("a piece of a wrong length");
        }
        steps::passed("receive/piece")?;
        open.write_all(&chunk.data).map_err(|error| io_error("write", &path, &error))?;
        self.offset = length;
        self.crc32c = crc32c::crc32c_append(self.crc32c, &chunk.data);
        self.unsynced += chunk.data.len() as u64;
        if length < file.bytes {
            if self.unsynced >= SNAPSHOT_UNSYNCED_BYTES_MAX {
                open.sync_data().map_err(|error| io_error("write", &path, &error))?;
                self.unsynced = 0;
            }
            return Ok(());
        }
        let is_sound = self.crc32c == file.crc32c;
        open.sync_all().map_err(|error| io_error("write", &path, &error))?;
        self.unsynced = 0;
        if is_sound {
            self.file += 1;
        }
        // One that is not sound is emptied, to be fetched again.
        self.look()?;
        if is_sound {
            Ok(())
        } else {
            Err(ReceiveError::Refused(corrupt(&path, "checksum mismatch".into()).to_string()))
        }
    }

    fn is_whole(&self) -> bool {
        self.file >= self.manifest.files().len()
    }

    fn place(&self) -> v1::snapshot_response::Resume {
        v1::snapshot_response::Resume { file: u32::try_from(self.file).unwrap_or(u32::MAX), offset: self.offset }
    }

    fn missing_bytes(&self) -> u64 {
        let rest = self.manifest.files().iter().skip(self.file).map(|file| file.bytes).fold(0, u64::saturating_add);
        rest.saturating_sub(self.offset)
    }
}

/// Bytes that a snapshot may take of the disk.
fn free_bytes(path: &Path) -> Result<u64, StorageError> {
    let disk = rustix::fs::statvfs(path).map_err(|error| io_error("look at the disk of", path, &error.into()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize).saturating_sub(SNAPSHOT_DISK_RESERVED_BYTES))
}
