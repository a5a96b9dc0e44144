//! A job queue as a replicated state machine: jobs are added, taken by a worker for a while, and done. Every member
//! holds the same queue, because every member applies the same commands in the same order.
//!
//! [`queue`] is the domain and knows nothing of replication; [`machine`] makes a
//! [`StateMachine`](d_engine::prelude::StateMachine) of it: commands in, answers out, a file that survives the process.

pub mod machine;
pub mod queue;

pub use machine::JobQueue;
pub use queue::{Answer, Command, Question};
