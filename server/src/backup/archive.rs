//! The file of a backup. Numbers are big-endian; a change takes a new version.
//!
//! ```text
//! archive   = magic version:u32 frame*
//! frame     = kind:u8 length:u32 crc32c:u32 payload           the checksum covers kind, length and payload
//! kind 1    manifest    an ArchiveManifest: first, once
//! kind 2    chunk       bytes of the manifest's files, in their order, one behind the other
//! kind 3    end         bytes:u64 crc32c:u32 of everything before the frame: last, once
//! ```
//! The lengths of the files are the manifest's. An archive without its end is no archive.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use d_engine_proto::v1;
use prost::Message;

use super::{BackupError, io_error};

const MAGIC: &[u8; 16] = b"d-engine archive";
/// The newest format known, and the one written.
pub const FORMAT_VERSION: u32 = 1;

const HEAD_BYTES: usize = MAGIC.len() + 4;
const FRAME_HEAD_BYTES: usize = 9;
const KIND_MANIFEST: u8 = 1;
const KIND_CHUNK: u8 = 2;
const KIND_END: u8 = 3;
const END_BYTES: usize = 12;

/// Payload of a chunk.
const CHUNK_BYTES: usize = 256 << 10;
/// Longest payload that is believed: a manifest lists files, of which there are hundreds at most.
const PAYLOAD_BYTES_MAX: usize = 4 << 20;

/// Writes the archive of the manifest's files, which lie in `directory`.
pub(super) fn write(
    manifest: &v1::ArchiveManifest,
    directory: &Path,
    out: &mut impl Write,
) -> Result<(), (PathBuf, io::Error)> {
    let told = |error| (PathBuf::from("the archive"), error);
    let mut writer = Frames { out, bytes: 0, checksum: 0 };
    writer.plain(MAGIC).and_then(|()| writer.plain(&FORMAT_VERSION.to_be_bytes())).map_err(told)?;
    writer.frame(KIND_MANIFEST, &manifest.encode_to_vec()).map_err(told)?;
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    for v1::ArchiveFile { name, bytes } in &manifest.files {
        let path = directory.join(name);
        let mut file = File::open(&path).map_err(|error| (path.clone(), error))?.take(*bytes);
        loop {
            let room = CHUNK_BYTES - chunk.len();
            let read =
                file.by_ref().take(room as u64).read_to_end(&mut chunk).map_err(|error| (path.clone(), error))?;
            if chunk.len() == CHUNK_BYTES {
                writer.frame(KIND_CHUNK, &chunk).map_err(told)?;
                chunk.clear();
            }
            if read < room {
                break;
            }
        }
        if file.limit() != 0 {
            return Err((path, io::Error::new(ErrorKind::UnexpectedEof, "the file became shorter")));
        }
    }
    if !chunk.is_empty() {
        writer.frame(KIND_CHUNK, &chunk).map_err(told)?;
    }
    let mut end = [0; END_BYTES];
    end[..8].copy_from_slice(&writer.bytes.to_be_bytes());
    end[8..].copy_from_slice(&writer.checksum.to_be_bytes());
    writer.frame(KIND_END, &end).and_then(|()| writer.out.flush()).map_err(told)
}

/// How long the archive will be.
pub(super) fn length(manifest: &v1::ArchiveManifest) -> u64 {
    let content: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    let frames = 2 + content.div_ceil(CHUNK_BYTES as u64);
    HEAD_BYTES as u64 + frames * FRAME_HEAD_BYTES as u64 + manifest.encoded_len() as u64 + content + END_BYTES as u64
}

struct Frames<'a, W: Write> {
    out: &'a mut W,
    bytes: u64,
    checksum: u32,
}

impl<W: Write> Frames<'_, W> {
    fn frame(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let head = frame_head(kind, payload);
        self.plain(&head)?;
        self.plain(payload)
    }

    fn plain(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes += bytes.len() as u64;
        self.checksum = crc32c::crc32c_append(self.checksum, bytes);
        self.out.write_all(bytes)
    }
}

fn frame_head(kind: u8, payload: &[u8]) -> [u8; FRAME_HEAD_BYTES] {
    let mut head = [0; FRAME_HEAD_BYTES];
    head[0] = kind;
    // Payloads are far below 4 GiB.
    head[1..5].copy_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&head[..5]), payload);
    head[5..].copy_from_slice(&checksum.to_be_bytes());
    head
}

/// An archive of which the manifest was read.
pub struct Archive {
    path: PathBuf,
    input: BufReader<File>,
    bytes: u64,
    checksum: u32,
    manifest: v1::ArchiveManifest,
}

