//! `d-engine kv`: reads and writes of keys.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};
use d_engine_client::{Client, KeyRange, KeyValue, LeaseId, Revision};
use serde_json::json;

use crate::args::{ClientArgs, Layout, duration};
use crate::failure::Failure;
use crate::history;
use crate::lease::lease_id;
use crate::output::{self, HeaderJson, KeyValueJson};
use crate::txn::{self, TxnArgs};

#[derive(Debug, Subcommand)]
pub(crate) enum KvCommand {
    /// Writes a key
    Put(PutArgs),
    /// Reads a key; exits with 1 if it does not exist
    Get(GetArgs),
    /// Deletes a key, or an interval of keys
    Del(DelArgs),
    /// Reads an interval of keys, in byte order; without bounds, all of them
    Range(RangeArgs),
    /// Writes a key if it holds an expected value, or does not exist; exits with 3 if not
    Cas(CasArgs),
    /// Applies a transaction described in JSON; exits with 3 if its conditions did not hold
    Txn(TxnArgs),
}

/// Where a value comes from.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true).args(["value", "file"]))]
pub(crate) struct ValueArgs {
    /// The value; - reads it from standard input, as it is
    #[arg(allow_hyphen_values = true)]
    value: Option<String>,
    /// Read the value from a file, as it is
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct PutArgs {
    /// The key
    key: String,
    #[command(flatten)]
    value: ValueArgs,
    /// Delete the key after this time, unless it is written again
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    ttl: Option<Duration>,
    /// Attach the key to a lease, and delete it when that ends
    #[arg(long, value_name = "ID", value_parser = lease_id, conflicts_with = "ttl")]
    lease: Option<LeaseId>,
    /// Show what the key held before
    #[arg(long)]
    prev: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// The key
    key: String,
    /// Read as of this past revision
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    revision: u64,
    /// Show every version that is kept, from the oldest on; of a key that is gone, `watch --from` does
    #[arg(long, conflicts_with_all = ["revision", "raw"])]
    history: bool,
    /// Print the value alone, byte for byte
    #[arg(long, conflicts_with = "output")]
    raw: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DelArgs {
    /// The key; with --prefix the prefix, with --range-end the first key of an interval
    key: String,
    /// Delete all keys that begin with KEY
    #[arg(long)]
    prefix: bool,
    /// Delete all keys from KEY up to, but without, this one
    #[arg(long, value_name = "KEY", conflicts_with = "prefix")]
    range_end: Option<String>,
    /// Show what the keys held before
    #[arg(long)]
    prev: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RangeArgs {
    /// First key
    start: Option<String>,
    /// Read the keys that begin with this
    #[arg(long, value_name = "PREFIX", conflicts_with_all = ["start", "end"])]
    prefix: Option<String>,
    /// First key that is no longer part of the interval
    #[arg(long, value_name = "KEY")]
    end: Option<String>,
    /// Read at most this many keys
    #[arg(long, value_name = "KEYS", default_value_t = 0, hide_default_value = true)]
    limit: u64,
    /// From the last key to the first
    #[arg(long)]
    descending: bool,
    /// Leave the values out
    #[arg(long, conflicts_with = "count_only")]
    keys_only: bool,
    /// Only count the keys
    #[arg(long)]
    count_only: bool,
    /// Read as of this past revision
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    revision: u64,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("condition").required(true).args(["expected", "missing"]))]
pub(crate) struct CasArgs {
    /// The key
    key: String,
    #[command(flatten)]
    value: ValueArgs,
    /// The value that the key must hold
    #[arg(long, value_name = "VALUE", allow_hyphen_values = true)]
    expected: Option<String>,
    /// The key must not exist
    #[arg(long)]
    missing: bool,
}

pub(crate) async fn run(command: KvCommand, args: &ClientArgs) -> Result<(), Failure> {
    match command {
        KvCommand::Put(put) => self::put(put, args).await,
        KvCommand::Get(get) => self::get(get, args).await,
        KvCommand::Del(del) => self::del(del, args).await,
        KvCommand::Range(range) => self::range(range, args).await,
        KvCommand::Cas(cas) => self::cas(cas, args).await,
        KvCommand::Txn(txn) => txn::run(txn, args).await,
    }
}

impl ValueArgs {
    fn read(&self, args: &ClientArgs) -> Result<Vec<u8>, Failure> {
        match (&self.value, &self.file) {
            (_, Some(path)) => read_input(path),
            (Some(value), None) if value == "-" => read_input(Path::new("-")),
            (Some(value), None) => Ok(args.encoding.decode(value)?),
            (None, None) => Err(Failure::Usage("a value is missing".to_owned())),
        }
    }
}

/// The content of a file; `-` is standard input.
pub(crate) fn read_input(path: &Path) -> Result<Vec<u8>, Failure> {
    if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).map_err(Failure::io("cannot read standard input"))?;
        return Ok(bytes);
    }
    std::fs::read(path).map_err(|error| Failure::Usage(format!("cannot read {}: {error}", path.display())))
}

