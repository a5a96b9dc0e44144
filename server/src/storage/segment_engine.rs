//! The [`StorageEngine`] on files of its own: a journal of operations, cut into segments.
//!
//! ```text
//! 0000000000000007.segment   header with the state so far · frame · frame · … · declared end · whatever a crash left
//! 0000000000000008.segment   header with the state so far · frame · frame · end · zeros up to the file's end
//! ```
//!
//! A write is a run of frames, the last one marked, appended with one call and, if asked, one fsync. Nothing in a segment
//! is ever written over but zeros, and they were written before, a few megabytes ahead: an fsync then has no metadata to
//! bring to the disk. A truncation or a purge is a frame like any other, so it happens as a whole or not at all. A segment
//! whose entries are all purged is deleted, once the purge is on the disk; the state it leaves stands in the header of the
//! next.
//!
//! In memory is the [state](super::log_state) and a sparse index of entries ([`runs`]); entries are read from the files.
//!
//! # What a crash can leave, and how it is told from damage
//!
//! | at the end of the newest segment | means | on opening |
//! | --- | --- | --- |
//! | zeros | nothing | the segment goes on there |
//! | frames whose last is not there, a frame that is cut off or lacks a whole sector | a write that was not on the disk as a whole | it is dropped with all that follows; a new segment begins |
//! | the same, but a later frame tells that it was on the disk | damage | `Corrupt`, naming file and offset |
//! | a frame that is wrong in any other way | damage | `Corrupt` |
//! | anything wrong before the end that the next segment's header declares | damage | `Corrupt` |
//!
//! So what was fsynced is never dropped, but for two cases that no reader can decide: damage to the very last write that
//! leaves nothing but zeros of a sector, and a newest segment that is gone as a whole.

mod disk;
mod frame;
mod recovery;
mod runs;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use d_engine_proto::LogIndex;
use parking_lot::{Mutex, RwLock};

use super::directory::{Directory, Layout, io_error};
use super::log_state::LogState;
use super::{Durability, LogPosition, LogRecord, StorageEngine, StorageError, StorageOperation, StorageState};
use disk::SegmentFile;
use frame::{FIRST_FRAME, Found, SegmentHeader};
use recovery::Recovered;
use runs::{Piece, Point, Runs};

const LAYOUT: Layout = Layout { kind: "raft-log-segments", version: 1, oldest: 1 };
/// Read at once, unless a frame is longer.
const READ_BYTES: usize = 256 << 10;

/// Tests choose smaller ones, to see segments come and go.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// From which on a segment is not written to; a single larger write gets a segment of its own. Opening reads one
    /// into memory at a time.
    segment_bytes: u64,
    /// Zeros are written ahead in steps of so many bytes: little enough that whoever waits meanwhile hardly notices.
    step_bytes: u64,
}

const SIZES: Sizes = Sizes { segment_bytes: 32 << 20, step_bytes: 4 << 20 };

/// Raft log, vote and identity in a directory of segment files.
#[derive(Debug)]
pub struct SegmentStorageEngine {
    writer: Mutex<Writer>,
    /// Locked after `writer`, if both are.
    held: RwLock<Held>,
    sizes: Sizes,
    /// Dropped last: it keeps other processes out.
    directory: Directory,
}

/// What readers look at. It changes only after the write that changes it.
#[derive(Debug, Default)]
struct Held {
    log: LogState,
    runs: Runs,
    /// By number, the last being written to.
    segments: BTreeMap<u64, Segment>,
}

#[derive(Clone, Debug)]
struct Segment {
    file: Arc<SegmentFile>,
    salt: u64,
}

/// What only the writing thread needs.
#[derive(Debug)]
struct Writer {
    number: u64,
    segment: Segment,
    /// Where the next frame goes.
    end: u64,
    /// Up to where the file is filled.
    filled: u64,
    next_sequence: u64,
    /// Every frame with a smaller sequence is on the disk.
    synced: u64,
    /// What the first failed write said. From then on the disk may hold more than is known here.
    poison: Option<String>,
    /// Reused for encoding.
    buffer: Vec<u8>,
}

