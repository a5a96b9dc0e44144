//! What a client can be told when it is built.

use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::defaults;

use crate::client::Client;
use crate::error::Error;
use crate::observe::{OBSERVERS_MAX, Observer, Observers};
use crate::read::Consistency;
#[cfg(feature = "tls")]
use crate::tls::TlsOptions;
use crate::topology::Address;
use crate::transport::Security;

/// Longer timeouts are cut to this: no call outlives a day.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Calls in flight: several times what saturates a cluster over one connection, at about a kilobyte each.
const CALLS_IN_FLIGHT_MAX: u32 = 65_536;
/// Bytes of requests in flight: what a link of 1 Gbit/s carries in half a second.
const BYTES_IN_FLIGHT_MAX: u32 = 64 << 20;

/// The options of a client.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) call_timeout: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) consistency: Option<Consistency>,
    pub(crate) sessions: bool,
    pub(crate) pipelined: bool,
    pub(crate) monotonic_reads: bool,
    pub(crate) calls_in_flight_max: u32,
    pub(crate) bytes_in_flight_max: u32,
    pub(crate) security: Security,
    pub(crate) observers: Observers,
}

/// Builds a [`Client`].
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
/// # fn main() { run(async |_| {
/// use std::time::Duration;
///
/// # let endpoints: Vec<String> = std::env::var("D_ENGINE_ENDPOINTS").unwrap().split(',').map(Into::into).collect();
/// # /*
/// let endpoints = ["127.0.0.1:9081", "127.0.0.1:9082"];
/// # */
/// let client = d_engine_client::Client::builder()
///     .endpoints(endpoints)
///     .call_timeout(Duration::from_secs(2))
///     .connect()
///     .await?;
/// client.put("greeting", "hello").await?;
/// # Ok(()) }) }
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
                pipelined: true,
                monotonic_reads: false,
                calls_in_flight_max: CALLS_IN_FLIGHT_MAX,
                bytes_in_flight_max: BYTES_IN_FLIGHT_MAX,
                security: Security::default(),
                observers: Observers::default(),
            },
        }
    }

    /// Nodes to start from, each `host:port`, or with `https://` before it if there are TLS options and `http://` if
    /// there are none. One that can be reached is enough: it tells of the others. Adds to those
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

    /// Whether calls share one stream for each connection, many to a message, if the node has that; they do unless this
    /// says otherwise. Without, each call is a gRPC call of its own, at several times the cost: for networks whose
    /// proxies balance, log or limit single calls, or cut streams that last, and for measuring what the stream saves.
    pub fn pipelined(mut self, pipelined: bool) -> Self {
        self.options.pipelined = pipelined;
        self
    }

    /// Whether reads never go back in time, whichever node serves them; they may unless this says so. The client then
    /// keeps the highest revision that an answer or a watch has shown its callers, and reads that name no revision ask
    /// for that one at least. All clones and namespaces of a client share it. An eventual read may then wait for its
    /// node to catch up, or go to another one.
    pub fn monotonic_reads(mut self, monotonic: bool) -> Self {
        self.options.monotonic_reads = monotonic;
        self
    }

    /// Calls in flight at once, at least 1; 65536 unless set. Others wait within their deadline, and fail with
    /// [`ResourceExhausted`](crate::ErrorKind::ResourceExhausted) then, not applied.
    pub fn calls_in_flight_max(mut self, calls: u32) -> Self {
        self.options.calls_in_flight_max = calls.max(1);
        self
    }

    /// Bytes of the requests in flight at once; 64 MiB unless set. Others wait as for
    /// [`calls_in_flight_max`](Self::calls_in_flight_max); a request larger than all of this goes alone.
    pub fn bytes_in_flight_max(mut self, bytes: u32) -> Self {
        self.options.bytes_in_flight_max = bytes;
        self
    }

    /// Speaks TLS with every server, those it learns of included. Unless given, it speaks it with none.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, options: TlsOptions) -> Self {
        self.options.security = Security::new(options);
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
    /// `InvalidArgument`: no endpoint, a malformed one, one whose scheme contradicts the TLS options, TLS options that
    /// do not serve, too many observers, or no runtime.
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
            scheme_agrees(endpoint, self.options.security.is_on()).map_err(invalid)?;
            if !seeds.contains(&seed) {
                seeds.push(seed);
            }
        }
        self.options.security.check().map_err(invalid)?;
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

/// An endpoint that promises more or less than the client keeps is refused rather than reached some other way.
fn scheme_agrees(endpoint: &str, tls: bool) -> Result<(), String> {
    match endpoint.trim().split_once("://") {
        Some(("https", _)) if !tls && cfg!(feature = "tls") => {
            Err(format!("endpoint {endpoint:?} asks for TLS, and there are no TLS options: give some to `tls`"))
        }
        Some(("https", _)) if !tls => {
            Err(format!("endpoint {endpoint:?} asks for TLS, and this client was built without its feature `tls`"))
        }
        Some(("http", _)) if tls => {
            Err(format!("endpoint {endpoint:?} asks for no TLS, and there are TLS options: write https:// or nothing"))
        }
        _ => Ok(()),
    }
}

/// Cuts a timeout to what deadlines can represent.
pub(crate) fn bounded(timeout: Duration) -> Duration {
    timeout.min(TIMEOUT_MAX)
}