async fn put(put: PutArgs, args: &ClientArgs) -> Result<(), Failure> {
    let key = args.encoding.decode(&put.key)?;
    let value = put.value.read(args)?;
    let mut request = args.client()?.put(key, value);
    if put.prev {
        request = request.return_previous();
    }
    if let Some(ttl) = put.ttl {
        request = request.ttl(ttl);
    }
    if let Some(lease) = put.lease {
        request = request.lease(lease);
    }
    let answer = request.await?;
    match args.output {
        Layout::Json => output::json(&json!({
            "header": HeaderJson::from(answer.header),
            "lease": answer.lease.map(|lease| lease.get()),
            "previous": answer.previous.as_ref().map(KeyValueJson::from),
        })),
        Layout::Table => {
            output::line(&format!("written at revision {}", answer.header.revision))?;
            if put.prev { print_kvs(answer.previous.iter(), args) } else { Ok(()) }
        }
    }
}

async fn get(get: GetArgs, args: &ClientArgs) -> Result<(), Failure> {
    let key = args.encoding.decode(&get.key)?;
    if get.history {
        return history::show(&key, args).await;
    }
    let request = args.client()?.get(&key).revision(Revision(get.revision)).min_revision(args.min_revision());
    let answer = request.await?;
    match &answer.kv {
        Some(kv) if get.raw => return output::bytes(&kv.value),
        Some(kv) if args.output == Layout::Table => print_kvs([kv], args)?,
        None if args.output == Layout::Table => {}
        kv => output::json(&json!({
            "header": HeaderJson::from(answer.header),
            "kv": kv.as_ref().map(KeyValueJson::from),
        }))?,
    }
    match answer.kv {
        Some(_) => Ok(()),
        None => Err(Failure::NotFound { key: args.encoding.encode(&key) }),
    }
}

async fn del(del: DelArgs, args: &ClientArgs) -> Result<(), Failure> {
    let key = args.encoding.decode(&del.key)?;
    let range = match &del.range_end {
        Some(end) => Some(KeyRange::between(key.clone(), args.encoding.decode(end)?)),
        None => del.prefix.then(|| KeyRange::prefix(&key)),
    };
    let client = args.client()?;
    let (header, deleted, previous) = match range {
        Some(range) => delete_range(&client, range, del.prev).await?,
        None => {
            let request = client.delete(key);
            let answer = if del.prev { request.return_previous() } else { request }.await?;
            (answer.header, u64::from(answer.deleted), answer.previous.into_iter().collect())
        }
    };
    match args.output {
        Layout::Json => output::json(&json!({
            "header": HeaderJson::from(header),
            "deleted": deleted,
            "previous": previous.iter().map(KeyValueJson::from).collect::<Vec<_>>(),
        })),
        Layout::Table => {
            let keys = if deleted == 1 { "key" } else { "keys" };
            output::line(&format!("{deleted} {keys} deleted, revision {}", header.revision))?;
            if del.prev { print_kvs(&previous, args) } else { Ok(()) }
        }
    }
}