/// What an operation does to the index.
enum Change {
    Append(Point),
    Drop(RangeInclusive<u64>),
}

impl SegmentStorageEngine {
    /// Opens the log in the directory at `path`, or makes an empty one in an empty or absent directory. Reads all of it
    /// once, a segment at a time.
    ///
    /// # Errors
    /// Any [`StorageError`]. What was in the directory is still there then, so it can be examined or copied.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StorageError> {
        Self::open_sized(path.as_ref(), SIZES)
    }

    fn open_sized(path: &Path, sizes: Sizes) -> Result<Self, StorageError> {
        let mut directory = Directory::claim(path, LAYOUT)?;
        recovery::clear_unfinished(directory.path(), !directory.is_sealed())?;
        let mut recovered =
            if directory.is_sealed() { recovery::recover(directory.path())? } else { Recovered::none() };
        // What a killed process left may be in the operating system only, and from now on it counts as written.
        if let Some(segment) = recovered.held.segments.get(&recovered.number) {
            segment.file.sync()?;
        }
        if recovered.needs_segment {
            let header = SegmentHeader {
                number: recovered.number + 1,
                salt: fastrand::u64(..),
                previous_end: recovered.end,
                first_sequence: recovered.next_sequence,
                log: recovered.held.log.clone(),
            };
            let segment = create_segment(&directory, &header)?;
            recovered.held.segments.insert(header.number, segment);
            recovered.number = header.number;
            recovered.end = FIRST_FRAME;
        }
        if !directory.is_sealed() {
            directory.seal()?;
        }
        let Recovered { held, number, end, next_sequence, .. } = recovered;
        let segment = held.segments.get(&number).cloned().ok_or_else(|| recovery::no_segments(directory.path()))?;
        let filled = segment.file.length()?;
        let synced = next_sequence;
        let (poison, buffer) = (None, Vec::new());
        let writer = Writer { number, segment, end, filled, next_sequence, synced, poison, buffer };
        Ok(Self { writer: Mutex::new(writer), held: RwLock::new(held), sizes, directory })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn append(
        &self,
        writer: &mut Writer,
        operations: &[StorageOperation],
        durability: Durability,
    ) -> Result<(), StorageError> {
        let bytes_max: u64 = operations.iter().map(frame::bytes_max).sum();
        if writer.end + bytes_max > self.sizes.segment_bytes && writer.end > FIRST_FRAME {
            self.begin_segment(writer)?;
        }
        let mut log = self.held.read().log.clone();
        let mut changes = Vec::with_capacity(operations.len());
        let mut sequence = writer.next_sequence;
        writer.buffer.clear();
        for (step, operation) in operations.iter().enumerate() {
            let dropped = log.apply(operation, self.path(), |index| self.position_of(index, &operations[..step]))?;
            changes.extend(dropped.map(Change::Drop));
            if let StorageOperation::Append(record) = operation {
                let offset = writer.end + writer.buffer.len() as u64;
                changes.push(Change::Append(Point { index: record.position.index.get(), offset }));
            }
            let is_last = step + 1 == operations.len();
            let (salt, synced) = (writer.segment.salt, writer.synced);
            frame::encode(operation, log.state.last, salt, sequence, synced, is_last, &mut writer.buffer);
            sequence += 1;
        }
        writer.write_buffer(self.sizes.step_bytes)?;
        writer.next_sequence = sequence;
        {
            let mut held = self.held.write();
            held.log = log;
            for change in changes {
                match change {
                    Change::Append(point) => held.runs.append(writer.number, point),
                    Change::Drop(dropped) => held.runs.drop_entries(&dropped),
                }
            }
        }
        if durability == Durability::Fsync {
            writer.segment.file.sync()?;
            writer.synced = writer.next_sequence;
            self.remove_unneeded(writer);
        }
        Ok(())
    }

    /// Ends the segment being written and begins another.
    fn begin_segment(&self, writer: &mut Writer) -> Result<(), StorageError> {
        // The next segment's header declares that it was whole.
        writer.segment.file.sync()?;
        writer.synced = writer.next_sequence;
        let header = SegmentHeader {
            number: writer.number + 1,
            salt: fastrand::u64(..),
            previous_end: writer.end,
            first_sequence: writer.next_sequence,
            log: self.held.read().log.clone(),
        };
        let segment = create_segment(&self.directory, &header)?;
        self.held.write().segments.insert(header.number, segment.clone());
        writer.number = header.number;
        writer.segment = segment;
        writer.end = FIRST_FRAME;
        writer.filled = FIRST_FRAME;
        Ok(())
    }

    /// Deletes the oldest segments, as far as they hold no entry. Called when everything written is on the disk, the purge
    /// included. One that cannot be deleted waits for the next time.
    fn remove_unneeded(&self, writer: &Writer) {
        let mut held = self.held.write();
        let needed = held.runs.first_segment().unwrap_or(writer.number).min(writer.number);
        while let Some(oldest) = held.segments.first_entry().filter(|oldest| *oldest.key() < needed) {
            if let Err(error) = disk::remove(oldest.get().file.path()) {
                tracing::warn!(%error, "a purged part of the log stays");
                return;
            }
            oldest.remove();
        }
    }

    /// Position of an entry that is held: appended by an earlier step of the same write, or stored.
    fn position_of(&self, index: LogIndex, earlier: &[StorageOperation]) -> Result<LogPosition, StorageError> {
        let appended = earlier.iter().rev().find_map(|operation| match operation {
            StorageOperation::Append(record) if record.position.index == index => Some(record.position),
            _ => None,
        });
        if let Some(position) = appended {
            return Ok(position);
        }
        let after = LogIndex(index.get().saturating_add(1));
        let stored = self.read(index, after, 0)?.pop();
        stored.map(|record| record.position).ok_or_else(|| damaged(index.get(), self.path(), "it is missing".into()))
    }
}

