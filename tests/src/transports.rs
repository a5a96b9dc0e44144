//! The ways by which a client talks to its nodes. What is proven of the client is proven over each.

use d_engine_client::{Client, ClientBuilder};

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Many operations on one stream.
    Pipeline,
    /// A call of its own for every operation.
    Unary,
}

impl Transport {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Pipeline, Self::Unary];

    /// Begins to build a client that talks this way.
    pub fn client(self) -> ClientBuilder {
        Client::builder().pipelined(self == Self::Pipeline)
    }
}
