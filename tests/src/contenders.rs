//! Contenders for one lock while something is done to the cluster; judged by [`crate::resource`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use d_engine_client::{Client, FencingToken};
use fastrand::Rng;
use tokio::task::JoinSet;

use crate::cluster::Cluster;
use crate::resource::{self, Resource, Tenure};

const CONTENDERS: usize = 5;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Shorter than a change of leader takes, so that locks are lost.
const TTL: Duration = Duration::from_millis(700);
/// For one attempt to get the lock.
const PATIENCE: Duration = Duration::from_secs(5);

/// Contenders at work.
#[derive(Debug)]
pub struct Contenders {
    tasks: JoinSet<(Vec<Tenure>, usize)>,
    resource: Arc<Mutex<Resource>>,
}

/// What they did, when all of it was right.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Times that somebody held the lock.
    pub tenures: usize,
    /// Times that the holder lost it before it gave it back.
    pub lost: usize,
    /// Holders that wrote to what the lock guards.
    pub writers: usize,
    /// Writes that the guarded resource refused.
    pub refused: usize,
}

impl Contenders {
    /// Contends for the lock `name` until `end`.
    #[must_use]
    pub fn start(cluster: &Cluster, name: &str, end: Instant, rng: &mut Rng) -> Self {
        let (start, resource) = (Instant::now(), Arc::new(Mutex::new(Resource::default())));
        let mut tasks = JoinSet::new();
        for number in 0..CONTENDERS {
            let client = Client::builder().endpoints(cluster.addresses()).call_timeout(CALL_TIMEOUT).build();
            let contender = Contender {
                client: client.expect("the addresses are well formed"),
                lock: name.to_owned(),
                name: format!("contender {number}"),
                resource: Arc::clone(&resource),
                start,
            };
            tasks.spawn(contender.run(rng.fork(), end));
        }
        Self { tasks, resource }
    }

    /// Waits for the last of them, and judges who held the lock when.
    ///
    /// # Errors
    /// Two tenures that cannot both be.
    ///
    /// # Panics
    /// When one of them panicked.
    pub async fn judge(mut self) -> Result<Tally, String> {
        let (mut tenures, mut lost) = (Vec::new(), 0);
        while let Some(contender) = self.tasks.join_next().await {
            let (mine, mine_lost) = contender.expect("a contender goes on");
            tenures.extend(mine);
            lost += mine_lost;
        }
        resource::judge(&tenures)?;
        let resource = self.resource.lock().unwrap_or_else(PoisonError::into_inner);
        let mut writers: BTreeMap<FencingToken, usize> = BTreeMap::new();
        for (token, _) in resource.accepted() {
            *writers.entry(*token).or_default() += 1;
        }
        Ok(Tally { tenures: tenures.len(), lost, writers: writers.len(), refused: resource.refused() })
    }
}

struct Contender {
    client: Client,
    lock: String,
    name: String,
    resource: Arc<Mutex<Resource>>,
    start: Instant,
}

impl Contender {
    /// Takes the lock, works under it as long as it is held or the work lasts, and gives it back; again and again.
    async fn run(self, mut rng: Rng, end: Instant) -> (Vec<Tenure>, usize) {
        let (mut tenures, mut lost) = (Vec::new(), 0);
        while Instant::now() < end {
            let Ok(guard) = self.client.lock(&self.lock).ttl(TTL).timeout(PATIENCE).acquire().await else { continue };
            let token = guard.token();
            let acquired = self.start.elapsed();
            let mut tenure = Tenure { holder: self.name.clone(), token, acquired, held: acquired };
            for step in 0..rng.usize(1..20) {
                // The clock is read before the look, so that the look vouches for it.
                let now = self.start.elapsed();
                if !guard.is_held() {
                    lost += 1;
                    break;
                }
                tenure.held = now;
                let what = format!("{}, step {step}", self.name);
                // Refused is what a holder that was overtaken has to be.
                let _ = self.resource.lock().unwrap_or_else(PoisonError::into_inner).write(token, what);
                // Work that takes its time, with something else to wait for than a clock.
                let _ = self.client.get("what the work needs").timeout(Duration::from_millis(100)).await;
            }
            let _ = guard.release().await;
            tenures.push(tenure);
        }
        (tenures, lost)
    }
}
