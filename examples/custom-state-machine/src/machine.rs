//! The queue as a replicated state machine.
//!
//! It lives in memory. What survives the process is one file, replaced as a whole: the queue together with the position
//! in the log that it stands for, so that both are there or neither. After a crash the engine hands over again what
//! followed; it keeps that in its log until [`durable`](JobQueue::durable) says that the file has it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use d_engine::prelude::*;
use d_engine::server::storage::LogPosition;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::queue::{Answer, Queue};

const FILE: &str = "queue.json";

/// A job queue, replicated.
pub struct JobQueue {
    directory: PathBuf,
    state: Mutex<State>,
}

struct State {
    queue: Queue,
    applied: AppliedState,
    durable: Option<LogPosition>,
}

/// The file: a checksum, a line feed, and this.
#[derive(Serialize, Deserialize)]
struct Saved {
    queue: Queue,
    /// Term and index of the last entry applied.
    position: Option<(u64, u64)>,
    store_time_ns: u64,
    /// The membership is the engine's: kept as it came, with its position.
    membership: Option<(u64, u64, Vec<u8>)>,
}

impl JobQueue {
    /// Opens the queue in a directory, or an empty one if there is none.
    ///
    /// # Errors
    /// When the directory cannot be used, or what is in it is damaged.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, StorageError> {
        let directory = directory.into();
        std::fs::create_dir_all(&directory).map_err(|error| io("create", &directory, &error))?;
        let state = match std::fs::read(directory.join(FILE)) {
            Ok(content) => restored(&content).map_err(|message| corrupt(&directory, message))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                State { queue: Queue::default(), applied: AppliedState::default(), durable: None }
            }
            Err(error) => return Err(io("read", &directory, &error)),
        };
        Ok(Self { directory, state: Mutex::new(state) })
    }

    /// Replaces the file: written beside it, made durable, then renamed.
    fn replace_file(&self, content: &[u8]) -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
        file.write_all(content)?;
        file.as_file().sync_all()?;
        file.persist(self.directory.join(FILE))?;
        File::open(&self.directory)?.sync_all()
    }
}

impl StateMachine for JobQueue {
    fn applied(&self) -> AppliedState {
        self.state.lock().applied.clone()
    }

    fn durable(&self) -> Option<LogPosition> {
        self.state.lock().durable
    }

    fn apply(&self, entry: &CommittedEntry) -> Result<Vec<Bytes>, StorageError> {
        let mut state = self.state.lock();
        let State { queue, applied, .. } = &mut *state;
        let answers = match &entry.content {
            EntryContent::Blank => Vec::new(),
            EntryContent::Commands { store_time, commands } => {
                applied.store_time = *store_time;
                // A command that makes no sense is answered, on every member alike: it is in the log for good.
                let apply = |command: &Bytes| match serde_json::from_slice(command) {
                    Ok(command) => encoded(&queue.apply(command, store_time.0)),
                    Err(error) => encoded(&Answer::Malformed(error.to_string())),
                };
                commands.iter().map(apply).collect()
            }
            EntryContent::Membership(membership) => {
                applied.membership = Some((entry.position, membership.clone()));
                Vec::new()
            }
        };
        applied.position = Some(entry.position);
        Ok(answers)
    }

    fn query(&self, question: Bytes) -> Result<Bytes, StorageError> {
        Ok(encoded(&match serde_json::from_slice(&question) {
            Ok(question) => self.state.lock().queue.answer(&question),
            Err(error) => Answer::Malformed(error.to_string()),
        }))
    }

    fn flush(&self) -> Result<(), StorageError> {
        let mut state = self.state.lock();
        self.replace_file(&saved(&state)).map_err(|error| io("write", &self.directory, &error))?;
        state.durable = state.applied.position;
        Ok(())
    }

    /// The same file, in the directory of a snapshot.
    fn save(&self, directory: &Path) -> Result<AppliedState, StorageError> {
        let (content, applied) = {
            let state = self.state.lock();
            (saved(&state), state.applied.clone())
        };
        std::fs::write(directory.join(FILE), content).map_err(|error| io("write", directory, &error))?;
        Ok(applied)
    }

    /// The file of the snapshot takes the place of ours before the queue does.
    fn restore(&self, directory: &Path) -> Result<(), StorageError> {
        let content = std::fs::read(directory.join(FILE)).map_err(|error| io("read", directory, &error))?;
        let restored = restored(&content).map_err(|message| corrupt(directory, message))?;
        let mut state = self.state.lock();
        self.replace_file(&content).map_err(|error| io("write", &self.directory, &error))?;
        *state = restored;
        Ok(())
    }
}

fn encoded(answer: &Answer) -> Bytes {
    // Numbers and texts: there is nothing in it that has no JSON.
    serde_json::to_vec(answer).unwrap_or_default().into()
}

fn saved(state: &State) -> Vec<u8> {
    let plain = |position: &LogPosition| (position.term.get(), position.index.get());
    let saved = Saved {
        queue: state.queue.clone(),
        position: state.applied.position.as_ref().map(plain),
        store_time_ns: state.applied.store_time.as_nanos(),
        membership: state.applied.membership.as_ref().map(|(position, bytes)| {
            let (term, index) = plain(position);
            (term, index, bytes.to_vec())
        }),
    };
    let content = serde_json::to_vec(&saved).unwrap_or_default();
    [format!("{:08x}\n", crc32c::crc32c(&content)).into_bytes(), content].concat()
}

fn restored(content: &[u8]) -> Result<State, String> {
    let (checksum, content) = content.split_at_checked(9).ok_or("the file is cut off")?;
    if checksum != format!("{:08x}\n", crc32c::crc32c(content)).as_bytes() {
        return Err("the checksum does not match".to_owned());
    }
    let saved: Saved = serde_json::from_slice(content).map_err(|error| error.to_string())?;
    let position = |term: u64, index: u64| LogPosition { term: term.into(), index: index.into() };
    let durable = saved.position.map(|(term, index)| position(term, index));
    let applied = AppliedState {
        position: durable,
        store_time: StoreTime::from_nanos(saved.store_time_ns),
        membership: saved.membership.map(|(term, index, bytes)| (position(term, index), bytes.into())),
    };
    Ok(State { queue: saved.queue, applied, durable })
}

fn io(action: &'static str, path: &Path, error: &std::io::Error) -> StorageError {
    StorageError::Io { action, path: path.to_owned(), message: error.to_string() }
}

fn corrupt(directory: &Path, message: String) -> StorageError {
    StorageError::Corrupt { what: "job queue".to_owned(), path: directory.join(FILE), message }
}
