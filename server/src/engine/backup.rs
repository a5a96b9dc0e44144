//! Backups of this node's state, as a stream that goes as fast as its receiver takes it.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use d_engine_proto::v1;
use futures_util::Stream;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::{Engine, EngineError};
use crate::backup::{Backup, BackupError, Origin};
use crate::clock::unix_time;
use crate::limits::{BACKUP_PIECE_BYTES, BACKUP_PIECES_WAITING_MAX};
use crate::metrics::Metrics;

/// Name of the directory below the data directory in which backups are made; what a killed run left there goes with the
/// next one.
const DIRECTORY: &str = "backup";

/// What backups share.
pub(super) struct Backups {
    /// One at a time: each holds files on the disk that the store has given up.
    turn: Arc<Semaphore>,
    /// `None`: this engine has no directory of its own.
    directory: Option<PathBuf>,
    metrics: Arc<Metrics>,
}

impl Backups {
    pub(super) fn new(metrics: Arc<Metrics>, data_directory: Option<&PathBuf>) -> Self {
        let directory = data_directory.map(|data| data.join(DIRECTORY));
        Self { turn: Arc::new(Semaphore::new(1)), directory, metrics }
    }
}

impl Engine {
    /// A backup of this node's state, in pieces. Dropping the stream ends it.
    ///
    /// # Errors
    /// [`EngineError::Overloaded`] while another one is made, [`EngineError::Backup`], or what keeps the node from
    /// serving. The stream itself may end with an error too: then what was received is no backup.
    pub async fn backup(
        &self,
    ) -> Result<impl Stream<Item = Result<v1::SnapshotPiece, EngineError>> + use<>, EngineError> {
        let backups = &self.inner.backups;
        let failed = self.inner.consensus.failure().borrow().as_ref().map(ToString::to_string);
        if let Some(failure) = failed {
            return Err(self.unavailable(failure));
        }
        let (Some(directory), Some(cluster_id)) = (backups.directory.clone(), self.inner.consensus.cluster_id()) else {
            return Err(self.unavailable("there is nothing to back up yet"));
        };
        let Ok(turn) = backups.turn.clone().try_acquire_owned() else {
            let reason = "another backup of this node is under way: wait for its end, or ask another member".to_owned();
            return Err(EngineError::Overloaded { reason });
        };
        let now = unix_time();
        let unix_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let origin = Origin { cluster_id, node_id: self.inner.consensus.node_id(), unix_ms };
        let kv = self.inner.kv.clone();
        let begun = tokio::task::spawn_blocking(move || {
            // Of a run that was killed, whose turn this is now.
            match std::fs::remove_dir_all(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(BackupError::Io { action: "remove", path: directory, source: error });
                }
                _ => {}
            }
            Backup::begin(&kv, &directory, origin)
        });
        let backup =
            begun.await.map_err(|_| EngineError::Stopped)?.map_err(|error| EngineError::Backup(Arc::new(error)))?;
        let (pieces, receiver) = mpsc::channel(BACKUP_PIECES_WAITING_MAX);
        let metrics = backups.metrics.clone();
        tokio::task::spawn_blocking(move || {
            let _turn = turn;
            send(&backup, pieces, &metrics, now);
        });
        Ok(ReceiverStream::new(receiver))
    }
}

type Pieces = mpsc::Sender<Result<v1::SnapshotPiece, EngineError>>;

fn send(backup: &Backup, pieces: Pieces, metrics: &Metrics, now: Duration) {
    let mut sender = Sender { pieces, buffer: BytesMut::new(), total_bytes: backup.archive_bytes() };
    match backup.write(&mut sender) {
        Ok(()) => metrics.snapshot_saved(now),
        // Unless it is the receiver who has gone.
        Err(error) if !sender.pieces.is_closed() => {
            tracing::warn!(%error, "a backup failed");
            let _ = sender.pieces.blocking_send(Err(EngineError::Backup(Arc::new(error))));
        }
        Err(_) => tracing::info!("a backup was given up by its receiver"),
    }
}

/// Cuts what is written into pieces, and waits for their receiver.
struct Sender {
    pieces: Pieces,
    buffer: BytesMut,
    /// Of the archive, until the first piece has told it.
    total_bytes: u64,
}

impl Sender {
    fn send(&mut self, data: Bytes) -> io::Result<()> {
        let piece = v1::SnapshotPiece { data, total_bytes: std::mem::take(&mut self.total_bytes) };
        self.pieces.blocking_send(Ok(piece)).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = bytes.len().min(BACKUP_PIECE_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..part]);
        if self.buffer.len() == BACKUP_PIECE_BYTES {
            let data = self.buffer.split().freeze();
            self.send(data)?;
        }
        Ok(part)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let data = self.buffer.split().freeze();
        self.send(data)
    }
}
