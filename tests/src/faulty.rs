//! The fault points of a node in a process of its own, `d-engine-faulty`: arms them, and counts how often each was
//! reached, also by calls that were never answered and by nodes that died of it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::wait;

/// See the module's description. One run of one node.
#[derive(Debug)]
pub struct FaultPoints {
    orders: ChildStdin,
    obeyed: mpsc::Receiver<()>,
    reached: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl FaultPoints {
    pub(crate) fn new(orders: ChildStdin, output: ChildStdout) -> Self {
        let reached = Arc::new(Mutex::new(BTreeMap::<String, usize>::new()));
        let counts = Arc::clone(&reached);
        let (obey, obeyed) = mpsc::channel(64);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                match line.strip_prefix("reached ") {
                    Some(point) => {
                        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
                        *counts.entry(point.to_owned()).or_default() += 1;
                    }
                    None => {
                        if obey.blocking_send(()).is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Self { orders, obeyed, reached }
    }

    /// Has the next `times` calls that reach `point` meet with `action`; returns once it is so.
    ///
    /// # Panics
    /// When the node has ended, or does not know the point or the action.
    pub async fn arm(&mut self, point: &str, times: u32, action: &str) {
        let order = writeln!(self.orders, "arm {point} {times} {action}").and_then(|()| self.orders.flush());
        order.expect("the node takes orders");
        let obeyed = tokio::time::timeout(wait::PATIENCE, self.obeyed.recv()).await;
        obeyed.expect("the node obeys").expect("the node lives");
    }

    /// Disarms `point`. What was reached before is counted when this returns.
    pub async fn disarm(&mut self, point: &str) {
        self.arm(point, 0, "never").await;
    }

    /// Waits until everything was heard that a node had to say that has died.
    ///
    /// # Panics
    /// When it lives.
    pub async fn hear_out(&mut self) {
        let heard = async { while self.obeyed.recv().await.is_some() {} };
        tokio::time::timeout(wait::PATIENCE, heard).await.expect("the node has died");
    }

    /// How often `point` was reached.
    #[must_use]
    pub fn reached(&self, point: &str) -> usize {
        let reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        reached.get(point).copied().unwrap_or_default()
    }
}
