//! What a client runs in the background: everything it spawns goes through here, also what its connections need, so that
//! all of it ends with the client and can be waited for.

use std::pin::Pin;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The tasks of one client. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Tasks {
    runtime: Handle,
    /// Ends all of them.
    closed: CancellationToken,
    tracker: TaskTracker,
}

impl Tasks {
    pub(crate) fn new(runtime: &Handle, closed: &CancellationToken) -> Self {
        Self { runtime: runtime.clone(), closed: closed.clone(), tracker: TaskTracker::new() }
    }

    /// Runs `work`, which ends by itself once the client is closed.
    pub(crate) fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.tracker.spawn_on(work, &self.runtime)
    }

    /// Runs `work` until it ends, or the client is closed: then it is dropped where it waits, and gives no result.
    pub(crate) fn spawn_until_closed<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<Option<T>> {
        self.spawn(self.closed.clone().run_until_cancelled_owned(work))
    }

    /// Waits until all have ended. To be called once the client is closed.
    pub(crate) async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}

impl hyper::rt::Executor<Pin<Box<dyn Future<Output = ()> + Send>>> for Tasks {
    fn execute(&self, work: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.spawn_until_closed(work);
    }
}
