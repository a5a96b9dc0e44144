//! Reads the segments of a directory back and decides where the log ends. It changes nothing: what is damaged stays to be
//! examined.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::{self, SegmentFile};
use super::frame::{self, FIRST_FRAME, Found, SEGMENT_HEADER_BYTES, SegmentHeader, Stored, Tail};
use super::runs::Point;
use super::{Held, Segment, segment_path};
use crate::storage::directory::io_error;
use crate::storage::record::{self, RecordError};
use crate::storage::{StorageError, StorageOperation};

/// Ends the name of a segment.
pub(super) const EXTENSION: &str = "segment";
/// Ends the name of one that is being made.
const UNFINISHED: &str = "new";

/// A log as it was left.
pub(super) struct Recovered {
    pub(super) held: Held,
    /// Of the newest segment; 0: none.
    pub(super) number: u64,
    /// Where its last complete write ends.
    pub(super) end: u64,
    pub(super) next_sequence: u64,
    /// Whether something stands behind the end that does not count, so that no frame may be written there.
    pub(super) needs_segment: bool,
}

impl Recovered {
    /// A log before its first segment.
    pub(super) fn none() -> Self {
        Self { held: Held::default(), number: 0, end: 0, next_sequence: 1, needs_segment: true }
    }
}

/// Name of the file that becomes `path`.
pub(super) fn unfinished(path: &Path) -> PathBuf {
    path.with_extension(format!("{EXTENSION}.{UNFINISHED}"))
}

/// Removes what making a segment left when it was interrupted; with `all`, also what is complete.
pub(super) fn clear_unfinished(directory: &Path, all: bool) -> Result<(), StorageError> {
    for path in files(directory)? {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_unfinished = name.ends_with(&format!(".{EXTENSION}.{UNFINISHED}"));
        if is_unfinished || all && number_of(&path).is_some() {
            disk::remove(&path)?;
        }
    }
    Ok(())
}

/// Reads all of the log.
pub(super) fn recover(directory: &Path) -> Result<Recovered, StorageError> {
    let mut numbers: Vec<u64> = files(directory)?.iter().filter_map(|path| number_of(path)).collect();
    numbers.sort_unstable();
    for pair in numbers.windows(2) {
        if pair[1] != pair[0] + 1 {
            let missing = segment_path(directory, pair[0] + 1);
            return Err(StorageError::Corrupt { what: "log".into(), path: missing, message: "it is missing".into() });
        }
    }
    let mut headers = Vec::with_capacity(numbers.len());
    for number in numbers {
        let file = SegmentFile::open(&segment_path(directory, number))?;
        let header = read_header(&file, number)?;
        headers.push((Arc::new(file), header));
    }
    let Some((_, first)) = headers.first() else { return Err(no_segments(directory)) };

    let mut recovered = Recovered::none();
    recovered.held.log = first.log.clone();
    recovered.next_sequence = first.first_sequence;
    if let Some(held) = first.log.held() {
        // Purged since, or missed at the end.
        recovered.held.runs.append_lost(held);
    }
    for (place, (file, header)) in headers.iter().enumerate() {
        let declared_end = headers.get(place + 1).map(|(_, next)| next.previous_end);
        if header.first_sequence != recovered.next_sequence || header.log != recovered.held.log {
            return Err(corrupt(file.path(), 0, "it does not go on where the segment before it ends"));
        }
        recovered.held.segments.insert(header.number, Segment { file: Arc::clone(file), salt: header.salt });
        recovered.replay(file, header, declared_end)?;
    }
    match (recovered.held.runs.first_segment(), recovered.held.log.first) {
        (Some(0), Some(first)) => Err(super::damaged(first.get(), directory, "its segment is missing".into())),
        _ => Ok(recovered),
    }
}

/// What to report of a sealed directory without any.
pub(super) fn no_segments(directory: &Path) -> StorageError {
    StorageError::Corrupt { what: "log".into(), path: directory.into(), message: "it holds no segment".into() }
}

