//! The load: writers that bring the data set in, readers that make sure that time never goes back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use d_engine_client::{Client, Consistency, Outcome, Revision};
use d_engine_tests::data_set::Entry;
use indicatif::ProgressBar;
use tokio::task::JoinHandle;

use crate::tally::Tally;

const WRITERS: usize = 32;
const READERS: usize = 8;

/// The tasks of the load.
#[derive(Debug)]
pub(crate) struct Load {
    tally: Arc<Tally>,
    writers: Vec<JoinHandle<()>>,
    readers: Vec<JoinHandle<()>>,
}

impl Load {
    pub(crate) fn start(client: &Client, entries: &Arc<Vec<Entry>>, tally: &Arc<Tally>, bar: &ProgressBar) -> Self {
        let writers = (0..WRITERS)
            .map(|_| tokio::spawn(write(client.clone(), Arc::clone(entries), Arc::clone(tally), bar.clone())));
        let readers = (0..READERS)
            .map(|number| tokio::spawn(read(client.clone(), Arc::clone(entries), Arc::clone(tally), number)));
        Self { tally: Arc::clone(tally), writers: writers.collect(), readers: readers.collect() }
    }

    /// Waits until so many writes are acknowledged.
    pub(crate) async fn reaches(&self, writes: usize) {
        d_engine_tests::wait::until("the load to go on", d_engine_tests::wait::PATIENCE, || async {
            (self.tally.acknowledged.load(Ordering::Relaxed) >= writes as u64).then_some(())
        })
        .await;
    }

    /// Waits until all is written.
    pub(crate) async fn finish(self) {
        for task in self.writers {
            task.await.unwrap();
        }
        self.tally.writing_done.store(true, Ordering::Relaxed);
        for task in self.readers {
            task.await.unwrap();
        }
    }
}

/// Writes entries until none is left. One whose outcome is unknown is read before it is written again.
async fn write(client: Client, entries: Arc<Vec<Entry>>, tally: Arc<Tally>, bar: ProgressBar) {
    loop {
        let index = tally.next.fetch_add(1, Ordering::Relaxed) as usize;
        let Some(entry) = entries.get(index) else { break };
        loop {
            let began = Instant::now();
            let result = client.put(&entry.key, &entry.value).await;
            tally.took("write", began);
            match result {
                Ok(put) => {
                    tally.acknowledged(began, put.header.revision);
                    break;
                }
                Err(error) if error.outcome() == Outcome::NotApplied => {
                    tally.not_applied.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => {
                    tally.unknown.fetch_add(1, Ordering::Relaxed);
                    if holds(&client, entry, &tally).await {
                        break;
                    }
                    tally.repeated.lock().unwrap().insert(entry.key.clone());
                }
            }
        }
        bar.inc(1);
    }
}

/// Whether the store holds the entry, read linearizably.
async fn holds(client: &Client, entry: &Entry, tally: &Tally) -> bool {
    loop {
        let began = Instant::now();
        let result = client.get(&entry.key).consistency(Consistency::Linearizable).await;
        tally.took("read", began);
        if let Ok(get) = result {
            tally.reads.fetch_add(1, Ordering::Relaxed);
            let revision = get.header.revision;
            let found = get.into_value().is_some_and(|value| value == entry.value.as_bytes());
            if found {
                tally.acknowledged(began, revision);
            }
            return found;
        }
    }
}

/// Reads random entries with every policy, and makes sure that what this reader sees never goes back in time.
async fn read(client: Client, entries: Arc<Vec<Entry>>, tally: Arc<Tally>, number: usize) {
    let policies = [Consistency::Eventual, Consistency::Lease, Consistency::Linearizable, Consistency::Eventual];
    let mut rng = fastrand::Rng::with_seed(number as u64);
    let mut highest = Revision(0);
    while !tally.writing_done.load(Ordering::Relaxed) {
        let entry = &entries[rng.usize(..entries.len())];
        let policy = *rng.choice(&policies).unwrap();
        let began = Instant::now();
        let result = client.get(&entry.key).consistency(policy).min_revision(highest).await;
        tally.took("read", began);
        let Ok(get) = result else { continue };
        tally.reads.fetch_add(1, Ordering::Relaxed);
        if get.header.revision < highest {
            tally.violation(format!("a read went back from revision {highest} to {}", get.header.revision));
        }
        highest = highest.max(get.header.revision);
        if get.into_value().is_some_and(|value| value != entry.value.as_bytes()) {
            tally.violation(format!("{} holds what nobody wrote", entry.key));
        }
    }
}
