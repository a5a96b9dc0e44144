//! The zone in memory: what a listing gave, and every change since. It is the only thing that answers are made from.
//!
//! A key `dns/<name>/<type>` is one set of records: in its value, a line for each, of time to live and data. What cannot
//! be read as that is told in the log, and answered as if it were not there.

use std::sync::Arc;

use d_engine::prelude::*;
use hickory_server::net::runtime::TokioRuntimeProvider;
use hickory_server::proto::rr::rdata::SOA;
use hickory_server::proto::rr::{Name, RData, Record, RecordSet, RecordType, RrKey};
use hickory_server::store::in_memory::InMemoryZoneHandler;
use hickory_server::zone_handler::{AxfrPolicy, ZoneHandler, ZoneType};

const PREFIX: &str = "dns/";
/// How long others may remember what does not exist, in seconds.
const NEGATIVE_TTL: u32 = 5;

type Answers = InMemoryZoneHandler<TokioRuntimeProvider>;

pub(crate) struct Zone {
    origin: Name,
    answers: Arc<Answers>,
}

impl Zone {
    pub(crate) fn new(origin: Name) -> Self {
        let answers = Answers::empty(origin.clone(), ZoneType::Primary, AxfrPolicy::Deny);
        Self { origin, answers: Arc::new(answers) }
    }

    /// What a DNS server asks.
    pub(crate) fn answers(&self) -> Arc<dyn ZoneHandler> {
        self.answers.clone()
    }

    /// Reads the zone as this node has it, and returns the changes from there on.
    pub(crate) async fn load(&self, client: &EmbeddedClient) -> Result<WatchReceiver, LocalClientError> {
        let listed = client.watch_from_snapshot(WatchRequest::prefix(PREFIX)).await?;
        let mut sets = vec![self.authority()];
        sets.extend(listed.pairs.iter().filter_map(|(key, value)| self.understand(key, Some(value))?.1));
        let mut records = self.answers.records_mut().await;
        records.clear();
        records.extend(sets.into_iter().map(|set| (key_of(&set), Arc::new(set))));
        Ok(listed.watch)
    }

    /// Applies the changes as they come, until the engine stops. They also come while there is no quorum, only then there
    /// are none.
    pub(crate) async fn follow(
        &self,
        client: &EmbeddedClient,
        mut changes: WatchReceiver,
    ) -> Result<(), LocalClientError> {
        loop {
            let (key, value) = match changes.recv().await {
                Some(WatchEvent::Put(key, value)) => (key, Some(value)),
                Some(WatchEvent::Delete(key)) => (key, None),
                None => match changes.end_reason() {
                    Some(LocalClientError::Stopped) | None => return Ok(()),
                    // Too far behind for the history that is kept.
                    Some(_) => {
                        changes = self.load(client).await?;
                        continue;
                    }
                },
            };
            let Some((key, set)) = self.understand(&key, value.as_deref()) else { continue };
            let mut records = self.answers.records_mut().await;
            match set {
                Some(set) => drop(records.insert(key, Arc::new(set))),
                None => drop(records.remove(&key)),
            }
        }
    }

    /// The set of records that a key stands for, and what it holds; `None`: the key is not of this zone.
    fn understand(&self, key: &[u8], value: Option<&[u8]>) -> Option<(RrKey, Option<RecordSet>)> {
        let text = std::str::from_utf8(key).ok()?.strip_prefix(PREFIX)?;
        let (name, kind) = text.rsplit_once('/')?;
        let mut name = Name::from_utf8(name).ok()?;
        name.set_fqdn(true);
        let kind: RecordType = kind.parse().ok()?;
        if !self.origin.zone_of(&name) || kind == RecordType::SOA {
            return None;
        }
        let set = value.map(|value| parse(&name, kind, value)).transpose().unwrap_or_else(|problem| {
            eprintln!("dns-embedded: {text} is left out: {problem}");
            None
        });
        Some((RrKey::new(name.into(), kind), set))
    }

    /// The record that makes this server the authority. Nobody copies the zone by its serial number: every server has it
    /// from the engine.
    fn authority(&self) -> RecordSet {
        let soa = SOA::new(self.origin.clone(), self.origin.clone(), 1, 3600, 600, 86400, NEGATIVE_TTL);
        let mut set = RecordSet::new(self.origin.clone(), RecordType::SOA, 1);
        set.insert(Record::from_rdata(self.origin.clone(), NEGATIVE_TTL, RData::SOA(soa)), 1);
        set
    }
}

fn key_of(set: &RecordSet) -> RrKey {
    RrKey::new(set.name().into(), set.record_type())
}

fn parse(name: &Name, kind: RecordType, value: &[u8]) -> Result<RecordSet, String> {
    let text = std::str::from_utf8(value).map_err(|error| error.to_string())?;
    let mut set = RecordSet::new(name.clone(), kind, 0);
    for line in text.lines() {
        let (ttl, data) = line.split_once(' ').ok_or_else(|| format!("{line:?} is not a time to live and data"))?;
        let ttl = ttl.parse().map_err(|_| format!("{ttl:?} is not a time to live in seconds"))?;
        let data = RData::try_from_str(kind, data).map_err(|error| format!("{data:?}: {error}"))?;
        set.insert(Record::from_rdata(name.clone(), ttl, data), 0);
    }
    if set.is_empty() { Err("no records".to_owned()) } else { Ok(set) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn understood(key: &str, value: &str) -> Option<Option<RecordSet>> {
        let zone = Zone::new(Name::from_ascii("example.test.").unwrap());
        zone.understand(key.as_bytes(), Some(value.as_bytes())).map(|(_, set)| set)
    }

    #[test]
    fn a_set_has_a_record_for_each_line() {
        let set = understood("dns/www.example.test/A", "60 192.0.2.1\n60 192.0.2.2").unwrap().unwrap();
        let data: Vec<_> = set.records_without_rrsigs().map(|record| (record.ttl, record.data.to_string())).collect();
        assert_eq!(data, [(60, "192.0.2.1".to_owned()), (60, "192.0.2.2".to_owned())]);
    }

    #[test]
    fn what_is_no_record_is_left_out_and_what_is_not_of_the_zone_is_not_looked_at() {
        for value in ["", "192.0.2.1", "soon 192.0.2.1", "60 www.example.test", "60 192.0.2.1\n60"] {
            assert_eq!(understood("dns/www.example.test./A", value), Some(None), "{value:?}");
        }
        for key in ["dns/www.example.org/A", "dns/www.example.test", "dns/www.example.test/HOUSE", "services/a/A"] {
            assert_eq!(understood(key, "60 192.0.2.1"), None, "{key:?}");
        }
        assert_eq!(
            understood("dns/example.test/SOA", "60 a. b. 1 2 3 4 5"),
            None,
            "the authority is this server's own"
        );
    }
}
