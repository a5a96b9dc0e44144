//! What the work changes: a ledger in a file, shared by all processes, that refuses whoever has been superseded.
//!
//! It stands for any system outside of the cluster that can compare two numbers: a storage device, a database, a
//! switch. It never asks the cluster: the greatest token it has seen is all that it needs.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::PathBuf;

/// Ordered: a later leader has a greater one. The restore epoch comes first, since revisions go on from a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token {
    /// The store's restore epoch.
    pub epoch: u64,
    /// The revision at which the leader made itself known.
    pub revision: u64,
}

/// Why nothing was entered.
#[derive(Debug)]
pub enum LedgerError {
    /// Somebody with a greater token was here: whoever asks leads no more.
    Superseded {
        /// The greatest token there is.
        by: Token,
    },
    /// The file cannot be used.
    Io(std::io::Error),
}

impl From<std::io::Error> for LedgerError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// Something that was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// By whose right.
    pub token: Token,
    /// By which node.
    pub node: u32,
}

/// The ledger.
#[derive(Clone, Debug)]
pub struct Ledger {
    path: PathBuf,
}

impl Ledger {
    /// The ledger in a file, which need not exist.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Enters what a node did, unless somebody with a greater token was here: compared and entered in one step.
    ///
    /// # Errors
    /// [`LedgerError::Superseded`], and what the file says.
    pub fn enter(&self, entry: Entry) -> Result<(), LedgerError> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&self.path)?;
        // Released with the file.
        file.lock()?;
        if let Some(last) = entries(&mut file)?.last()
            && last.token > entry.token
        {
            return Err(LedgerError::Superseded { by: last.token });
        }
        let Entry { token: Token { epoch, revision }, node } = entry;
        file.write_all(format!("{epoch} {revision} {node}\n").as_bytes())?;
        Ok(())
    }

    /// Everything that was done, in the order in which it was.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn entries(&self) -> std::io::Result<Vec<Entry>> {
        match File::open(&self.path) {
            Ok(mut file) => {
                file.lock_shared()?;
                entries(&mut file)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

fn entries(file: &mut File) -> std::io::Result<Vec<Entry>> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let entry = |line: &str| {
        let mut numbers = line.split(' ').map_while(|number| number.parse().ok());
        let token = Token { epoch: numbers.next()?, revision: numbers.next()? };
        Some(Entry { token, node: u32::try_from(numbers.next()?).ok()? })
    };
    Ok(text.lines().map_while(entry).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

    use super::*;

    #[test]
    fn whoever_is_superseded_enters_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::at(directory.path().join("ledger"));
        let entry = |epoch, revision, node| Entry { token: Token { epoch, revision }, node };
        assert!(ledger.entries().unwrap().is_empty());
        for fine in [entry(0, 5, 1), entry(0, 5, 1), entry(0, 9, 2), entry(1, 3, 3)] {
            ledger.enter(fine).unwrap();
        }
        for late in [entry(0, 5, 1), entry(0, 10, 1), entry(1, 2, 2)] {
            assert!(matches!(ledger.enter(late), Err(LedgerError::Superseded { by: Token { epoch: 1, revision: 3 } })));
        }
        assert_eq!(ledger.entries().unwrap().len(), 4);
    }
}
