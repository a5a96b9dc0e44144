//! TLS of the port that clients and members share: the certificates in force, and who a caller is by its own.
//!
//! ```text
//! files ── Material::load ──► in force ──┬─► accept: clients and members come in, with an Identity or without
//!              ▲                         └─► PeerConnector: this node goes out to its peers
//!              └── keep_fresh, when the files changed and make sense
//! ```
//!
//! Every handshake takes what is in force at its beginning; connections that exist go on. Sessions are never resumed,
//! since that would spare a certificate its next check.
//!
//! It knows nothing of gRPC, and reads nothing but the files the configuration names. Certificates are judged by the
//! wall clock, the only thing here that is.

mod identity;
mod material;
mod peers;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::MissedTickBehavior;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

pub(crate) use identity::{Caller, Identity};
pub use material::TlsError;
pub(crate) use peers::PeerConnector;

use crate::clock::Moment;
use crate::config::TlsConfig;
use crate::limits::{TLS_ALERT_TIME_MAX, TLS_HANDSHAKE_TIME_MAX, TLS_LOG_PAUSE};
use crate::metrics::Metrics;
use material::{Contents, Material};

/// The TLS of one node.
pub struct Tls {
    config: TlsConfig,
    in_force: ArcSwap<Material>,
    metrics: Arc<Metrics>,
    last_line: Mutex<Option<Moment>>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads and checks the files. Reads from the disk; for a thread that may wait.
    ///
    /// # Errors
    /// The first file that does not serve, with the key that names it and what to do.
    pub(crate) fn load(config: TlsConfig, metrics: Arc<Metrics>) -> Result<Arc<Self>, TlsError> {
        let material = Material::make(Contents::read(&config)?, &config)?;
        metrics.tls_certificate(material.expiry_seconds);
        material::warn_of_readable_key(&config);
        Ok(Arc::new(Self { config, in_force: ArcSwap::from_pointee(material), metrics, last_line: Mutex::default() }))
    }

    /// Takes over changed files, for ever. Files that do not serve are told of and change nothing.
    pub(crate) async fn keep_fresh(self: Arc<Self>) {
        let mut pace = tokio::time::interval(self.config.reload_interval);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Told of once for each change, not at every look.
        let mut last_failure = None;
        loop {
            pace.tick().await;
            let tls = Arc::clone(&self);
            let looked = match tokio::task::spawn_blocking(move || tls.look()).await {
                Ok(looked) => looked,
                Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
                // The runtime ends.
                Err(_) => continue,
            };
            match looked {
                Ok(None) => last_failure = None,
                Ok(Some(material)) => {
                    self.metrics.tls_reloaded();
                    self.metrics.tls_certificate(material.expiry_seconds);
                    tracing::info!(until = material.expiry, "new certificates are in force");
                    self.in_force.store(Arc::new(material));
                    material::warn_of_readable_key(&self.config);
                    last_failure = None;
                }
                Err(error) => {
                    let failure = Some(error.to_string());
                    if failure != last_failure {
                        self.metrics.tls_reload_failed();
                        tracing::warn!(%error, "the changed certificates are not taken; the old ones stay in force");
                        last_failure = failure;
                    }
                }
            }
        }
    }

    /// What became of the files, if they changed.
    fn look(&self) -> Result<Option<Material>, TlsError> {
        let contents = Contents::read(&self.config)?;
        if contents == self.in_force.load().contents {
            return Ok(None);
        }
        Material::make(contents, &self.config).map(Some)
    }

    /// Makes an accepted connection a TLS connection, or refuses it, within [`TLS_HANDSHAKE_TIME_MAX`]. The identity is
    /// that of a verified certificate, if one was shown.
    pub(crate) async fn accept(
        &self,
        tcp: TcpStream,
        from: Option<SocketAddr>,
    ) -> Option<(TlsStream<TcpStream>, Option<Arc<Identity>>)> {
        let material = self.in_force.load_full();
        let handshake = TlsAcceptor::from(Arc::clone(&material.server)).accept(tcp).into_fallible();
        match tokio::time::timeout(TLS_HANDSHAKE_TIME_MAX, handshake).await {
            Ok(Ok(stream)) => {
                let shown = stream.get_ref().1.peer_certificates();
                let identity = shown.and_then(|chain| material.identify(chain)).map(Arc::new);
                Some((stream, identity))
            }
            Ok(Err((error, tcp))) => {
                self.refused(from, &reason(&error));
                let_alert_arrive(tcp).await;
                None
            }
            Err(_) => {
                self.refused(from, &format!("no TLS handshake within {TLS_HANDSHAKE_TIME_MAX:?}"));
                None
            }
        }
    }

    /// Refuses whoever is no member of this cluster by its certificate.
    ///
    /// # Errors
    /// Why, for the caller; it is logged as well.
    pub(crate) fn admit_member(&self, caller: Option<&Caller>) -> Result<(), String> {
        let identity = caller.and_then(|caller| caller.identity.as_deref());
        if identity.is_some_and(|identity| identity.is_member) {
            return Ok(());
        }
        let shown = identity.map_or_else(|| "no certificate".to_owned(), |identity| identity.to_string());
        let needed = match &self.config.peer_name {
            Some(name) => format!("a certificate that tls.peer_ca_file issued for the name {name}"),
            None => "tls.peer_ca_file and tls.peer_name, which this node lacks".to_owned(),
        };
        let problem = format!("a call between members needs {needed}, and the caller shows {shown}");
        self.refused(caller.and_then(|caller| caller.address), &problem);
        Err(problem)
    }

    /// Counts and tells that somebody was not let in.
    fn refused(&self, from: Option<SocketAddr>, problem: &str) {
        self.metrics.tls_refused();
        let from = from.map_or_else(|| "unknown".to_owned(), |from| from.to_string());
        self.tell(|| tracing::warn!(from, problem, "refused"));
    }

    /// Lets a line into the log unless one was there just before: whoever is refused comes again and again.
    fn tell(&self, line: impl FnOnce()) {
        let now = Moment::now();
        let mut last = self.last_line.lock();
        if last.is_none_or(|last| now.since(last) >= TLS_LOG_PAUSE) {
            *last = Some(now);
            line();
        }
    }
}

/// Why a handshake failed, for people.
fn reason(error: &io::Error) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)) => {
            "it does not speak TLS, and this port speaks nothing else; use TLS in the client".to_owned()
        }
        Some(rustls::Error::InvalidCertificate(error)) => format!("its certificate is refused: {error}"),
        Some(rustls::Error::NoCertificatesPresented) => {
            "it shows no certificate, and tls.client_auth is \"required\"".to_owned()
        }
        Some(rustls::Error::AlertReceived(alert)) => format!("it refuses this node's certificate: {alert:?}"),
        _ => format!("the TLS handshake fails: {error}"),
    }
}

/// Closes so that the last words arrive: a connection that is dropped with bytes unread takes back what it sent.
async fn let_alert_arrive(mut tcp: TcpStream) {
    let rest = async {
        tcp.shutdown().await?;
        let mut unread = [0; 1024];
        while tcp.read(&mut unread).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    let _ = tokio::time::timeout(TLS_ALERT_TIME_MAX, rest).await;
}
