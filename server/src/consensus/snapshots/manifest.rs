//! What a snapshot says of itself, and whether its files are what it says.
//!
//! ```text
//! MANIFEST     "d-engine snapshot 1\n" · crc32c of the rest: u32 little-endian · SnapshotManifest (protobuf)
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use bytes::Buf;
use d_engine_proto::{LogIndex, Term, v1};
use prost::Message;

use crate::storage::{LogPosition, StorageError};

/// Name of the file.
pub(super) const FILE: &str = "MANIFEST";
const MAGIC: &[u8] = b"d-engine snapshot 1\n";
/// Bytes of a piece of a file that is read at once.
const PIECE_BYTES: usize = 1 << 20;
/// Files of a snapshot.
const FILES_MAX: usize = 65_536;

/// What a snapshot holds.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::consensus) struct Manifest {
    wire: v1::SnapshotManifest,
}

impl Manifest {
    pub(super) fn new(wire: v1::SnapshotManifest) -> Result<Self, String> {
        if wire.index == 0 && wire.term == 0 {
            return Err("it stands for no entry".into());
        }
        if wire.files.len() > FILES_MAX {
            return Err(format!("it has {} files, more than {FILES_MAX}", wire.files.len()));
        }
        for file in &wire.files {
            let path = Path::new(&file.path);
            let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
            if !inside || file.path.is_empty() || path == Path::new(FILE) {
                return Err(format!("no file of a snapshot: {:?}", file.path));
            }
        }
        Ok(Self { wire })
    }

    /// Describes the files below `directory`, and makes them durable. What it shares with an earlier snapshot, as links
    /// to the same files, is not read again.
    pub(super) fn of(
        directory: &Path,
        earlier: Option<(&Path, &Self)>,
        position: LogPosition,
        membership: Option<&(LogPosition, bytes::Bytes)>,
    ) -> Result<Self, StorageError> {
        let mut files = Vec::new();
        collect(directory, Path::new(""), earlier, &mut files).map_err(|error| io_error("read", directory, &error))?;
        files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let wire = v1::SnapshotManifest {
            id: fastrand::u64(1..),
            term: position.term.get(),
            index: position.index.get(),
            membership_term: membership.map_or(0, |(position, _)| position.term.get()),
            membership_index: membership.map_or(0, |(position, _)| position.index.get()),
            membership: membership.map(|(_, bytes)| bytes.clone()).unwrap_or_default(),
            files,
        };
        Self::new(wire).map_err(|message| corrupt(directory, message))
    }

    pub(in crate::consensus) fn decode(bytes: &[u8]) -> Result<Self, String> {
        Self::new(v1::SnapshotManifest::decode(bytes).map_err(|error| error.to_string())?)
    }

    pub(in crate::consensus) fn encode(&self) -> Vec<u8> {
        self.wire.encode_to_vec()
    }

    /// Reads the manifest of the snapshot in `directory`.
    pub(super) fn read(directory: &Path) -> Result<Self, StorageError> {
        let path = directory.join(FILE);
        let bytes = fs::read(&path).map_err(|error| io_error("read", &path, &error))?;
        let cut_off = || corrupt(&path, "cut off".into());
        let mut rest = bytes.strip_prefix(MAGIC).ok_or_else(|| corrupt(&path, "not a snapshot's".into()))?;
        let checksum = rest.try_get_u32_le().map_err(|_| cut_off())?;
        if checksum != crc32c::crc32c(rest) {
            return Err(corrupt(&path, "checksum mismatch".into()));
        }
        Self::decode(rest).map_err(|message| corrupt(&path, message))
    }

    /// Writes it into `directory`; durable on return, with everything else in the directory.
    pub(super) fn write(&self, directory: &Path) -> Result<(), StorageError> {
        let path = directory.join(FILE);
        let body = self.encode();
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(MAGIC)?;
            file.write_all(&crc32c::crc32c(&body).to_le_bytes())?;
            file.write_all(&body)?;
            file.sync_all()?;
            sync_directories(directory)
        };
        write().map_err(|error| io_error("write", &path, &error))
    }

    /// Reads every file and compares it.
    pub(super) fn verify(&self, directory: &Path) -> Result<(), StorageError> {
        for file in self.files() {
            let path = directory.join(&file.path);
            let found = checksum(&path, u64::MAX).map_err(|error| io_error("read", &path, &error))?;
            if found != (file.bytes, file.crc32c) {
                return Err(corrupt(&path, format!("{} bytes of {} are there, or they changed", found.0, file.bytes)));
            }
        }
        Ok(())
    }

    pub(super) fn id(&self) -> u64 {
        self.wire.id
    }

    pub(in crate::consensus) fn position(&self) -> LogPosition {
        LogPosition { term: Term(self.wire.term), index: LogIndex(self.wire.index) }
    }

    /// The last membership, encoded, with its position.
    pub(in crate::consensus) fn membership(&self) -> Option<(LogPosition, &[u8])> {
        let (term, index) = (Term(self.wire.membership_term), LogIndex(self.wire.membership_index));
        (!self.wire.membership.is_empty()).then_some((LogPosition { term, index }, &self.wire.membership))
    }

    pub(super) fn files(&self) -> &[v1::SnapshotFile] {
        &self.wire.files
    }

    /// Bytes of all files.
    pub(in crate::consensus) fn bytes(&self) -> u64 {
        self.files().iter().map(|file| file.bytes).fold(0, u64::saturating_add)
    }
}

/// Length and checksum of a file, of its first `bytes_max` bytes at most.
pub(super) fn checksum(path: &Path, bytes_max: u64) -> io::Result<(u64, u32)> {
    let mut file = File::open(path)?.take(bytes_max);
    let mut piece = vec![0; PIECE_BYTES];
    let (mut length, mut crc) = (0, 0);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok((length, crc)),
            read => {
                crc = crc32c::crc32c_append(crc, &piece[..read]);
                length += read as u64;
            }
        }
    }
}

fn collect(
    root: &Path,
    below: &Path,
    earlier: Option<(&Path, &Manifest)>,
    files: &mut Vec<v1::SnapshotFile>,
) -> io::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let name = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            collect(root, &name, earlier, files)?;
            continue;
        }
        let path = entry.path();
        File::open(&path)?.sync_all()?;
        let shared = earlier.and_then(|(directory, manifest)| {
            let file = manifest.files().iter().find(|file| Path::new(&file.path) == name)?;
            let (ours, theirs) = (fs::metadata(&path).ok()?, fs::metadata(directory.join(&name)).ok()?);
            let place = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino(), metadata.len());
            (place(&ours) == place(&theirs) && ours.len() == file.bytes).then_some((file.bytes, file.crc32c))
        });
        let (bytes, crc32c) = shared.map_or_else(|| checksum(&path, u64::MAX), Ok)?;
        let name = name.to_str().ok_or_else(|| io::Error::other("a file name that is not UTF-8"))?;
        files.push(v1::SnapshotFile { path: name.to_owned(), bytes, crc32c });
    }
    Ok(())
}

/// Makes the names in a directory, and in all below it, durable.
pub(super) fn sync_directories(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_directories(&entry.path())?;
        }
    }
    File::open(directory)?.sync_all()
}

pub(super) fn io_error(action: &'static str, path: &Path, error: &io::Error) -> StorageError {
    StorageError::Io { action, path: path.into(), message: error.to_string() }
}

pub(super) fn corrupt(path: &Path, message: String) -> StorageError {
    StorageError::Corrupt { what: "snapshot".into(), path: PathBuf::from(path), message }
}
