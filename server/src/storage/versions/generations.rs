//! Replaces a directory of versions as a whole, while the old one is open, so that a crash leaves either.
//!
//! ```text
//! state              the directory, as long as nothing was installed
//! state.1.new        being filled
//! state.1            whole: from the rename on it stands for the directory, whatever else there is
//! ```
//! The next start gives it the plain name again, so that between runs there is one directory and one name.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::steps;
use crate::storage::StorageError;
use crate::storage::directory::{Held, hold, io_error};

const UNFINISHED: &str = "new";

/// Gives the newest directory the plain name and removes all others. To be called while none of them is open.
///
/// # Errors
/// [`StorageError::Locked`] when one is in use; [`StorageError::Io`].
pub(super) fn settle(path: &Path) -> Result<(), StorageError> {
    let generations = generations(path)?;
    let Some((_, newest)) = generations.last() else { return remove_unfinished(path) };
    let _held: Vec<Held> = generations.iter().map(|(_, path)| hold(path)).collect::<Result<_, _>>()?;
    remove_unfinished(path)?;
    for (_, older) in &generations[..generations.len() - 1] {
        remove(older)?;
    }
    remove(path)?;
    steps::passed("settle/removed")?;
    fs::rename(newest, path).and_then(|()| sync_parent(path)).map_err(|error| io_error("rename", newest, &error))
}

/// Makes a copy of the directory `from`, which nobody writes to, stand for `path` from now on, and answers where it is.
/// Files that never change are shared with `from` as links, if the file system can. What `path` stood for stays until
/// its owner removes it.
///
/// # Errors
/// [`StorageError::Io`]; then nothing has changed.
pub(super) fn install(path: &Path, from: &Path) -> Result<PathBuf, StorageError> {
    remove_unfinished(path)?;
    let number = generations(path)?.last().map_or(1, |(number, _)| number + 1);
    let whole = with_suffix(path, &number.to_string());
    let unfinished = with_suffix(&whole, UNFINISHED);
    copy(from, &unfinished)?;
    steps::passed("install/copied")?;
    let renamed = fs::rename(&unfinished, &whole).and_then(|()| sync_parent(&whole));
    renamed.map_err(|error| io_error("rename", &unfinished, &error))?;
    steps::passed("install/switched")?;
    Ok(whole)
}

/// Removes a directory that is no longer anybody's.
pub(super) fn remove(path: &Path) -> Result<(), StorageError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io_error("remove", path, &error)),
        _ => Ok(()),
    }
}

fn copy(from: &Path, into: &Path) -> Result<(), StorageError> {
    let failed = |error| io_error("copy into", into, &error);
    fs::create_dir(into).map_err(failed)?;
    for file in fs::read_dir(from).map_err(failed)? {
        let file = file.map_err(failed)?;
        copy_file(&file.path(), &into.join(file.file_name())).map_err(failed)?;
        steps::passed("install/file")?;
    }
    File::open(into).and_then(|directory| directory.sync_all()).map_err(failed)
}

fn copy_file(source: &Path, target: &Path) -> io::Result<()> {
    // Tables are written once; everything else RocksDB may write to.
    let is_table = source.extension().is_some_and(|extension| extension == "sst");
    if is_table && fs::hard_link(source, target).is_ok() {
        return Ok(());
    }
    fs::copy(source, target)?;
    File::open(target)?.sync_all()
}

/// Whole directories beside `path` that may stand for it, with their numbers, the newest last.
fn generations(path: &Path) -> Result<Vec<(u64, PathBuf)>, StorageError> {
    let mut found: Vec<_> =
        beside(path)?.into_iter().filter_map(|(rest, path)| Some((rest.parse().ok()?, path))).collect();
    found.sort_unstable();
    Ok(found)
}

fn remove_unfinished(path: &Path) -> Result<(), StorageError> {
    for (rest, path) in beside(path)? {
        if rest.strip_suffix(UNFINISHED).and_then(|rest| rest.strip_suffix('.')).is_some_and(is_number) {
            remove(&path)?;
        }
    }
    Ok(())
}

fn is_number(text: &str) -> bool {
    text.parse::<u64>().is_ok()
}

/// What is named like `path` with a suffix: the suffix, and where.
fn beside(path: &Path) -> Result<Vec<(String, PathBuf)>, StorageError> {
    let (parent, Some(name)) = (parent(path), path.file_name()) else { return Ok(Vec::new()) };
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("list", parent, &error)),
    };
    let name = format!("{}.", name.to_string_lossy());
    let named = |entry: fs::DirEntry| {
        let rest = entry.file_name().to_string_lossy().strip_prefix(&name)?.to_owned();
        Some((rest, entry.path()))
    };
    Ok(entries.filter_map(Result::ok).filter_map(named).collect())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(parent(path))?.sync_all()
}
