//! Fills a store before something is measured.

use d_engine_client::Client;
use futures_util::{StreamExt, TryStreamExt};
use indicatif::{ProgressBar, ProgressStyle};

/// Puts in flight.
const CALLERS: usize = 1000;

/// The key of this number.
pub(crate) fn key(number: u64) -> String {
    format!("{number:08}")
}

/// Puts so many keys, each with a value of so many bytes.
pub(crate) async fn fill(client: &Client, keys: u64, value_bytes: usize) {
    let progress = bar(keys, "keys");
    let value = vec![b'x'; value_bytes];
    futures_util::stream::iter(0..keys)
        .map(|number| client.put(key(number), value.clone()).into_future())
        .buffer_unordered(CALLERS)
        .inspect_ok(|_| progress.inc(1))
        .try_for_each(async |_| Ok(()))
        .await
        .expect("a healthy cluster");
    progress.finish_and_clear();
}

/// A progress bar that tells how much is left of `what`.
pub(crate) fn bar(length: u64, what: &'static str) -> ProgressBar {
    let template = format!("{{msg}} {{wide_bar}} {{human_pos}}/{{human_len}} {what}, {{eta}} left");
    ProgressBar::new(length).with_style(ProgressStyle::with_template(&template).expect("a valid template"))
}
