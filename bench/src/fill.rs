//! Fills a store before something is measured.

use std::time::Instant;

use d_engine_client::Client;
use d_engine_tests::wait::PATIENCE;
use futures_util::StreamExt;
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
        .map(|number| put(client, number, &value))
        .buffer_unordered(CALLERS)
        .for_each(async |()| progress.inc(1))
        .await;
    progress.finish_and_clear();
}

/// Puts a key, again and again if need be: a machine that is filled as fast as it can may let a lease lapse.
async fn put(client: &Client, number: u64, value: &[u8]) {
    let began = Instant::now();
    while let Err(error) = client.put(key(number), value.to_vec()).await {
        assert!(began.elapsed() < PATIENCE, "the store cannot be filled: {error}");
    }
}

/// A progress bar that tells how much is left of `what`.
pub(crate) fn bar(length: u64, what: &'static str) -> ProgressBar {
    let template = format!("{{msg}} {{wide_bar}} {{human_pos}}/{{human_len}} {what}, {{eta}} left");
    ProgressBar::new(length).with_style(ProgressStyle::with_template(&template).expect("a valid template"))
}
