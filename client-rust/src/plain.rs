//! Stands in for `tls` in a client that was built without it: connections as they are.

use std::io;

use tokio::net::TcpStream;

use crate::transport::Io;

/// None at all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Security;

impl Security {
    pub(crate) fn is_on(&self) -> bool {
        false
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        Ok(())
    }

    pub(crate) async fn secure(&self, tcp: TcpStream, _host: &str) -> io::Result<Box<dyn Io>> {
        Ok(Box::new(tcp))
    }

    pub(crate) fn explain(&self, error: &io::Error) -> String {
        error.to_string()
    }
}
