//! `d-engine kv txn`: a transaction described in JSON.

use std::path::PathBuf;

use clap::Args;
use d_engine_client::{Compare, KeyRange, LeaseId, Op, Relation, Revision, Txn, TxnResponse, TxnResult};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::args::{ClientArgs, Layout};
use crate::encoding::from_base64;
use crate::failure::Failure;
use crate::kv::{print_kvs, read_input};
use crate::output::{self, HeaderJson, KeyValueJson};

const FORMAT: &str = r#"The description is a JSON object with three lists, each of which may be left out:

  {
    "when":      [{ "key": "owner", "exists": false }],
    "then":      [{ "put": { "key": "owner", "value": "me" } }],
    "otherwise": [{ "get": { "key": "owner" } }]
  }

If all conditions of `when` hold, the operations of `then` are applied, else those of `otherwise`; all or none.

A condition names a `key` and one of
  "exists": true or false
  "value": "text", "version": 3, "create_revision": 7, "mod_revision": 9, "lease": 0
and may compare with "relation": "equal" (the default), "not_equal", "less" or "greater".

An operation is one of
  { "put": { "key": "k", "value": "v", "return_previous": true } }
  { "get": { "key": "k" } }
  { "range": { "prefix": "p/", "limit": 10 } }   or with "start" and "end"
  { "delete": { "key": "k", "return_previous": true } }
  { "delete_range": { "prefix": "p/" } }          or with "start" and "end"
  { "txn": { "when": [], "then": [], "otherwise": [] } }

Every text stands for its UTF-8 bytes; for other bytes write key_base64, value_base64, prefix_base64, start_base64
or end_base64 instead."#;

#[derive(Debug, Args)]
#[command(after_help = FORMAT)]
pub(crate) struct TxnArgs {
    /// File with the description; - is standard input
    #[arg(default_value = "-")]
    file: PathBuf,
}