impl Archive {
    /// Opens the file and reads its manifest.
    ///
    /// # Errors
    /// [`BackupError`], by name for what is no archive, newer, cut short or damaged.
    pub fn open(path: &Path) -> Result<Self, BackupError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        let (input, manifest) = (BufReader::with_capacity(CHUNK_BYTES, file), v1::ArchiveManifest::default());
        let mut archive = Self { path: path.to_owned(), input, bytes: 0, checksum: 0, manifest };
        let begins_as_one = archive.input.fill_buf().map(|start| {
            let length = start.len().min(MAGIC.len());
            start[..length] == MAGIC[..length]
        });
        if !begins_as_one.map_err(io_error("read", path))? {
            return Err(archive.foreign());
        }
        let mut head = [0; HEAD_BYTES];
        archive.fill(&mut head)?;
        let version = head[MAGIC.len()..].iter().fold(0, |version, byte| (version << 8) | u32::from(*byte));
        if version > FORMAT_VERSION {
            return Err(BackupError::Newer { path: archive.path, found: version });
        }
        let (kind, payload) = archive.frame()?;
        let manifest = v1::ArchiveManifest::decode(&payload[..]).ok().filter(|_| kind == KIND_MANIFEST);
        archive.manifest = manifest.ok_or_else(|| archive.damaged("its manifest is none"))?;
        let is_plain = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0']);
        if !archive.manifest.files.iter().all(|file| is_plain(&file.name)) {
            return Err(archive.damaged("it names files outside of itself"));
        }
        Ok(archive)
    }

    /// What it says of itself.
    #[must_use]
    pub fn manifest(&self) -> &v1::ArchiveManifest {
        &self.manifest
    }

    /// Reads it to its end and checks every byte.
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn verify(self) -> Result<(), BackupError> {
        self.read(|_| Ok(Box::new(io::sink())))
    }

    /// Writes its files into `directory`, which exists; on return they are durable. What is there after an error is
    /// good for nothing.
    ///
    /// # Errors
    /// [`BackupError`].
    pub(super) fn unpack(self, directory: &Path) -> Result<(), BackupError> {
        let names: Vec<_> = self.manifest.files.iter().map(|file| directory.join(&file.name)).collect();
        self.read(|name| Ok(Box::new(BufWriter::new(File::create_new(directory.join(name))?))))?;
        for path in &names {
            File::open(path).and_then(|file| file.sync_all()).map_err(io_error("make durable", path))?;
        }
        File::open(directory).and_then(|file| file.sync_all()).map_err(io_error("make durable", directory))
    }

    fn read(mut self, open: impl Fn(&str) -> io::Result<Box<dyn Write>>) -> Result<(), BackupError> {
        let files = std::mem::take(&mut self.manifest.files);
        let mut chunk: Vec<u8> = Vec::new();
        let mut used = 0;
        for v1::ArchiveFile { name, bytes } in files {
            let failed = |source| BackupError::Io { action: "write", path: PathBuf::from(&name), source };
            let mut out = open(&name).map_err(failed)?;
            let mut missing = bytes;
            while missing > 0 {
                if used == chunk.len() {
                    chunk = match self.frame()? {
                        (KIND_CHUNK, chunk) if !chunk.is_empty() => chunk,
                        _ => return Err(self.damaged("files are missing from it")),
                    };
                    used = 0;
                }
                let part = usize::try_from(missing).unwrap_or(usize::MAX).min(chunk.len() - used);
                out.write_all(&chunk[used..used + part]).map_err(failed)?;
                used += part;
                missing -= part as u64;
            }
            out.flush().map_err(failed)?;
        }
        let (bytes, checksum) = (self.bytes, self.checksum);
        let (kind, end) = self.frame()?;
        let mut expected = bytes.to_be_bytes().to_vec();
        expected.extend_from_slice(&checksum.to_be_bytes());
        if used != chunk.len() || kind != KIND_END || end != expected {
            return Err(self.damaged("its end does not fit"));
        }
        match self.input.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(self.damaged("it goes on behind its end")),
            Err(source) => Err(BackupError::Io { action: "read", path: self.path, source }),
        }
    }

    fn frame(&mut self) -> Result<(u8, Vec<u8>), BackupError> {
        let at = self.bytes;
        let mut head = [0; FRAME_HEAD_BYTES];
        self.fill(&mut head)?;
        let length = head[1..5].iter().fold(0, |length, byte| (length << 8) | usize::from(*byte));
        if length > PAYLOAD_BYTES_MAX {
            return Err(self.damaged(&format!("the length at byte {at} makes no sense")));
        }
        let mut payload = vec![0; length];
        self.fill(&mut payload)?;
        if frame_head(head[0], &payload) != head {
            return Err(self.damaged(&format!("the checksum at byte {at} does not match")));
        }
        Ok((head[0], payload))
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), BackupError> {
        match self.input.read_exact(buffer) {
            Ok(()) => {
                self.bytes += buffer.len() as u64;
                self.checksum = crc32c::crc32c_append(self.checksum, buffer);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                let bytes = fs::metadata(&self.path).map_or(self.bytes, |file| file.len());
                Err(BackupError::Truncated { path: self.path.clone(), bytes })
            }
            Err(source) => Err(BackupError::Io { action: "read", path: self.path.clone(), source }),
        }
    }

    fn foreign(&self) -> BackupError {
        BackupError::Foreign { path: self.path.clone() }
    }

    fn damaged(&self, what: &str) -> BackupError {
        BackupError::Damaged { path: self.path.clone(), what: what.to_owned() }
    }
}
