//! Connections: one HTTP/2 channel per address, made when first needed.
//!
//! Connecting is a step of its own here, shared by all callers that wait for it. A failure reaches all of them at once,
//! and it is certain that none of their requests was sent.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};

use crate::retry::Cause;
use crate::topology::Address;
use crate::transport::{Connector, Security};

/// A silent connection is noticed after interval plus timeout, also while nothing is in flight.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// A page of a range fits, so that it needs no window update on its way.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

type Connecting = Shared<BoxFuture<'static, Result<Channel, Cause>>>;

enum Slot {
    Connecting(Connecting),
    Ready(Channel),
}

/// A channel, and which one of its address it is.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    pub(crate) channel: Channel,
    generation: u64,
}

/// The channels of a client.
pub(crate) struct Connections {
    connect_timeout: Duration,
    security: Security,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    by_address: HashMap<Address, (u64, Slot)>,
    next_generation: u64,
}

impl Connections {
    pub(crate) fn new(connect_timeout: Duration, security: Security) -> Self {
        Self { connect_timeout, security, slots: Mutex::default() }
    }

    /// The connection to `address`, made if there is none.
    pub(crate) async fn get(&self, address: &Address) -> Result<Connection, Cause> {
        let (generation, connecting) = {
            let mut slots = self.slots.lock();
            match slots.by_address.get(address) {
                Some((generation, Slot::Ready(channel))) => {
                    return Ok(Connection { channel: channel.clone(), generation: *generation });
                }
                Some((generation, Slot::Connecting(connecting))) => (*generation, connecting.clone()),
                None => {
                    slots.next_generation += 1;
                    let generation = slots.next_generation;
                    let connecting = self.connect(address);
                    let slot = Slot::Connecting(connecting.clone());
                    slots.by_address.insert(address.clone(), (generation, slot));
                    (generation, connecting)
                }
            }
        };
        let connected = connecting.await;
        let mut slots = self.slots.lock();
        if let Some((current, slot)) = slots.by_address.get_mut(address)
            && *current == generation
        {
            match &connected {
                Ok(channel) => *slot = Slot::Ready(channel.clone()),
                Err(_) => drop(slots.by_address.remove(address)),
            }
        }
        connected.map(|channel| Connection { channel, generation })
    }

    fn connect(&self, address: &Address) -> Connecting {
        let timeout = self.connect_timeout;
        let scheme = if self.security.is_on() { "https" } else { "http" };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"));
        let (connector, hearing) = Connector::new(self.security.clone(), timeout);
        async move {
            let endpoint = endpoint
                .map_err(Cause::of)?
                .connect_timeout(timeout)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                .keep_alive_while_idle(true)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
            let connecting = async {
                let channel = endpoint.connect_with_connector(connector).await.map_err(Cause::of)?;
                hearing.await.unwrap_or_else(|_| Err(Cause::text("the connection ended before the server spoke")))?;
                Ok(channel)
            };
            match tokio::time::timeout(timeout, connecting).await {
                Ok(connected) => connected,
                Err(_) => Err(Cause::text(format!("no connection within {timeout:?}"))),
            }
        }
        .boxed()
        .shared()
    }

    /// Gives up a connection that broke; the next request makes a new one.
    pub(crate) fn discard(&self, address: &Address, connection: &Connection) {
        let mut slots = self.slots.lock();
        if slots.by_address.get(address).is_some_and(|(current, _)| *current == connection.generation) {
            slots.by_address.remove(address);
        }
    }

    /// Closes the connections to all addresses that `keep` denies.
    pub(crate) fn retain(&self, keep: impl Fn(&Address) -> bool) {
        self.slots.lock().by_address.retain(|address, _| keep(address));
    }
}