impl StorageEngine for SegmentStorageEngine {
    fn state(&self) -> Result<StorageState, StorageError> {
        Ok(self.held.read().log.state.clone())
    }

    fn read(&self, start: LogIndex, end: LogIndex, bytes_max: usize) -> Result<Vec<LogRecord>, StorageError> {
        // What the pieces name stays as it is, also when it is purged, truncated or deleted meanwhile.
        let pieces: Vec<(Piece, Segment)> = {
            let held = self.held.read();
            let located = held.runs.locate(start.get(), end.get());
            let with_segment = |piece: Piece| {
                let segment = held.segments.get(&piece.segment).cloned();
                let missing = || damaged(*piece.indices.start(), self.path(), "its segment is missing".into());
                segment.ok_or_else(missing).map(|segment| (piece, segment))
            };
            located.map(with_segment).collect::<Result<_, _>>()?
        };
        let mut records = Vec::new();
        let mut bytes = 0;
        for (piece, segment) in pieces {
            segment.read(&piece, bytes_max, &mut bytes, &mut records)?;
            if bytes >= bytes_max && !records.is_empty() {
                break;
            }
        }
        Ok(records)
    }

    fn write(&self, operations: &[StorageOperation], durability: Durability) -> Result<(), StorageError> {
        let mut writer = self.writer.lock();
        writer.check_poison(self.path())?;
        let written = self.append(&mut writer, operations, durability);
        if let Err(error) = &written {
            writer.poison = Some(error.to_string());
        }
        written
    }

    fn sync(&self) -> Result<(), StorageError> {
        let (segment, written) = {
            let writer = self.writer.lock();
            writer.check_poison(self.path())?;
            (writer.segment.clone(), writer.next_sequence)
        };
        // An earlier segment was synced when this one began.
        let synced = segment.file.sync();
        let mut writer = self.writer.lock();
        match &synced {
            Ok(()) => {
                writer.synced = writer.synced.max(written);
                if writer.synced == writer.next_sequence {
                    self.remove_unneeded(&writer);
                }
            }
            Err(error) => drop(writer.poison.get_or_insert_with(|| error.to_string())),
        }
        synced
    }
}

