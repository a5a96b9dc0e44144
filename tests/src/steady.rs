//! A client that goes on working at the leader while something is done to the cluster, and accepts no failure: every
//! call succeeds, and no lease read is older than what was acknowledged before it began.

use std::time::Duration;

use d_engine_proto::v1::Consistency;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::direct::DirectNode;
use crate::wait;

const KEY: &str = "steady";
/// Pause between the calls of one task, so that what is done to the cluster gets its share of the machine.
const PACE: Duration = Duration::from_millis(2);

/// Writes and lease reads that never stop. Ended by [`finish`](Self::finish); dropping it ends them too.
#[derive(Debug)]
pub struct Steady {
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    written: watch::Receiver<u64>,
    read: watch::Receiver<u64>,
}

impl Steady {
    /// Starts at `leader` and waits until the first calls have succeeded.
    pub async fn start(leader: DirectNode) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (writes, written) = watch::channel(0);
        let (reads, read) = watch::channel(0);
        let mut tasks = JoinSet::new();
        tasks.spawn(write(leader.clone(), stopped.clone(), writes));
        tasks.spawn(read_back(leader, stopped, reads, written.clone()));
        let mut steady = Self { tasks, stop, written, read };
        steady.go_on(1).await;
        steady
    }

    /// Waits until `count` more writes and `count` more reads have succeeded.
    ///
    /// # Panics
    /// When any has failed since the start.
    pub async fn go_on(&mut self, count: u64) {
        for progress in [&mut self.written, &mut self.read] {
            let enough = *progress.borrow() + count;
            let waited = tokio::time::timeout(wait::PATIENCE, progress.wait_for(|done| *done >= enough)).await;
            match waited {
                Ok(Ok(_)) => {}
                Ok(Err(_)) => join(&mut self.tasks).await,
                Err(_) => panic!("{count} calls did not succeed within {:?}", wait::PATIENCE),
            }
        }
    }

    /// Stops, and answers how many writes were acknowledged; the key holds that number then.
    ///
    /// # Panics
    /// When any call has failed.
    pub async fn finish(mut self) -> u64 {
        self.stop.send_replace(true);
        join(&mut self.tasks).await;
        *self.written.borrow()
    }
}

/// The number that `node` holds as the last write, read linearizably.
///
/// # Panics
/// When it does not answer, or with something else.
pub async fn last_write(node: &DirectNode) -> u64 {
    let response = wait::until("a linearizable read", wait::PATIENCE, || async {
        node.get(KEY, Consistency::Linearizable, 0).await.ok()
    })
    .await;
    number(&response.kv.expect("the key was written").value)
}

async fn join(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        ended.expect("every call succeeds");
    }
}

async fn write(node: DirectNode, stopped: watch::Receiver<bool>, acknowledged: watch::Sender<u64>) {
    let mut pace = tokio::time::interval(PACE);
    for next in 1.. {
        if *stopped.borrow() {
            return;
        }
        pace.tick().await;
        node.put(KEY, &next.to_string()).await.expect("a write succeeds");
        acknowledged.send_replace(next);
    }
}

async fn read_back(
    node: DirectNode,
    stopped: watch::Receiver<bool>,
    done: watch::Sender<u64>,
    acknowledged: watch::Receiver<u64>,
) {
    let mut pace = tokio::time::interval(PACE);
    while !*stopped.borrow() {
        pace.tick().await;
        let before = *acknowledged.borrow();
        let response = node.get(KEY, Consistency::Lease, 0).await.expect("a lease read succeeds");
        let found = response.kv.map_or(0, |kv| number(&kv.value));
        assert!(found >= before, "stale lease read: {found} after {before} was acknowledged");
        done.send_modify(|done| *done += 1);
    }
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).expect("a number that a writer wrote")
}
