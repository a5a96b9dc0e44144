//! `d-engine kv get --history`: the versions of one key that are still kept.

use std::time::Duration;

use d_engine_client::{Client, Error, ErrorKind, KeyValue, Revision, WatchEvent, WatchStream};
use serde_json::json;

use crate::args::{ClientArgs, Layout};
use crate::change::Change;
use crate::failure::Failure;
use crate::output::{self, HeaderJson};

/// Budget of the whole, unless another one is set.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Shows what became of the key from the oldest revision left up to its current version.
///
/// A key that does not exist has no last version at which to stop: it is not found, though it may have a past.
pub(crate) async fn show(key: &[u8], args: &ClientArgs) -> Result<(), Failure> {
    let client = args.client()?;
    let now = client.get(key).min_revision(args.min_revision()).await?;
    let Some(current) = now.kv else {
        return Err(Failure::NotFound { key: args.encoding.encode(key) });
    };
    let events = tokio::time::timeout(args.timeout.unwrap_or(TIMEOUT), versions(&client, key, current))
        .await
        .map_err(|_| Failure::Unhealthy("the history could not be read in time; see --timeout".to_owned()))??;
    let changes = events.iter().map(Change::event);
    match args.output {
        Layout::Json => output::json(&json!({
            "header": HeaderJson::from(now.header),
            "history": changes.map(|change| change.json()).collect::<Vec<_>>(),
        })),
        Layout::Table => output::table(
            ["REVISION", "CHANGE", "VERSION", "VALUE"],
            changes.map(|change| {
                let of_kv = |show: &dyn Fn(&KeyValue) -> String| change.kv.map(show).unwrap_or_default();
                [
                    change.revision.to_string(),
                    change.kind.name().to_owned(),
                    of_kv(&|kv| kv.version.to_string()),
                    of_kv(&|kv| args.encoding.encode(&kv.value)),
                ]
            }),
        ),
    }
}

/// The changes that led from the oldest version left to `current`.
async fn versions(client: &Client, key: &[u8], current: KeyValue) -> Result<Vec<WatchEvent>, Error> {
    let (oldest, mut changes) = from_oldest(client, key).await?;
    let mut events = Vec::new();
    // What the oldest revision shows may have been written before it.
    let inherited = client.get(key).revision(oldest).await;
    match inherited {
        Ok(answer) => events
            .extend(answer.kv.filter(|kv| kv.mod_revision < oldest).map(|kv| WatchEvent::Put { kv, previous: None })),
        // Nothing was written yet; the key exists, so its first version is on its way.
        Err(error) if error.kind() == ErrorKind::FutureRevision => {}
        Err(error) => return Err(error),
    }
    while events.last().is_none_or(|event| event.revision() < current.mod_revision) {
        match changes.next().await {
            Some(update) => events.extend(update?.events),
            None => break,
        }
    }
    // What has happened since is not asked for.
    events.retain(|event| event.revision() <= current.mod_revision);
    Ok(events)
}

/// Watches from the oldest revision that is left.
async fn from_oldest(client: &Client, key: &[u8]) -> Result<(Revision, WatchStream), Error> {
    let mut oldest = Revision(1);
    loop {
        match client.watch(key).from(oldest).await {
            Ok(changes) => return Ok((oldest, changes)),
            Err(error) if error.kind() == ErrorKind::Compacted => match error.revision() {
                Some(minimum) if minimum > oldest => oldest = minimum,
                _ => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
}