impl Writer {
    fn check_poison(&self, path: &Path) -> Result<(), StorageError> {
        let Some(first) = &self.poison else { return Ok(()) };
        let message = format!("an earlier write failed: {first}");
        Err(StorageError::Io { action: "write log in", path: path.into(), message })
    }

    /// Puts the buffer behind the last frame, and zeros ahead of it where the file does not reach.
    fn write_buffer(&mut self, step_bytes: u64) -> Result<(), StorageError> {
        let end = self.end + self.buffer.len() as u64;
        if end > self.filled {
            let filled = end.next_multiple_of(step_bytes);
            let zeros = vec![0; usize::try_from(filled - self.filled).unwrap_or(usize::MAX)];
            self.segment.file.write(&zeros, self.filled)?;
            self.filled = filled;
        }
        self.segment.file.write(&self.buffer, self.end)?;
        self.end = end;
        Ok(())
    }
}

impl Segment {
    /// Adds the entries of a piece to `records` and their payloads to `bytes`, until that reaches `bytes_max`.
    fn read(
        &self,
        piece: &Piece,
        bytes_max: usize,
        bytes: &mut usize,
        records: &mut Vec<LogRecord>,
    ) -> Result<(), StorageError> {
        let mut next = piece.from.index;
        let mut offset = piece.from.offset;
        let mut wanted = READ_BYTES;
        while next <= *piece.indices.end() {
            let mut chunk = vec![0; wanted];
            let length = self.file.read(&mut chunk, offset)?;
            let mut rest = &chunk[..length];
            wanted = READ_BYTES;
            loop {
                match frame::find(rest, self.salt) {
                    Found::Frame(header, body) => {
                        offset += header.frame_bytes() as u64;
                        rest = &rest[header.frame_bytes()..];
                        let Some((position, payload)) = frame::entry(&header, body) else { continue };
                        if position.index.get() != next {
                            let message = format!("entry {} stands in its place", position.index);
                            return Err(damaged(next, self.file.path(), message));
                        }
                        if piece.indices.contains(&next) {
                            *bytes = bytes.saturating_add(payload.len());
                            records.push(LogRecord { position, payload: Bytes::copy_from_slice(payload) });
                        }
                        let is_enough = *bytes >= bytes_max && !records.is_empty();
                        if is_enough || next == *piece.indices.end() {
                            return Ok(());
                        }
                        next += 1;
                    }
                    // The rest of it is in the file.
                    Found::Partial(frame_bytes) if length == chunk.len() && frame_bytes > rest.len() => {
                        wanted = wanted.max(frame_bytes);
                        break;
                    }
                    // Not even its header is here, but more of the file is.
                    Found::Unsound if length == chunk.len() && rest.len() < frame::FRAME_HEADER_BYTES => break,
                    _ => {
                        let message = format!("the frame at byte {offset} is damaged");
                        return Err(damaged(next, self.file.path(), message));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Makes a segment without frames. It is there, on the disk and whole, or not at all.
fn create_segment(directory: &Directory, header: &SegmentHeader) -> Result<Segment, StorageError> {
    let path = segment_path(directory.path(), header.number);
    let mut file = SegmentFile::create(&recovery::unfinished(&path))?;
    file.write(&header.encode(), 0)?;
    file.sync()?;
    file.rename(&path)?;
    directory.sync_names().map_err(|error| io_error("sync", directory.path(), &error))?;
    #[cfg(test)]
    disk::record::note(disk::record::Step::SyncDirectory);
    Ok(Segment { file: Arc::new(file), salt: header.salt })
}

fn segment_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:016x}.{}", recovery::EXTENSION))
}

fn damaged(index: u64, path: &Path, message: String) -> StorageError {
    StorageError::Corrupt { what: format!("log entry {index}"), path: path.into(), message }
}
