//! What a client can be told when it is built.

use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::defaults;

use crate::client::Client;
use crate::error::Error;
use crate::observe::{OBSERVERS_MAX, Observer, Observers};
use crate::read::Consistency;
use crate::topology::Address;

/// Longer timeouts are cut to this: no call outlives a day.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The options of a client.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) call_timeout: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) consistency: Option<Consistency>,
    pub(crate) sessions: bool,
    pub(crate) observers: Observers,
}

/// Builds a [`Client`].
///
/// ```no_run
/// # async fn example() -> Result<(), d_engine_client::Error> {
/// use std::time::Duration;
///
/// let client = d_engine_client::Client::builder()
///     .endpoints(["127.0.0.1:9081", "127.0.0.1:9082"])
///     .call_timeout(Duration::from_secs(2))
///     .connect()
///     .await?;
/// client.put("greeting", "hello").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until `build` or `connect`"]
pub struct ClientBuilder {
    endpoints: Vec<String>,
    options: Options,
}

impl ClientBuilder {
    pub(crate) fn new() -> Self {
        Self {
            endpoints: Vec::new(),
            options: Options {
                call_timeout: Duration::from_millis(defaults::CLIENT_CALL_TIMEOUT_MS),
                connect_timeout: Duration::from_millis(defaults::CLIENT_CONNECT_TIMEOUT_MS),
                consistency: None,
                sessions: true,
                observers: Observers::default(),
            },
        }
    }

    /// Nodes to start from, each `host:port`. One that can be reached is enough: it tells of the others. Adds to those
    /// given before.
    pub fn endpoints(mut self, endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.endpoints.extend(endpoints.into_iter().map(Into::into));
        self
    }

    /// Budget of one call, all attempts included; 5 seconds unless set. A day at most.
    pub fn call_timeout(mut self, timeout: Duration) -> Self {
        self.options.call_timeout = bounded(timeout);
        self
    }

    /// Budget of one attempt to connect to a node; 1 second unless set.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.options.connect_timeout = bounded(timeout);
        self
    }

    /// How reads are served that do not say so themselves. Unless set, the server's default policy decides.
    pub fn default_consistency(mut self, consistency: Consistency) -> Self {
        self.options.consistency = Some(consistency);
        self
    }

    /// Whether writes go under a session, so that each is applied once however often it had to be sent; they do unless
    /// this says otherwise. Without, a write is sent again only if it was certainly not applied, and ends with
    /// [`Outcome::Unknown`](crate::Outcome::Unknown) sooner. That saves registering a session: for tools that write
    /// once and end, and for measuring what a session costs.
    pub fn sessions(mut self, sessions: bool) -> Self {
        self.options.sessions = sessions;
        self
    }

    /// Tells `observer` of every call, of its attempts, and of what changes beside them. Up to 8 may be told; adds to
    /// those given before.
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.options.observers.0.push(Arc::new(observer));
        self
    }

    /// Builds the client without waiting for any node. Must be called within a Tokio runtime, which then runs the
    /// client's background work.
    ///
    /// # Errors
    /// `InvalidArgument`: no endpoint, a malformed one, too many observers, or no runtime.
    pub fn build(self) -> Result<Client, Error> {
        let invalid = |message: String| Error::invalid("build", message);
        if self.endpoints.is_empty() {
            return Err(invalid("no endpoint was given".to_owned()));
        }
        if self.options.observers.0.len() > OBSERVERS_MAX {
            return Err(invalid(format!("a client has {OBSERVERS_MAX} observers at most")));
        }
        let mut seeds = Vec::with_capacity(self.endpoints.len());
        for endpoint in &self.endpoints {
            let seed = Address::parse(endpoint).map_err(invalid)?;
            if !seeds.contains(&seed) {
                seeds.push(seed);
            }
        }
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|_| invalid("a client is built within a Tokio runtime, and there is none here".to_owned()))?;
        Ok(Client::start(seeds, self.options, &runtime))
    }

    /// Builds the client and waits until a node has answered, for the call timeout at most.
    ///
    /// # Errors
    /// As [`build`](Self::build); `Unavailable` or `DeadlineExceeded` if no node answers.
    pub async fn connect(self) -> Result<Client, Error> {
        let client = self.build()?;
        client.members().await?;
        Ok(client)
    }
}

/// Cuts a timeout to what deadlines can represent.
pub(crate) fn bounded(timeout: Duration) -> Duration {
    timeout.min(TIMEOUT_MAX)
}