/// A transaction as described.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TxnText {
    when: Vec<ConditionText>,
    then: Vec<OpText>,
    otherwise: Vec<OpText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConditionText {
    key: Option<String>,
    key_base64: Option<String>,
    relation: RelationText,
    exists: Option<bool>,
    value: Option<String>,
    value_base64: Option<String>,
    version: Option<u64>,
    create_revision: Option<u64>,
    mod_revision: Option<u64>,
    lease: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RelationText {
    #[default]
    Equal,
    NotEqual,
    Less,
    Greater,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OpText {
    Put(PutText),
    Get(KeyText),
    Range(IntervalText),
    Delete(KeyText),
    DeleteRange(IntervalText),
    Txn(TxnText),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PutText {
    key: Option<String>,
    key_base64: Option<String>,
    value: Option<String>,
    value_base64: Option<String>,
    return_previous: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct KeyText {
    key: Option<String>,
    key_base64: Option<String>,
    return_previous: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct IntervalText {
    prefix: Option<String>,
    prefix_base64: Option<String>,
    start: Option<String>,
    start_base64: Option<String>,
    end: Option<String>,
    end_base64: Option<String>,
    limit: Option<u64>,
    return_previous: bool,
}

pub(crate) async fn run(txn: TxnArgs, args: &ClientArgs) -> Result<(), Failure> {
    let text = read_input(&txn.file)?;
    let txn = parse(&text).map_err(|problem| Failure::Usage(format!("{problem}; see `d-engine kv txn --help`")))?;
    let answer = args.client()?.txn(txn).min_revision(args.min_revision()).await?;
    match args.output {
        Layout::Json => output::json(&to_json(&answer))?,
        Layout::Table => {
            let branch = if answer.succeeded { "then" } else { "otherwise" };
            output::line(&format!("applied `{branch}`, revision {}", answer.header.revision))?;
            print_results(&answer, args)?;
        }
    }
    match answer.succeeded {
        true => Ok(()),
        false => Err(Failure::ConditionFailed(
            "the conditions did not hold, so `otherwise` was applied. Outcome: applied".to_owned(),
        )),
    }
}

/// Reads a description.
fn parse(text: &[u8]) -> Result<Txn, String> {
    // Fields may also be given by position, in an array, which nobody means to do.
    if !text.trim_ascii_start().starts_with(b"{") {
        return Err("the description is not a JSON object".to_owned());
    }
    let text: TxnText = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    text.build()
}

impl TxnText {
    fn build(self) -> Result<Txn, String> {
        let mut txn = Txn::new();
        for condition in self.when {
            txn = txn.when(condition.build()?);
        }
        for operation in self.then {
            txn = txn.then(operation.build()?);
        }
        for operation in self.otherwise {
            txn = txn.otherwise(operation.build()?);
        }
        Ok(txn)
    }
}

impl ConditionText {
    fn build(self) -> Result<Compare, String> {
        let key = required("key", self.key, self.key_base64)?;
        let relation = match self.relation {
            RelationText::Equal => Relation::Equal,
            RelationText::NotEqual => Relation::NotEqual,
            RelationText::Less => Relation::Less,
            RelationText::Greater => Relation::Greater,
        };
        let value = optional("value", self.value, self.value_base64)?;
        let mut conditions = [
            self.exists.map(|exists| if exists { Compare::exists(&key) } else { Compare::missing(&key) }),
            value.map(|value| Compare::value(&key, relation, value)),
            self.version.map(|version| Compare::version(&key, relation, version)),
            self.create_revision.map(|revision| Compare::create_revision(&key, relation, Revision(revision))),
            self.mod_revision.map(|revision| Compare::mod_revision(&key, relation, Revision(revision))),
            self.lease.map(|lease| Compare::lease(&key, relation, LeaseId(lease))),
        ]
        .into_iter()
        .flatten();
        match (conditions.next(), conditions.next()) {
            (Some(_), _) if self.exists.is_some() && !matches!(self.relation, RelationText::Equal) => {
                Err("a condition on `exists` takes no `relation`".to_owned())
            }
            (Some(condition), None) => Ok(condition),
            _ => Err("a condition needs exactly one of exists, value, version, create_revision, mod_revision, lease"
                .to_owned()),
        }
    }
}

impl OpText {
    fn build(self) -> Result<Op, String> {
        let previous = |op: Op, wanted: bool| if wanted { op.return_previous() } else { op };
        Ok(match self {
            Self::Put(put) => {
                let key = required("key", put.key, put.key_base64)?;
                let value = required("value", put.value, put.value_base64)?;
                previous(Op::put(key, value), put.return_previous)
            }
            Self::Get(get) if get.return_previous => return Err("a get has no `return_previous`".to_owned()),
            Self::Get(get) => Op::get(required("key", get.key, get.key_base64)?),
            Self::Delete(delete) => {
                previous(Op::delete(required("key", delete.key, delete.key_base64)?), delete.return_previous)
            }
            Self::Range(range) if range.return_previous => {
                return Err("a range has no `return_previous`".to_owned());
            }
            Self::Range(range) => {
                let limit = range.limit.unwrap_or_default();
                Op::range(range.build()?).limit(limit)
            }
            Self::DeleteRange(range) if range.limit.is_some() => {
                return Err("a delete_range has no `limit`".to_owned());
            }
            Self::DeleteRange(range) => {
                let wanted = range.return_previous;
                previous(Op::delete_range(range.build()?), wanted)
            }
            Self::Txn(txn) => Op::txn(txn.build()?),
        })
    }
}

impl IntervalText {
    fn build(self) -> Result<KeyRange, String> {
        let prefix = optional("prefix", self.prefix, self.prefix_base64)?;
        let start = optional("start", self.start, self.start_base64)?;
        let end = optional("end", self.end, self.end_base64)?;
        match (prefix, start, end) {
            (Some(prefix), None, None) => Ok(KeyRange::prefix(prefix)),
            // Leaving everything out would make a slip of the keyboard delete the store.
            (None, None, None) => Err("an interval needs `prefix`, or `start` and `end`".to_owned()),
            (None, start, end) => Ok(KeyRange::between(start.unwrap_or_default(), end.unwrap_or_default())),
            (Some(_), _, _) => Err("an interval has either `prefix`, or `start` and `end`".to_owned()),
        }
    }
}

fn required(name: &str, text: Option<String>, base64: Option<String>) -> Result<Vec<u8>, String> {
    optional(name, text, base64)?.ok_or_else(|| format!("`{name}` or `{name}_base64` is missing"))
}

fn optional(name: &str, text: Option<String>, base64: Option<String>) -> Result<Option<Vec<u8>>, String> {
    match (text, base64) {
        (Some(_), Some(_)) => Err(format!("`{name}` and `{name}_base64` exclude each other")),
        (Some(text), None) => Ok(Some(text.into_bytes())),
        (None, Some(base64)) => from_base64(&base64).map(Some).map_err(|error| format!("`{name}_base64`: {error}")),
        (None, None) => Ok(None),
    }
}

fn print_results(answer: &TxnResponse, args: &ClientArgs) -> Result<(), Failure> {
    for (number, result) in answer.results.iter().enumerate() {
        let number = number + 1;
        match result {
            TxnResult::Put(put) => {
                output::line(&format!("{number}. put"))?;
                print_some(put.previous.iter(), args)?;
            }
            TxnResult::Get(get) => {
                let found = if get.kv.is_some() { "" } else { ": does not exist" };
                output::line(&format!("{number}. get{found}"))?;
                print_some(get.kv.iter(), args)?;
            }
            TxnResult::Range(range) => {
                let more = if range.rest.is_some() { ", more are left" } else { "" };
                output::line(&format!("{number}. range: {} keys{more}", range.kvs.len()))?;
                print_some(&range.kvs, args)?;
            }
            TxnResult::Delete(delete) => {
                output::line(&format!("{number}. delete: {}", if delete.deleted { "1 key" } else { "0 keys" }))?;
                print_some(delete.previous.iter(), args)?;
            }
            TxnResult::DeleteRange(delete) => {
                output::line(&format!("{number}. delete_range: {} keys", delete.deleted))?;
                print_some(&delete.previous, args)?;
            }
            TxnResult::Txn(txn) => {
                let branch = if txn.succeeded { "then" } else { "otherwise" };
                output::line(&format!("{number}. txn: applied `{branch}`, results follow"))?;
                print_results(txn, args)?;
            }
            _ => output::line(&format!("{number}. a result this version does not know"))?,
        }
    }
    Ok(())
}

fn print_some<'a>(
    kvs: impl IntoIterator<Item = &'a d_engine_client::KeyValue>,
    args: &ClientArgs,
) -> Result<(), Failure> {
    let mut kvs = kvs.into_iter().peekable();
    if kvs.peek().is_none() { Ok(()) } else { print_kvs(kvs, args) }
}

fn to_json(answer: &TxnResponse) -> Value {
    json!({
        "header": HeaderJson::from(answer.header),
        "succeeded": answer.succeeded,
        "results": answer.results.iter().map(result_to_json).collect::<Vec<_>>(),
    })
}

fn result_to_json(result: &TxnResult) -> Value {
    let kvs = |kvs: &[d_engine_client::KeyValue]| kvs.iter().map(KeyValueJson::from).collect::<Vec<_>>();
    match result {
        TxnResult::Put(put) => json!({ "put": { "previous": put.previous.as_ref().map(KeyValueJson::from) } }),
        TxnResult::Get(get) => json!({ "get": { "kv": get.kv.as_ref().map(KeyValueJson::from) } }),
        TxnResult::Range(range) => {
            json!({ "range": { "kvs": kvs(&range.kvs), "count": range.count, "more": range.rest.is_some() } })
        }
        TxnResult::Delete(delete) => {
            let previous = delete.previous.as_ref().map(KeyValueJson::from);
            json!({ "delete": { "deleted": delete.deleted, "previous": previous } })
        }
        TxnResult::DeleteRange(delete) => {
            json!({ "delete_range": { "deleted": delete.deleted, "previous": kvs(&delete.previous) } })
        }
        TxnResult::Txn(txn) => {
            let results: Vec<_> = txn.results.iter().map(result_to_json).collect();
            json!({ "txn": { "succeeded": txn.succeeded, "results": results } })
        }
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_becomes_the_transaction_it_describes() {
        let text = r#"{
            "when": [
                { "key": "owner", "exists": false },
                { "key_base64": "/w==", "relation": "not_equal", "value_base64": "AP8=" },
                { "key": "n", "relation": "greater", "version": 2 }
            ],
            "then": [
                { "put": { "key": "owner", "value": "me", "return_previous": true } },
                { "range": { "prefix": "p/", "limit": 3 } },
                { "txn": { "then": [{ "delete_range": { "start": "a", "end": "b" } }] } }
            ],
            "otherwise": [{ "get": { "key": "owner" } }, { "delete": { "key": "x" } }]
        }"#;
        let expected = Txn::new()
            .when(Compare::missing("owner"))
            .when(Compare::value_not_equal([0xff], [0, 0xff]))
            .when(Compare::version("n", Relation::Greater, 2))
            .then(Op::put("owner", "me").return_previous())
            .then(Op::range(KeyRange::prefix("p/")).limit(3))
            .then(Op::txn(Txn::new().then(Op::delete_range(KeyRange::between("a", "b")))))
            .otherwise(Op::get("owner"))
            .otherwise(Op::delete("x"));
        assert_eq!(parse(text.as_bytes()), Ok(expected));
        assert_eq!(parse(b"{}"), Ok(Txn::new()));
    }

    #[test]
    fn the_example_of_the_help_is_valid() {
        let start = FORMAT.find("  {\n").unwrap();
        let end = FORMAT.find("  }\n").unwrap() + 4;
        assert!(parse(&FORMAT.as_bytes()[start..end]).is_ok());
    }

    #[test]
    fn a_description_that_could_mean_something_else_is_refused() {
        for text in [
            "",
            "[]",
            r#"{ "if": [] }"#,
            r#"{ "when": [{ "key": "k" }] }"#,
            r#"{ "when": [{ "exists": true }] }"#,
            r#"{ "when": [{ "key": "k", "version": 1, "exists": true }] }"#,
            r#"{ "when": [{ "key": "k", "relation": "less", "exists": true }] }"#,
            r#"{ "when": [{ "key": "k", "relation": "like", "value": "v" }] }"#,
            r#"{ "then": [{ "put": { "key": "k" } }] }"#,
            r#"{ "then": [{ "put": { "key": "k", "key_base64": "aw==", "value": "v" } }] }"#,
            r#"{ "then": [{ "put": { "key": "k", "value": "v", "ttl": 5 } }] }"#,
            r#"{ "then": [{ "get": { "key_base64": "?" } }] }"#,
            r#"{ "then": [{ "delete_range": {} }] }"#,
            r#"{ "then": [{ "range": { "prefix": "p", "end": "q" } }] }"#,
            r#"{ "then": [{ "increment": { "key": "k" } }] }"#,
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
