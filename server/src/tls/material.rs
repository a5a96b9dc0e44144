//! What the files hold, read and checked as a whole: a certificate without its key, or one that the peers would refuse,
//! never comes into force.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::identity::Identity;
use crate::config::{ClientAuth, TlsConfig};

const CERT_FILE: &str = "tls.cert_file";
const KEY_FILE: &str = "tls.key_file";
const CLIENT_CA_FILE: &str = "tls.client_ca_file";
const PEER_CA_FILE: &str = "tls.peer_ca_file";

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{key} = {}: {problem}; {remedy}", path.display())]
pub struct TlsError {
    /// The key of the configuration that names the file.
    pub key: &'static str,
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub problem: String,
    /// What would be valid.
    pub remedy: &'static str,
}

/// The files, as they are.
#[derive(PartialEq, Eq)]
pub(super) struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
    peer_ca: Option<Vec<u8>>,
}

impl Contents {
    pub(super) fn read(config: &TlsConfig) -> Result<Self, TlsError> {
        let read = |key: &'static str, path: &Option<PathBuf>| match path {
            None => Ok(None),
            Some(path) => std::fs::read(path).map(Some).map_err(|error| TlsError {
                key,
                path: path.clone(),
                problem: format!("cannot be read: {error}"),
                remedy: "name a PEM file that this user may read",
            }),
        };
        Ok(Self {
            certificate: read(CERT_FILE, &config.cert_file)?.unwrap_or_default(),
            key: read(KEY_FILE, &config.key_file)?.unwrap_or_default(),
            client_ca: read(CLIENT_CA_FILE, &config.client_ca_file)?,
            peer_ca: read(PEER_CA_FILE, &config.peer_ca_file)?,
        })
    }
}

/// What can come into force.
pub(super) struct Material {
    pub(super) contents: Contents,
    /// For connections that come in.
    pub(super) server: Arc<ServerConfig>,
    /// For connections to members and from them.
    pub(super) members: Option<Members>,
    /// When the certificate expires, for people and in seconds since 1970.
    pub(super) expiry: String,
    pub(super) expiry_seconds: u64,
}

/// How members know each other.
pub(super) struct Members {
    pub(super) outgoing: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
    incoming: Arc<dyn ClientCertVerifier>,
}

impl Material {
    pub(super) fn make(contents: Contents, config: &TlsConfig) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = certified_key(&contents, config, &provider)?;
        let (expiry, expiry_seconds) = expiry(&key, config)?;
        let client_roots = contents.client_ca.as_deref().map(|pem| roots(pem, CLIENT_CA_FILE, &config.client_ca_file));
        let client_roots = client_roots.transpose()?;
        let members = match (&contents.peer_ca, &config.peer_name) {
            (Some(pem), Some(name)) => {
                let roots = roots(pem, PEER_CA_FILE, &config.peer_ca_file)?;
                Some((members(&roots, name, &key, config, &provider)?, roots))
            }
            _ => None,
        };

        let mut shown_by = RootCertStore::empty();
        shown_by.roots.extend(client_roots.into_iter().flat_map(|roots| roots.roots));
        if let Some((_, roots)) = &members {
            shown_by.roots.extend(roots.roots.iter().cloned());
        }
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| wrong(CERT_FILE, &config.cert_file, error.to_string(), FRESH))?;
        let builder = if shown_by.is_empty() {
            builder.with_no_client_auth()
        } else {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(shown_by), provider);
            let verifier =
                if config.client_auth() == ClientAuth::Required { verifier } else { verifier.allow_unauthenticated() };
            let verifier = verifier
                .build()
                .map_err(|error| wrong(CLIENT_CA_FILE, &config.client_ca_file, error.to_string(), FRESH))?;
            builder.with_client_cert_verifier(verifier)
        };
        let mut server = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let members = members.map(|(members, _)| members);
        Ok(Self { contents, server: Arc::new(server), members, expiry, expiry_seconds })
    }

    /// Who shows this chain, which the handshake has verified.
    pub(super) fn identify(&self, chain: &[CertificateDer<'_>]) -> Option<Identity> {
        let (leaf, intermediates) = chain.split_first()?;
        let mut identity = Identity::of(leaf)?;
        identity.is_member = self.members.as_ref().is_some_and(|members| {
            // The handshake takes a client's issuer as well.
            let issued = members.incoming.verify_client_cert(leaf, intermediates, UnixTime::now()).is_ok();
            issued && identity.carries(&members.name.to_str())
        });
        Some(identity)
    }
}

const FRESH: &str = "make the certificates anew, as docs/tls.md shows";

fn wrong(key: &'static str, path: &Option<PathBuf>, problem: String, remedy: &'static str) -> TlsError {
    TlsError { key, path: path.clone().unwrap_or_default(), problem, remedy }
}

