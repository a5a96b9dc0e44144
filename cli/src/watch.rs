//! `d-engine watch`: every change of a key, a prefix or an interval, as it happens or from a past revision on.

use clap::{ArgGroup, Args};
use d_engine_client::{KeyRange, Revision};

use crate::args::{ClientArgs, Layout};
use crate::change::Change;
use crate::failure::Failure;
use crate::output;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("keys").required(true).args(["key", "prefix", "range", "all"]))]
pub(crate) struct WatchArgs {
    /// Watch this key
    key: Option<String>,
    /// Watch the keys that begin with this
    #[arg(long)]
    prefix: Option<String>,
    /// Watch the keys from START up to, but without, END
    #[arg(long, num_args = 2, value_names = ["START", "END"])]
    range: Option<Vec<String>>,
    /// Watch every key
    #[arg(long)]
    all: bool,
    /// Begin with the changes of this revision, past or future, instead of with what comes next
    #[arg(long, value_name = "REVISION", value_parser = clap::value_parser!(u64).range(1..))]
    from: Option<u64>,
    /// Show the keys as they are first, then every change after that
    #[arg(long, conflicts_with_all = ["from", "puts", "deletes", "keys_only"])]
    snapshot: bool,
    /// Show what keys held before
    #[arg(long)]
    prev: bool,
    /// Leave deletions out
    #[arg(long, conflicts_with = "deletes")]
    puts: bool,
    /// Leave puts out
    #[arg(long)]
    deletes: bool,
    /// Leave the values out
    #[arg(long)]
    keys_only: bool,
    /// Show, too, up to which revision everything was shown; --from the next one goes on there
    #[arg(long)]
    bookmarks: bool,
    /// Exit after so many changes
    #[arg(long, value_name = "CHANGES", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

pub(crate) async fn run(watch: WatchArgs, args: &ClientArgs) -> Result<(), Failure> {
    let client = args.client()?;
    let range = watch.range(args)?;
    let print = |change: Change<'_>| match args.output {
        Layout::Json => output::json_line(&change.json()),
        Layout::Table => output::line(&change.text(args.encoding, !watch.keys_only)),
    };
    let mut stream = if watch.snapshot {
        let mut request = client.watch_from_snapshot(range).min_revision(args.min_revision());
        if watch.prev {
            request = request.previous();
        }
        let snapshot = request.await?;
        snapshot.kvs.iter().try_for_each(|kv| print(Change::key(kv)))?;
        if watch.bookmarks {
            print(Change::bookmark(snapshot.revision))?;
        }
        snapshot.watch
    } else {
        let mut request = client.watch_range(range);
        if let Some(revision) = watch.from {
            request = request.from(Revision(revision));
        }
        if watch.prev {
            request = request.previous();
        }
        if watch.puts {
            request = request.puts_only();
        }
        if watch.deletes {
            request = request.deletes_only();
        }
        if watch.keys_only {
            request = request.keys_only();
        }
        request.await?
    };
    let mut left = watch.count.unwrap_or(u64::MAX);
    while let Some(update) = stream.next().await {
        let update = update?;
        for event in &update.events {
            print(Change::event(event))?;
            left -= 1;
            if left == 0 {
                return Ok(());
            }
        }
        if watch.bookmarks {
            print(Change::bookmark(update.revision))?;
        }
    }
    Ok(())
}

impl WatchArgs {
    fn range(&self, args: &ClientArgs) -> Result<KeyRange, Failure> {
        let decode = |text: &str| args.encoding.decode(text);
        Ok(match (&self.key, &self.prefix, self.range.as_deref()) {
            (Some(key), ..) => only(decode(key)?),
            (_, Some(prefix), _) => KeyRange::prefix(decode(prefix)?),
            (.., Some([start, end])) => KeyRange::between(decode(start)?, decode(end)?),
            _ => KeyRange::all(),
        })
    }
}

/// The interval that holds one key.
fn only(key: Vec<u8>) -> KeyRange {
    let end = [&key[..], &[0]].concat();
    KeyRange::between(key, end)
}