impl Recovered {
    /// Takes in the frames of one segment.
    fn replay(
        &mut self,
        file: &SegmentFile,
        header: &SegmentHeader,
        declared_end: Option<u64>,
    ) -> Result<(), StorageError> {
        let mut bytes = vec![0; usize::try_from(file.length()?).unwrap_or(usize::MAX)];
        let length = file.read(&mut bytes, 0)?;
        bytes.truncate(length);
        let limit = declared_end.and_then(|end| usize::try_from(end).ok()).unwrap_or(length).min(length);

        let mut offset = SEGMENT_HEADER_BYTES;
        let mut sequence = self.next_sequence;
        let mut write = Vec::new();
        self.number = header.number;
        self.end = FIRST_FRAME;
        while let Found::Frame(found, body) = frame::find(bytes.get(offset..limit).unwrap_or_default(), header.salt) {
            if found.sequence != sequence {
                break;
            }
            let stored = frame::decode(&found, body).map_err(|error| unreadable(file.path(), offset, &error))?;
            write.push((stored, offset));
            offset += found.frame_bytes();
            sequence += 1;
            if found.is_last {
                for (stored, offset) in write.drain(..) {
                    self.apply(&stored, offset, file.path())?;
                }
                self.next_sequence = sequence;
                self.end = offset as u64;
            }
        }
        if let Some(declared) = declared_end {
            self.needs_segment = false;
            return match self.end == declared {
                true => Ok(()),
                false => Err(corrupt(file.path(), offset, "the frame there is damaged")),
            };
        }
        match frame::judge(&bytes, offset, header.salt, sequence) {
            Tail::Damaged => return Err(corrupt(file.path(), offset, "the frame there is damaged")),
            Tail::Empty => self.needs_segment = !write.is_empty(),
            Tail::Torn => self.needs_segment = true,
        }
        if self.needs_segment {
            let file = file.path().display();
            tracing::warn!(%file, offset = self.end, "dropped a write that never was on the disk as a whole");
        }
        Ok(())
    }

    fn apply(&mut self, stored: &Stored, offset: usize, path: &Path) -> Result<(), StorageError> {
        let contradicts = || corrupt(path, offset, "the frame there contradicts those before it");
        let Stored { operation, left } = stored;
        let position_of = |_| left.ok_or_else(contradicts);
        let dropped = self.held.log.apply(operation, path, position_of).map_err(|_| contradicts())?;
        if let Some(dropped) = dropped {
            self.held.runs.drop_entries(&dropped);
        }
        match operation {
            StorageOperation::Append(record) => {
                self.held.runs.append(self.number, Point { index: record.position.index.get(), offset: offset as u64 });
            }
            StorageOperation::TruncateAfter(_) if self.held.log.state.last != *left => return Err(contradicts()),
            _ => {}
        }
        Ok(())
    }
}

fn read_header(file: &SegmentFile, number: u64) -> Result<SegmentHeader, StorageError> {
    let mut block = vec![0; SEGMENT_HEADER_BYTES];
    let length = file.read(&mut block, 0)?;
    let header = SegmentHeader::decode(&block[..length]).map_err(|error| unreadable(file.path(), 0, &error))?;
    if header.number != number {
        return Err(corrupt(file.path(), 0, &format!("it is segment {:x} by its header", header.number)));
    }
    Ok(header)
}

/// Everything in a directory.
pub(super) fn files(directory: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let list = fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<PathBuf>>>());
    list.map_err(|error| io_error("list", directory, &error))
}

/// The number in the name of a segment.
fn number_of(path: &Path) -> Option<u64> {
    if path.extension()? != EXTENSION {
        return None;
    }
    u64::from_str_radix(path.file_stem()?.to_str()?, 16).ok()
}

fn unreadable(path: &Path, offset: usize, error: &RecordError) -> StorageError {
    match error {
        RecordError::Version(version) => StorageError::NewerFormat {
            path: path.into(),
            found: u32::from(*version),
            supported: u32::from(record::VERSION),
        },
        RecordError::Checksum | RecordError::Malformed => corrupt(path, offset, &error.to_string()),
    }
}

fn corrupt(path: &Path, offset: usize, message: &str) -> StorageError {
    StorageError::Corrupt {
        what: "log segment".into(),
        path: path.into(),
        message: format!("at byte {offset}: {message}"),
    }
}
