//! Tells a write that was cut off from damage, at the end of the files RocksDB reads tolerantly.
//!
//! RocksDB's write-ahead logs and manifests are blocks of 32 KiB holding physical records:
//!
//! ```text
//! masked crc32c of type and content: u32 · length of content: u16 · type: u8 · content
//! ```
//!
//! In the last block, a record whose length reaches past the end of the file, and one whose header is all zero, end the
//! file as RocksDB sees it: right after a crash in the middle of a write, when nothing follows. But one flipped bit in a
//! length looks the same, and would silently drop all that follows in the block, up to 32 KiB of acknowledged writes.
//! So before RocksDB opens a directory, this looks whether a sound record follows such an end. It only reads.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use super::StorageError;
use super::directory::io_error;

const BLOCK_BYTES: u64 = 32 << 10;
const HEADER_BYTES: usize = 7;
/// RocksDB numbers its record types from 1; 0 is space never written.
const RECORD_TYPE_MAX: u8 = 13;

/// Checks the last block of every write-ahead log and manifest in `directory`.
///
/// # Errors
/// [`StorageError::Corrupt`] naming the file, or [`StorageError::Io`].
pub(super) fn check(directory: &Path) -> Result<(), StorageError> {
    let names = fs::read_dir(directory).and_then(|entries| {
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<Vec<_>>>()
    });
    let names = names.map_err(|error| io_error("list", directory, &error))?;
    for name in names.iter().filter(|name| name.ends_with(".log") || name.starts_with("MANIFEST-")) {
        let path = directory.join(name);
        let block = last_block(&path).map_err(|error| io_error("read", &path, &error))?;
        if let Some(offset) = followed_end(&block) {
            return Err(StorageError::Corrupt {
                what: "RocksDB file".into(),
                path,
                message: format!("the record {} bytes before its end is damaged", block.len() - offset),
            });
        }
    }
    Ok(())
}

fn last_block(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(1) / BLOCK_BYTES * BLOCK_BYTES))?;
    let mut block = Vec::new();
    file.take(BLOCK_BYTES).read_to_end(&mut block)?;
    Ok(block)
}

/// Where the block ends as RocksDB sees it, if a sound record follows there.
fn followed_end(block: &[u8]) -> Option<usize> {
    let mut offset = 0;
    while let Some(length) = record_length(&block[offset..]) {
        offset += length;
    }
    (offset + 1..block.len()).any(|start| is_sound(&block[start..])).then_some(offset)
}

/// Length of the record at the start of `bytes`, header included, if all of it is there.
fn record_length(bytes: &[u8]) -> Option<usize> {
    let header = bytes.first_chunk::<HEADER_BYTES>()?;
    let content = u16::from_le_bytes([header[4], header[5]]);
    let length = HEADER_BYTES + usize::from(content);
    ((header[6], content) != (0, 0) && length <= bytes.len()).then_some(length)
}

fn is_sound(bytes: &[u8]) -> bool {
    let Some(record) = record_length(bytes).map(|length| &bytes[..length]) else { return false };
    let checksum = crc32c::crc32c(&record[HEADER_BYTES - 1..]);
    let masked = checksum.rotate_right(15).wrapping_add(0xa282_ead8);
    (1..=RECORD_TYPE_MAX).contains(&record[HEADER_BYTES - 1]) && record[..4] == masked.to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(content: &[u8]) -> Vec<u8> {
        let mut typed = vec![1];
        typed.extend_from_slice(content);
        let masked = crc32c::crc32c(&typed).rotate_right(15).wrapping_add(0xa282_ead8);
        let length = u16::try_from(content.len()).unwrap();
        [&masked.to_le_bytes()[..], &length.to_le_bytes(), &typed].concat()
    }

    #[test]
    fn a_cut_off_end_is_no_damage_wherever_it_is_cut() {
        let block = [record(b"first"), record(b""), record(&[9; 300])].concat();
        for length in 0..=block.len() {
            assert_eq!(followed_end(&block[..length]), None, "cut at {length}");
            let zeros = [&block[..length], &[0; 64]].concat();
            assert_eq!(followed_end(&zeros), None, "zeros from {length}");
        }
    }

    #[test]
    fn a_sound_record_after_the_end_is_damage() {
        let first = record(b"first");
        let block = [first.clone(), record(b"second"), record(b"third")].concat();
        let mut longer = block.clone();
        longer[first.len() + 5] ^= 0x40;
        assert_eq!(followed_end(&longer), Some(first.len()));
        let mut zeroed = block.clone();
        zeroed[first.len()..first.len() + HEADER_BYTES].fill(0);
        assert_eq!(followed_end(&zeroed), Some(first.len()));
    }
}
