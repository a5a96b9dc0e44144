//! Walks the history as of one revision: of each key in an interval, the newest version that is not newer.
//!
//! A key that changed often has many versions; the cursor reads a few in a row and then jumps, so that its cost
//! follows the number of keys rather than the number of versions.

use d_engine_proto::Revision;
use rocksdb::{DBRawIterator, ReadOptions};

use super::database::Database;
use super::encoding::{self, AFTER_VERSIONS};
use super::{KeyVersion, ScanOrder};
use crate::storage::StorageError;

/// Neighbouring versions read one by one before a jump is cheaper.
const STEPS_BEFORE_JUMP: u32 = 8;

/// The keys from `start` (inclusive) to `end` (exclusive; `None`: to the last) as of one revision.
///
/// Reading blocks on the disk.
pub struct Cursor<'a> {
    database: &'a Database,
    iterator: DBRawIterator<'a>,
    revision: Revision,
    order: ScanOrder,
    started: bool,
    /// The form of the key the iterator stands at; a scratch buffer.
    escaped: Vec<u8>,
    /// Where to jump; a scratch buffer.
    target: Vec<u8>,
    /// The candidate version: its full key and its record.
    found_key: Vec<u8>,
    found_record: Vec<u8>,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(
        database: &'a Database,
        start: &[u8],
        end: Option<&[u8]>,
        revision: Revision,
        order: ScanOrder,
    ) -> Self {
        let mut lower = Vec::with_capacity(start.len() + 8);
        encoding::put_key(&mut lower, start);
        let upper = end.map_or_else(
            || AFTER_VERSIONS.to_vec(),
            |end| {
                let mut upper = Vec::with_capacity(end.len() + 8);
                encoding::put_key(&mut upper, end);
                upper
            },
        );
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(lower);
        options.set_iterate_upper_bound(upper);
        Self {
            database,
            iterator: database.rocks().raw_iterator_opt(options),
            revision,
            order,
            started: false,
            escaped: Vec::new(),
            target: Vec::new(),
            found_key: Vec::new(),
            found_record: Vec::new(),
        }
    }

    /// The next key that exists at the revision.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] or [`StorageError::Io`].
    pub fn advance(&mut self) -> Result<Option<KeyVersion>, StorageError> {
        if !self.started {
            self.started = true;
            match self.order {
                ScanOrder::Ascending => self.iterator.seek_to_first(),
                ScanOrder::Descending => self.iterator.seek_to_last(),
            }
        }
        while self.enter_key()? {
            let found = match self.order {
                ScanOrder::Ascending => self.newest_upwards()?,
                ScanOrder::Descending => self.newest_downwards()?,
            };
            if found {
                let version = encoding::decode_version(&self.found_key, &self.found_record)
                    .map_err(|malformed| self.database.corrupt_version(&self.found_key, &malformed))?;
                if version.is_some() {
                    return Ok(version);
                }
            }
        }
        Ok(None)
    }

    /// Remembers the key the iterator stands at; false at the end.
    fn enter_key(&mut self) -> Result<bool, StorageError> {
        let Some(full) = self.iterator.key() else {
            return self.end_of_iterator();
        };
        let (escaped, _) = split(self.database, full)?;
        self.escaped.clear();
        self.escaped.extend_from_slice(escaped);
        Ok(true)
    }

    /// From the oldest version of a key upwards; leaves the iterator at the next key.
    fn newest_upwards(&mut self) -> Result<bool, StorageError> {
        let mut steps = 0;
        loop {
            match self.revision_here()? {
                None => return Ok(steps > 0),
                Some(revision) if revision > self.revision => {
                    self.jump_up(Revision(u64::MAX));
                    return Ok(steps > 0);
                }
                Some(_) if steps == STEPS_BEFORE_JUMP => {
                    self.jump_down(self.revision);
                    // A jump that failed must not let the candidate of the last step pass for the newest.
                    let landed = self.revision_here()?.is_some();
                    self.take_candidate();
                    self.jump_up(Revision(u64::MAX));
                    return Ok(landed);
                }
                Some(_) => {
                    self.take_candidate();
                    steps += 1;
                    self.iterator.next();
                }
            }
        }
    }

    /// From the newest version of a key downwards; leaves the iterator at the key before.
    fn newest_downwards(&mut self) -> Result<bool, StorageError> {
        let mut steps = 0;
        loop {
            match self.revision_here()? {
                None => return Ok(false),
                Some(revision) if revision > self.revision => {
                    steps += 1;
                    if steps == STEPS_BEFORE_JUMP {
                        self.jump_down(self.revision);
                    } else {
                        self.iterator.prev();
                    }
                }
                Some(_) => {
                    self.take_candidate();
                    // No change ever has revision 0.
                    self.jump_down(Revision(0));
                    return Ok(true);
                }
            }
        }
    }

    /// The revision of the version the iterator stands at; `None` once it left the key.
    fn revision_here(&self) -> Result<Option<Revision>, StorageError> {
        let Some(full) = self.iterator.key() else {
            self.end_of_iterator()?;
            return Ok(None);
        };
        let (escaped, revision) = split(self.database, full)?;
        Ok((escaped == self.escaped).then_some(revision))
    }

    fn take_candidate(&mut self) {
        if let Some((key, record)) = self.iterator.item() {
            self.found_key.clear();
            self.found_key.extend_from_slice(key);
            self.found_record.clear();
            self.found_record.extend_from_slice(record);
        }
    }

    /// To the first version from `revision` of this key on, or the first of the next key.
    fn jump_up(&mut self, revision: Revision) {
        self.aim(revision);
        self.iterator.seek(&self.target);
    }

    /// To the last version up to `revision` of this key, or the last of the key before.
    fn jump_down(&mut self, revision: Revision) {
        self.aim(revision);
        self.iterator.seek_for_prev(&self.target);
    }

    fn aim(&mut self, revision: Revision) {
        self.target.clear();
        self.target.extend_from_slice(&self.escaped);
        self.target.extend_from_slice(&revision.get().to_be_bytes());
    }

    /// An iterator that stopped either reached the end or failed.
    fn end_of_iterator(&self) -> Result<bool, StorageError> {
        match self.iterator.status() {
            Ok(()) => Ok(false),
            Err(error) => Err(self.database.failed("read versions in", &error)),
        }
    }
}

fn split<'b>(database: &Database, full: &'b [u8]) -> Result<(&'b [u8], Revision), StorageError> {
    encoding::split_version_key(full).map_err(|malformed| database.corrupt_version(full, &malformed))
}
