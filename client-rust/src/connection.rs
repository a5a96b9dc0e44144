//! Connections: one HTTP/2 channel per address, made when first needed.
//!
//! Connecting is a step of its own here, shared by all callers that wait for it. A failure reaches all of them at once,
//! and it is certain that none of their requests was sent.
//!
//! All that runs for a connection is run by the client (`tasks`), so that it ends with it.
//!
//! A connection on which nothing at all was heard for the time of an attempt is given up: the next attempt has a new one.
//! While an answer is overdue the client asks for the members over the same connection, so that only one is silent that
//! leads nowhere, or whose node hangs. There is one in its place at a time, and no faster than attempts run out of time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};

use crate::pipeline::Link;
use crate::retry::Cause;
use crate::tasks::Tasks;
use crate::topology::Address;
use crate::transport::{Connector, Pulse, Security};

/// A silent connection is noticed after interval plus timeout, also while nothing is in flight.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// A page of a range fits, so that it needs no window update on its way.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

type Connecting = Shared<BoxFuture<'static, Result<(Channel, Pulse), Cause>>>;

enum Slot {
    Connecting(u64, Connecting),
    Ready(Arc<Connection>),
}

impl Slot {
    fn generation(&self) -> u64 {
        match self {
            Self::Connecting(generation, _) => *generation,
            Self::Ready(connection) => connection.generation,
        }
    }
}

/// A channel with its pipeline, and which one of its address it is.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) channel: Channel,
    pub(crate) link: Arc<Link>,
    pulse: Pulse,
    generation: u64,
}

impl Connection {
    fn new(channel: Channel, pulse: Pulse, generation: u64) -> Arc<Self> {
        Arc::new(Self { channel, link: Arc::default(), pulse, generation })
    }

    /// To be compared with what is heard later.
    pub(crate) fn heard(&self) -> Heard {
        Heard(self.pulse.beats())
    }
}

/// What had been heard on a connection at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heard(u64);

/// The channels of a client.
pub(crate) struct Connections {
    connect_timeout: Duration,
    security: Security,
    tasks: Tasks,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    by_address: HashMap<Address, Slot>,
    next_generation: u64,
}

impl Connections {
    pub(crate) fn new(connect_timeout: Duration, security: Security, tasks: Tasks) -> Self {
        Self { connect_timeout, security, tasks, slots: Mutex::default() }
    }

    /// The connection to `address`, if there is one.
    pub(crate) fn ready(&self, address: &Address) -> Option<Arc<Connection>> {
        match self.slots.lock().by_address.get(address) {
            Some(Slot::Ready(connection)) => Some(Arc::clone(connection)),
            _ => None,
        }
    }

    /// The connection to `address`, made if there is none.
    pub(crate) async fn get(&self, address: &Address) -> Result<Arc<Connection>, Cause> {
        let (generation, connecting) = {
            let mut slots = self.slots.lock();
            match slots.by_address.get(address) {
                Some(Slot::Ready(connection)) => return Ok(Arc::clone(connection)),
                Some(Slot::Connecting(generation, connecting)) => (*generation, connecting.clone()),
                None => {
                    slots.next_generation += 1;
                    let generation = slots.next_generation;
                    let connecting = self.connect(address);
                    slots.by_address.insert(address.clone(), Slot::Connecting(generation, connecting.clone()));
                    (generation, connecting)
                }
            }
        };
        let connected = connecting.await;
        let mut slots = self.slots.lock();
        match (slots.by_address.get(address), connected) {
            // Somebody else who waited was faster, so that there is one pipeline for all.
            (Some(Slot::Ready(connection)), Ok(_)) if connection.generation == generation => Ok(Arc::clone(connection)),
            (Some(slot), Ok((channel, pulse))) if slot.generation() == generation => {
                let connection = Connection::new(channel, pulse, generation);
                slots.by_address.insert(address.clone(), Slot::Ready(Arc::clone(&connection)));
                Ok(connection)
            }
            // Given up meanwhile; whoever waited may use it nevertheless.
            (_, Ok((channel, pulse))) => Ok(Connection::new(channel, pulse, generation)),
            (slot, Err(cause)) => {
                if slot.is_some_and(|slot| slot.generation() == generation) {
                    slots.by_address.remove(address);
                }
                Err(cause)
            }
        }
    }

    fn connect(&self, address: &Address) -> Connecting {
        let timeout = self.connect_timeout;
        let scheme = if self.security.is_on() { "https" } else { "http" };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"));
        let pulse = Pulse::default();
        let (connector, hearing) = Connector::new(self.security.clone(), timeout, pulse.clone());
        let tasks = self.tasks.clone();
        let connect = async move {
            let endpoint = endpoint
                .map_err(Cause::of)?
                .executor(tasks)
                .connect_timeout(timeout)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                .keep_alive_while_idle(true)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
            let connecting = async {
                let channel = endpoint.connect_with_connector(connector).await.map_err(Cause::of)?;
                hearing.await.unwrap_or_else(|_| Err(Cause::text("the connection ended before the server spoke")))?;
                Ok((channel, pulse))
            };
            match tokio::time::timeout(timeout, connecting).await {
                Ok(connected) => connected,
                Err(_) => Err(Cause::text(format!("no connection within {timeout:?}"))),
            }
        };
        let connecting = self.tasks.spawn_until_closed(connect);
        // Without a task, the client is closed or its runtime has ended.
        let gone = || Cause::text("the client was closed");
        async move { connecting.await.ok().flatten().unwrap_or_else(|| Err(gone())) }.boxed().shared()
    }

    /// Gives up a connection that broke; the next request makes a new one. This one ends once what is in flight has.
    pub(crate) fn discard(&self, address: &Address, connection: &Connection) {
        {
            let mut slots = self.slots.lock();
            if slots.by_address.get(address).is_some_and(|slot| slot.generation() == connection.generation) {
                slots.by_address.remove(address);
            }
        }
        connection.link.drain();
    }

    /// Closes the connections to all addresses that `keep` denies.
    pub(crate) fn retain(&self, keep: impl Fn(&Address) -> bool) {
        let given_up: Vec<_> = self.slots.lock().by_address.extract_if(|address, _| !keep(address)).collect();
        for (_, slot) in given_up {
            if let Slot::Ready(connection) = slot {
                connection.link.drain();
            }
        }
    }
}
