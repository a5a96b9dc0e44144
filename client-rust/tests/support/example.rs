// What the examples of the documentation run in: a client in a namespace of its own, so that they do not meet.
// `tests/tests/doc_examples.rs` starts a server for them and names it in D_ENGINE_ENDPOINTS.

/// Runs an example against the server that the environment names.
///
/// # Panics
/// If there is none, or the example fails.
fn run(example: impl AsyncFnOnce(d_engine_client::Client) -> Result<(), d_engine_client::Error>) {
    let endpoints = std::env::var("D_ENGINE_ENDPOINTS")
        .expect("the examples need a server: `scripts/test tests` starts one and names it in D_ENGINE_ENDPOINTS");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = d_engine_client::Client::builder().endpoints(endpoints.split(',')).connect().await.expect("a server");
        let place = format!("examples/{}/", fastrand::u64(..));
        let example = example(client.namespace(place));
        tokio::time::timeout(std::time::Duration::from_secs(60), example).await.expect("it ends").expect("it succeeds");
        client.close();
    });
}
