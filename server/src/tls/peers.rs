//! The way out to a peer: TCP, then TLS with what is in force at that moment.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower_service::Service;

use super::Tls;
use super::identity::Identity;

/// Connects to members, who prove by their certificate that they are some: whatever their address, it carries
/// `tls.peer_name`.
#[derive(Clone)]
pub(crate) struct PeerConnector {
    tcp: HttpConnector,
    tls: Arc<Tls>,
}

impl PeerConnector {
    pub(crate) fn new(tls: Arc<Tls>) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        Self { tcp, tls }
    }
}

impl Service<Uri> for PeerConnector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.tcp.call(uri.clone());
        let tls = Arc::clone(&self.tls);
        Box::pin(async move {
            let tcp = connecting.await?.into_inner();
            let stream = tls.connect(tcp).await.inspect_err(|error| {
                let peer = uri.authority().map_or("", |authority| authority.as_str());
                tls.tell(|| tracing::warn!(peer, %error, "no TLS connection to a peer"));
            })?;
            Ok(TokioIo::new(stream))
        })
    }
}

impl Tls {
    async fn connect(&self, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let material = self.in_force.load_full();
        let Some(members) = &material.members else {
            return Err(io::Error::other("this node has no tls.peer_ca_file and tls.peer_name to know its peers by"));
        };
        let connector = TlsConnector::from(Arc::clone(&members.outgoing));
        let stream = connector.connect(members.name.clone(), tcp).await?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).and_then(Identity::of);
        match shown {
            Some(peer) if peer.carries(&members.name.to_str()) => Ok(stream),
            _ => Err(io::Error::other(format!("its certificate does not carry the name {}", members.name.to_str()))),
        }
    }
}