async fn delete_range(
    client: &Client,
    range: KeyRange,
    prev: bool,
) -> Result<(d_engine_client::Header, u64, Vec<KeyValue>), Failure> {
    let request = client.delete_range(range);
    let answer = if prev { request.return_previous() } else { request }.await?;
    Ok((answer.header, answer.deleted, answer.previous))
}

async fn range(range: RangeArgs, args: &ClientArgs) -> Result<(), Failure> {
    let decode = |text: &Option<String>| args.encoding.decode(text.as_deref().unwrap_or_default());
    let interval = match &range.prefix {
        Some(prefix) => KeyRange::prefix(args.encoding.decode(prefix)?),
        None => KeyRange::between(decode(&range.start)?, decode(&range.end)?),
    };
    let mut request = args
        .client()?
        .range(interval)
        .limit(range.limit)
        .revision(Revision(range.revision))
        .min_revision(args.min_revision());
    if range.descending {
        request = request.descending();
    }
    if range.keys_only {
        request = request.keys_only();
    }
    if range.count_only {
        let answer = request.count_only().await?;
        return match args.output {
            Layout::Json => output::json(&json!({ "header": HeaderJson::from(answer.header), "count": answer.count })),
            Layout::Table => {
                output::line(&answer.count.map_or_else(|| "unknown".to_owned(), |count| count.to_string()))
            }
        };
    }
    let (mut pages, mut kvs, mut header, mut more) = (request.pages(), Vec::new(), None, false);
    while let Some(page) = pages.next().await? {
        kvs.extend(page.kvs);
        header = header.or(Some(page.header));
        more = page.rest.is_some();
    }
    match args.output {
        Layout::Json => output::json(&json!({
            "header": HeaderJson::from(header.unwrap_or_default()),
            "count": (!more).then_some(kvs.len()),
            "more": more,
            "kvs": kvs.iter().map(KeyValueJson::from).collect::<Vec<_>>(),
        })),
        Layout::Table if range.keys_only => kvs.iter().try_for_each(|kv| output::line(&args.encoding.encode(&kv.key))),
        Layout::Table => print_kvs(&kvs, args),
    }
}

async fn cas(cas: CasArgs, args: &ClientArgs) -> Result<(), Failure> {
    let key = args.encoding.decode(&cas.key)?;
    let expected = cas.expected.as_deref().map(|expected| args.encoding.decode(expected)).transpose()?;
    let value = cas.value.read(args)?;
    let answer = args.client()?.compare_and_swap(&key, expected, value).await?;
    match args.output {
        Layout::Json => output::json(&json!({
            "header": HeaderJson::from(answer.header),
            "succeeded": answer.succeeded,
            "current": answer.current.as_ref().map(KeyValueJson::from),
        }))?,
        Layout::Table if answer.succeeded => {
            output::line(&format!("written at revision {}", answer.header.revision))?;
        }
        Layout::Table => print_kvs(answer.current.iter(), args)?,
    }
    let key = args.encoding.encode(&key);
    match (answer.succeeded, answer.current) {
        (true, _) => Ok(()),
        (false, Some(_)) => Err(Failure::ConditionFailed(format!(
            "key {key} holds something else, as shown. Outcome: not applied. Compare again with what it holds now"
        ))),
        (false, None) => Err(Failure::ConditionFailed(format!(
            "key {key} does not exist. Outcome: not applied. Use --missing to create it"
        ))),
    }
}

/// Prints keys and values under their names.
pub(crate) fn print_kvs<'a>(kvs: impl IntoIterator<Item = &'a KeyValue>, args: &ClientArgs) -> Result<(), Failure> {
    let rows = kvs.into_iter().map(|kv| {
        [
            args.encoding.encode(&kv.key),
            args.encoding.encode(&kv.value),
            kv.mod_revision.to_string(),
            kv.create_revision.to_string(),
            kv.version.to_string(),
        ]
    });
    output::table(["KEY", "VALUE", "REVISION", "CREATED", "VERSION"], rows)
}
