//! Who a caller is, by the certificate it showed.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// The other end of a connection; among the extensions of every request on it.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// From where it comes.
    pub(crate) address: Option<SocketAddr>,
    /// What its certificate says. `None` without TLS, or without a certificate.
    pub(crate) identity: Option<Arc<Identity>>,
}

/// What a verified certificate says of its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The subject, as RFC 4514 writes it: `CN=reader,O=example`.
    pub(crate) subject: String,
    /// The DNS names and URIs among the subject's alternative names.
    pub(crate) names: Vec<String>,
    /// Whether it is a member of this cluster: the certificate comes from `tls.peer_ca_file` and carries
    /// `tls.peer_name`.
    pub(crate) is_member: bool,
}

impl Identity {
    /// Reads a certificate, of which nothing is known yet but what it says. `None` if it cannot be read.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = Certificate::from_der(certificate).ok()?.tbs_certificate;
        let alternative = certificate.get::<SubjectAltName>().ok()?.map(|(_, SubjectAltName(names))| names);
        let names = alternative.unwrap_or_default().into_iter().filter_map(|name| match name {
            GeneralName::DnsName(name) | GeneralName::UniformResourceIdentifier(name) => Some(name.to_string()),
            _ => None,
        });
        Some(Self { subject: certificate.subject.to_string(), names: names.collect(), is_member: false })
    }

    /// Whether `name` is among its names, letter by letter: a wildcard carries no name of a member.
    pub(super) fn carries(&self, name: &str) -> bool {
        self.names.iter().any(|own| own.eq_ignore_ascii_case(name))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the certificate {:?} for {}", self.subject, self.names.join(", "))
    }
}