fn certificates(
    pem: &[u8],
    key: &'static str,
    path: &Option<PathBuf>,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let remedy = "name a PEM file that begins with -----BEGIN CERTIFICATE-----";
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(wrong(key, path, "there is no certificate in it".to_owned(), remedy)),
        Err(error) => Err(wrong(key, path, format!("it cannot be read as PEM: {error}"), remedy)),
    }
}

fn roots(pem: &[u8], key: &'static str, path: &Option<PathBuf>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem, key, path)? {
        roots.add(certificate).map_err(|error| wrong(key, path, format!("no certificate to trust: {error}"), FRESH))?;
    }
    Ok(roots)
}

fn certified_key(
    contents: &Contents,
    config: &TlsConfig,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, TlsError> {
    let chain = certificates(&contents.certificate, CERT_FILE, &config.cert_file)?;
    let no_key = |problem| {
        let remedy = "name the PEM file with the private key that belongs to tls.cert_file";
        wrong(KEY_FILE, &config.key_file, problem, remedy)
    };
    let key = PrivateKeyDer::from_pem_slice(&contents.key)
        .map_err(|error| no_key(format!("there is no private key to be read in it: {error}")))?;
    CertifiedKey::from_der(chain, key, provider).map(Arc::new).map_err(|error| {
        no_key(match error {
            rustls::Error::InconsistentKeys(_) => "it is not the key of tls.cert_file".to_owned(),
            error => error.to_string(),
        })
    })
}

/// When the certificate expires; one that has is refused.
fn expiry(key: &CertifiedKey, config: &TlsConfig) -> Result<(String, u64), TlsError> {
    let leaf = key.cert.first().and_then(|leaf| Certificate::from_der(leaf).ok());
    let Some(leaf) = leaf else {
        return Err(wrong(CERT_FILE, &config.cert_file, "it is no X.509 certificate".to_owned(), FRESH));
    };
    let expiry = leaf.tbs_certificate.validity.not_after;
    let seconds = expiry.to_unix_duration().as_secs();
    let shown = expiry.to_date_time().to_string();
    if seconds < UnixTime::now().as_secs() {
        return Err(wrong(CERT_FILE, &config.cert_file, format!("it expired at {shown}"), FRESH));
    }
    Ok((shown, seconds))
}

/// The way of members with each other, for a node that is one by its own certificate.
fn members(
    roots: &RootCertStore,
    peer_name: &str,
    key: &Arc<CertifiedKey>,
    config: &TlsConfig,
    provider: &Arc<CryptoProvider>,
) -> Result<Members, TlsError> {
    let unfit = |problem: String| {
        let remedy = "every member needs a certificate that tls.peer_ca_file issued for the name tls.peer_name, with \
                      the usages server and client authentication";
        wrong(CERT_FILE, &config.cert_file, problem, remedy)
    };
    let untrusted = |problem: String| wrong(PEER_CA_FILE, &config.peer_ca_file, problem, FRESH);
    let name = ServerName::try_from(peer_name.to_owned()).map_err(|error| unfit(error.to_string()))?;
    let roots = Arc::new(roots.clone());
    let incoming = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(provider));
    let incoming = incoming.build().map_err(|error| untrusted(error.to_string()))?;
    let outgoing = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(provider));
    let outgoing = outgoing.build().map_err(|error| untrusted(error.to_string()))?;

    let (leaf, intermediates) = key.cert.split_first().ok_or_else(|| unfit("it is empty".to_owned()))?;
    let now = UnixTime::now();
    outgoing
        .verify_server_cert(leaf, intermediates, &name, &[], now)
        .map(drop)
        .and_then(|()| incoming.verify_client_cert(leaf, intermediates, now).map(drop))
        .map_err(|error| unfit(format!("peers would refuse it: {error}")))?;
    if !Identity::of(leaf).is_some_and(|own| own.carries(peer_name)) {
        return Err(unfit(format!("peers would refuse it: {peer_name} is not among its names")));
    }

    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unfit(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(outgoing)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(key))));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Members { outgoing: Arc::new(config), name, incoming })
}

/// A private key that others can read is as good as theirs.
pub(super) fn warn_of_readable_key(config: &TlsConfig) {
    use std::os::unix::fs::PermissionsExt;
    const OTHERS: u32 = 0o004;
    let readable = |path: &Path| std::fs::metadata(path).is_ok_and(|file| file.permissions().mode() & OTHERS != 0);
    if let Some(path) = config.key_file.as_deref().filter(|path| readable(path)) {
        tracing::warn!("{KEY_FILE} = {}: every user of this machine can read it; chmod 600", path.display());
    }
}
