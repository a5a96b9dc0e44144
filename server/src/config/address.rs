//! Network addresses as people write them: host:port, the host a name or a number.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// A host and a port, taken apart. Displays as it would be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    host: String,
    port: u16,
}

impl Address {
    /// Takes `text` apart, or says what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            return Err(format!("`{text}` has a scheme, which is not part of an address"));
        }
        let Some((host, port)) = text.rsplit_once(':') else { return Err(format!("`{text}` has no port")) };
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(inner) => {
                inner.parse::<Ipv6Addr>().map_err(|_| format!("`{inner}` in `{text}` is not an IPv6 address"))?;
                host
            }
            None if host.contains(':') => return Err(format!("the IPv6 address in `{text}` needs brackets")),
            None if host.is_empty() => return Err(format!("`{text}` has no host")),
            None if !host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte)) => {
                return Err(format!("`{host}` in `{text}` is neither a name nor a number"));
            }
            None => host,
        };
        match port.parse() {
            Ok(port) if port > 0 => Ok(Self { host: host.to_ascii_lowercase(), port }),
            _ => Err(format!("`{port}` in `{text}` is not a port from 1 to 65535")),
        }
    }

    /// Whether it stands for every address of the machine, so that nobody could be told to connect to it.
    pub(super) fn is_wildcard(&self) -> bool {
        let host = self.host.trim_matches(['[', ']']);
        host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified())
    }

    /// This address, or the loopback of its kind if it is a wildcard.
    pub(super) fn reachable(&self) -> Self {
        let host = match (self.is_wildcard(), self.host.starts_with('[')) {
            (false, _) => self.host.clone(),
            (true, false) => "127.0.0.1".to_owned(),
            (true, true) => "[::1]".to_owned(),
        };
        Self { host, port: self.port }
    }

    /// Whether two listeners cannot have both.
    pub(super) fn collides_with(&self, other: &Self) -> bool {
        self.port == other.port && (self.host == other.host || self.is_wildcard() || other.is_wildcard())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}
