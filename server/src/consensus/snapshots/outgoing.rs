//! Reads a snapshot piece by piece, from wherever its receiver wants to go on.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use d_engine_proto::v1;

use super::Snapshot;
use super::manifest::{corrupt, io_error};
use crate::clock::Moment;
use crate::limits::SNAPSHOT_CHUNK_BYTES;
use crate::storage::StorageError;

/// A snapshot that is being sent. Its files stay until this is dropped.
pub(in crate::consensus) struct Outgoing {
    snapshot: Arc<Snapshot>,
    file: usize,
    open: Option<File>,
    offset: u64,
    /// Of the file up to `offset`; `None` if it was not read from its beginning, and only its receiver can tell.
    crc32c: Option<u32>,
}

impl Outgoing {
    pub(in crate::consensus) fn new(snapshot: Arc<Snapshot>, resume: v1::snapshot_response::Resume) -> Self {
        let crc32c = (resume.offset == 0).then_some(0);
        Self { snapshot, file: resume.file as usize, open: None, offset: resume.offset, crc32c }
    }

    /// The next piece; `None` at the end. Blocks.
    ///
    /// # Errors
    /// [`StorageError::Io`], or [`StorageError::Corrupt`] when a file is not what it was: then the snapshot counts as
    /// damaged.
    pub(in crate::consensus) fn next(&mut self) -> Result<Option<v1::SnapshotChunk>, StorageError> {
        let piece = self.read();
        match &piece {
            Ok(_) => *self.snapshot.last_sent.lock() = Some(Moment::now()),
            Err(_) => self.snapshot.is_damaged.store(true, Ordering::Relaxed),
        }
        piece
    }

    fn read(&mut self) -> Result<Option<v1::SnapshotChunk>, StorageError> {
        let (file, path) = loop {
            let Some(file) = self.snapshot.manifest.files().get(self.file) else { return Ok(None) };
            let path = self.snapshot.directory.join(&file.path);
            if self.offset < file.bytes {
                break (file, path);
            }
            if self.crc32c.is_some_and(|crc32c| crc32c != file.crc32c) {
                return Err(corrupt(&path, "checksum mismatch".into()));
            }
            (self.file, self.open, self.offset, self.crc32c) = (self.file + 1, None, 0, Some(0));
        };
        let failed = |error| io_error("read", &path, &error);
        let open = match &mut self.open {
            Some(open) => open,
            closed => {
                let mut open = File::open(&path).map_err(failed)?;
                open.seek(SeekFrom::Start(self.offset)).map_err(failed)?;
                closed.insert(open)
            }
        };
        let left = usize::try_from(file.bytes - self.offset).unwrap_or(usize::MAX);
        let mut data = vec![0; left.min(SNAPSHOT_CHUNK_BYTES)];
        open.read_exact(&mut data).map_err(|error| corrupt(&path, error.to_string()))?;
        let number = u32::try_from(self.file).unwrap_or(u32::MAX);
        let chunk = v1::SnapshotChunk {
            file: number,
            offset: self.offset,
            crc32c: crc32c::crc32c(&data),
            data: Bytes::from(data),
        };
        self.offset += chunk.data.len() as u64;
        self.crc32c = self.crc32c.map(|crc32c| crc32c::crc32c_append(crc32c, &chunk.data));
        Ok(Some(chunk))
    }
}
