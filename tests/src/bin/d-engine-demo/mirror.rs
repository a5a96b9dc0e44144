//! The mirror: two watchers that follow the whole store through every fault, one as a stream that a validator judges, one
//! as a cache that must equal the store in the end.
//!
//! Every revision changes at least one key, so a watch of all keys must show each revision, without a gap.

use std::collections::HashMap;

use d_engine_client::{Bytes, Cache, Client, Consistency, Error, KeyRange, Revision, WatchEvent, WatchUpdate};
use d_engine_tests::wait::PATIENCE;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::tally::{CALL_TIMEOUT, Tally};

/// Both watchers, from the first revision on.
#[derive(Debug)]
pub(crate) struct Mirror {
    client: Client,
    cache: Cache,
    /// Tells the validator where to stop.
    last: watch::Sender<Option<Revision>>,
    validator: JoinHandle<Result<Validator, Error>>,
}

/// What the mirror has to show.
#[derive(Debug)]
pub(crate) struct Reflection {
    pub(crate) keys: usize,
    pub(crate) events: u64,
    pub(crate) revision: Revision,
    /// How often a watch had to go on at another node.
    pub(crate) resumes: u64,
}

impl Mirror {
    /// Starts both, most likely at the node of this address: the only one their client is told of.
    pub(crate) async fn start(address: String) -> Self {
        // The second watch shares the stream of the first.
        let client = Client::builder().endpoints([address]).call_timeout(CALL_TIMEOUT).build().unwrap();
        let mut stream = client.watch_range(KeyRange::all()).from(Revision(1)).await.unwrap();
        let cache = client.cache(KeyRange::all()).await.unwrap();
        let (last, mut end) = watch::channel(None);
        let validator = tokio::spawn(async move {
            let mut validator = Validator::default();
            loop {
                if end.borrow_and_update().is_some_and(|end| validator.through >= end) {
                    return Ok(validator);
                }
                tokio::select! {
                    update = stream.next() => match update {
                        Some(update) => validator.judge(&update?),
                        None => return Ok(validator),
                    },
                    _ = end.changed() => {}
                }
            }
        });
        Self { client, cache, last, validator }
    }

    /// Compares what the watchers have with what the store says. Nothing must be written any more.
    pub(crate) async fn compare(self, tally: &Tally) -> Option<Reflection> {
        let store = self.client.range(KeyRange::all()).consistency(Consistency::Linearizable);
        let revision = store.clone().limit(1).await.unwrap().header.revision;
        let store = store.all().await.unwrap();
        self.last.send_replace(Some(revision));

        if tokio::time::timeout(PATIENCE, self.cache.wait_for(revision)).await.is_err() {
            tally.violation(format!("the mirror stays behind at revision {}", self.cache.revision()));
        }
        if !self.cache.iter().eq(store.iter().cloned()) {
            tally.violation(format!(
                "the mirror of {} keys differs from the store of {}",
                self.cache.len(),
                store.len()
            ));
        }
        let repeated = tally.repeated.lock().unwrap().clone();
        for kv in store.iter().filter(|kv| kv.key.starts_with(b"suffix/") && kv.version != 1) {
            let key = String::from_utf8_lossy(&kv.key).into_owned();
            if !repeated.contains(&key) {
                tally.violation(format!("{key} was written once and applied {} times", kv.version));
            }
        }
        match tokio::time::timeout(PATIENCE, self.validator).await.map(Result::unwrap) {
            Ok(Ok(validator)) => {
                validator.faults.iter().for_each(|fault| tally.violation(fault.clone()));
                let resumes = self.client.stats().watch_resumes;
                if resumes == 0 {
                    tally.violation("the watches were meant to lose their node, and did not".to_owned());
                }
                let Validator { events, through, .. } = validator;
                Some(Reflection { keys: store.len(), events, revision: through, resumes })
            }
            Ok(Err(error)) => {
                tally.violation(format!("the watch ended: {error}"));
                None
            }
            Err(_) => {
                tally.violation("the watch does not come to the last revision".to_owned());
                None
            }
        }
    }
}

/// Judges a watch of the whole store: each revision, in order, once and whole.
#[derive(Debug, Default)]
struct Validator {
    through: Revision,
    events: u64,
    /// Version of each key that exists.
    versions: HashMap<Bytes, u64>,
    faults: Vec<String>,
}

impl Validator {
    fn judge(&mut self, update: &WatchUpdate) {
        let mut at = self.through;
        for event in &update.events {
            let revision = event.revision();
            if revision != at.next() && (revision != at || at == self.through) {
                self.faults.push(format!("revision {revision} came after {at}"));
            }
            at = revision;
            self.follow(event);
        }
        if update.revision != at {
            self.faults.push(format!("an update through {} ends with revision {at}", update.revision));
        }
        self.through = update.revision;
    }

    fn follow(&mut self, event: &WatchEvent) {
        self.events += 1;
        let (key, revision) = (event.key(), event.revision());
        let sound = match event {
            WatchEvent::Put { kv, .. } => {
                let before = self.versions.insert(key.clone(), kv.version).unwrap_or_default();
                kv.version == before + 1
            }
            WatchEvent::Delete { .. } => self.versions.remove(key).is_some(),
        };
        if !sound {
            let key = String::from_utf8_lossy(key);
            self.faults.push(format!("{key}: an event was lost or came twice before revision {revision}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use d_engine_client::KeyValue;

    use super::*;

    fn put(key: &'static str, revision: u64, version: u64) -> WatchEvent {
        let kv = KeyValue {
            key: Bytes::from_static(key.as_bytes()),
            value: Bytes::new(),
            create_revision: Revision(1),
            mod_revision: Revision(revision),
            version,
            lease: None,
        };
        WatchEvent::Put { kv, previous: None }
    }

    fn judge(updates: &[(u64, Vec<WatchEvent>)]) -> usize {
        let mut validator = Validator::default();
        for (revision, events) in updates {
            validator.judge(&WatchUpdate { revision: Revision(*revision), events: events.clone() });
        }
        validator.faults.len()
    }

    #[test]
    fn a_sound_watch_passes() {
        let (a, b) = (put("a", 1, 1), put("b", 1, 1));
        assert_eq!(judge(&[(1, vec![a.clone(), b.clone()]), (2, vec![put("a", 2, 2)])]), 0);
        assert_eq!(judge(&[(2, vec![a, b, put("b", 2, 2)])]), 0);
    }

    #[test]
    fn what_is_lost_repeated_or_torn_is_seen() {
        let (a, b) = (put("a", 1, 1), put("b", 1, 1));
        assert_ne!(judge(&[(1, vec![a.clone()]), (3, vec![put("b", 3, 1)])]), 0, "a revision is missing");
        assert_ne!(judge(&[(1, vec![a.clone()]), (1, vec![a.clone()])]), 0, "a revision comes twice");
        assert_ne!(judge(&[(1, vec![a.clone()]), (1, vec![b])]), 0, "a revision comes in two halves");
        assert_ne!(judge(&[(1, vec![a.clone()]), (2, vec![put("a", 2, 3)])]), 0, "a version is missing");
        assert_ne!(judge(&[(2, vec![a])]), 0, "a revision is skipped");
    }
}
