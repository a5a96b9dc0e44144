//! TLS to the servers: what a user says of it, and a connection made secure by it.
//!
//! Files are read again for every connection, so that renewed certificates come into force by themselves. Sessions are
//! never resumed, since that would spare a certificate its next check.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS13;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::transport::Io;

/// How a client knows its servers, and what it shows of itself.
///
/// ```no_run
/// # async fn example() -> Result<(), d_engine_client::Error> {
/// use d_engine_client::{Client, TlsOptions};
///
/// let tls = TlsOptions::new().ca_file("ca.pem").identity_files("reader.pem", "reader.key");
/// let client = Client::builder().endpoints(["https://n1.example.org:9081"]).tls(tls).connect().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until they are given to a builder"]
pub struct TlsOptions {
    ca: Option<Pem>,
    identity: Option<(Pem, Pem)>,
    server_name: Option<String>,
}

impl TlsOptions {
    /// No CA yet, and no identity. A CA has to be named: those of the platform count for nothing here.
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts servers whose certificate comes from a CA in this PEM file. It is read for every connection.
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca = Some(Pem::File(path.into()));
        self
    }

    /// Trusts servers whose certificate comes from a CA in this PEM text.
    pub fn ca_pem(mut self, pem: impl Into<Bytes>) -> Self {
        self.ca = Some(Pem::Text(pem.into()));
        self
    }

    /// Shows this certificate, with its private key; both PEM files, read for every connection.
    pub fn identity_files(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.identity = Some((Pem::File(certificate.into()), Pem::File(key.into())));
        self
    }

    /// Shows this certificate, with its private key; both PEM texts.
    pub fn identity_pem(mut self, certificate: impl Into<Bytes>, key: impl Into<Bytes>) -> Self {
        self.identity = Some((Pem::Text(certificate.into()), Pem::Text(key.into())));
        self
    }

    /// Expects this DNS name or IP address in the certificate of every server, instead of the host it is reached at.
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Reads everything, and says what does not serve. May wait for the disk.
    pub(crate) fn config(&self) -> Result<ClientConfig, String> {
        let ca = self.ca.as_ref().ok_or("the TLS options lack a CA: name one with ca_file or ca_pem")?;
        let mut roots = RootCertStore::empty();
        for certificate in ca.certificates()? {
            roots.add(certificate).map_err(|error| format!("{ca} holds no certificate to trust: {error}"))?;
        }
        if let Some(name) = &self.server_name {
            ServerName::try_from(name.as_str()).map_err(|_| format!("{name:?} is no server name"))?;
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder
                .with_client_auth_cert(certificate.certificates()?, key.private_key()?)
                .map_err(|error| format!("{certificate} and {key} do not serve as an identity: {error}"))?,
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// A PEM text and where it is. Shown without what it says: that may be a key.
#[derive(Clone)]
enum Pem {
    File(PathBuf),
    Text(Bytes),
}

impl Pem {
    fn read(&self) -> Result<Bytes, String> {
        match self {
            Self::File(path) => {
                std::fs::read(path).map(Bytes::from).map_err(|error| format!("cannot read {self}: {error}"))
            }
            Self::Text(text) => Ok(text.clone()),
        }
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.read()?).collect();
        match read {
            Ok(certificates) if !certificates.is_empty() => Ok(certificates),
            Ok(_) => Err(format!("there is no certificate in {self}; name a PEM file that has one")),
            Err(error) => Err(format!("{self} cannot be read as PEM: {error}")),
        }
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, String> {
        PrivateKeyDer::from_pem_slice(&self.read()?)
            .map_err(|error| format!("there is no private key to be read in {self}: {error}"))
    }
}

impl fmt::Display for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Text(_) => f.write_str("the PEM text"),
        }
    }
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether connections are made secure, and how.
#[derive(Clone, Debug, Default)]
pub(crate) struct Security(Option<Arc<TlsOptions>>);

impl Security {
    pub(crate) fn new(options: TlsOptions) -> Self {
        Self(Some(Arc::new(options)))
    }

    /// Says what does not serve, before anybody connects.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.0.as_ref().map_or(Ok(()), |options| options.config().map(drop))
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Speaks TLS on a connection to `host`, if it was asked for.
    pub(crate) async fn secure(&self, tcp: TcpStream, host: &str) -> io::Result<Box<dyn Io>> {
        let Some(options) = self.0.clone() else { return Ok(Box::new(tcp)) };
        let name = options.server_name.clone().unwrap_or_else(|| host.trim_matches(['[', ']']).to_owned());
        let name = ServerName::try_from(name).map_err(io::Error::other)?;
        let config = tokio::task::spawn_blocking(move || options.config()).await.map_err(io::Error::other)?;
        let connector = TlsConnector::from(Arc::new(config.map_err(io::Error::other)?));
        match connector.connect(name, tcp).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(io::Error::other(explain(&error))),
        }
    }

    /// What went wrong on a connection, for people.
    pub(crate) fn explain(&self, error: &io::Error) -> String {
        if self.is_on() { explain(error) } else { error.to_string() }
    }
}

/// Why there is no TLS connection, and what can be done.
fn explain(error: &io::Error) -> String {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                format!("the server ended the connection during the TLS handshake ({error}): does it speak TLS there?")
            }
            _ => error.to_string(),
        };
    };
    match tls {
        rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => {
            "the server does not speak TLS: turn it on there, or leave the client's TLS options out".to_owned()
        }
        rustls::Error::InvalidCertificate(problem) => match problem {
            // A CA of the same name as the right one is noticed by the signature only.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "the server's certificate comes from an unknown issuer: it is not of the CA in the client's TLS options"
                    .to_owned()
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("the server's certificate has expired: renew it ({problem})")
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => format!(
                "the server's certificate is for another name: reach it by one it carries, or set the server name in the TLS options \
                 ({problem})"
            ),
            _ => format!("the server's certificate is refused: {problem}"),
        },
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => {
                "the server asks for a client certificate: give one in the client's TLS options".to_owned()
            }
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "the server refuses the client certificate: it comes from an unknown issuer".to_owned()
            }
            AlertDescription::CertificateExpired => {
                "the server refuses the client certificate: it has expired, renew it".to_owned()
            }
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied => format!("the server refuses the client certificate: {alert:?}"),
            _ => format!("the server ends the TLS handshake: {alert:?}"),
        },
        _ => format!("the TLS handshake fails: {tls}"),
    }
}
