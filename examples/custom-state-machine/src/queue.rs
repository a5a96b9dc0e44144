//! The domain: jobs, and what may be done to them. Pure: it reads no clock, and the same commands at the same times give
//! the same queue everywhere.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What changes the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Adds a job; answered by [`Answer::Added`].
    Add {
        /// What is to be done.
        work: String,
    },
    /// Takes the oldest job that nobody works on; answered by [`Answer::Taken`] or [`Answer::Nothing`].
    Take {
        /// Who takes it.
        worker: String,
        /// For how long it is theirs, in milliseconds; then it is given to the next who asks.
        for_ms: u64,
    },
    /// Removes a job that is done; answered by [`Answer::Done`], or [`Answer::NotYours`] for a worker that took too long.
    Finish {
        /// The job.
        id: u64,
        /// Who did it.
        worker: String,
    },
}

/// What can be asked without changing anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// How much there is to do; answered by [`Answer::Counts`].
    Counts,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The job's number.
    Added(u64),
    /// The job is the worker's for as long as asked.
    Taken {
        /// Its number.
        id: u64,
        /// What is to be done.
        work: String,
    },
    /// There is no job that nobody works on.
    Nothing,
    /// The job is removed.
    Done,
    /// The job is somebody else's, or done.
    NotYours,
    /// How much there is to do.
    Counts {
        /// Jobs that nobody works on.
        waiting: usize,
        /// Jobs that somebody took.
        taken: usize,
    },
    /// The command or question makes no sense. It says so on every member alike.
    Malformed(String),
}

/// The queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    next: u64,
    jobs: BTreeMap<u64, Job>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Job {
    work: String,
    /// Whose it is, and until when.
    taken: Option<(String, Duration)>,
}

impl Queue {
    /// Applies a command at a time that never goes back.
    pub fn apply(&mut self, command: Command, now: Duration) -> Answer {
        for job in self.jobs.values_mut() {
            if job.taken.as_ref().is_some_and(|(_, until)| *until <= now) {
                job.taken = None;
            }
        }
        match command {
            Command::Add { work } => {
                self.next += 1;
                self.jobs.insert(self.next, Job { work, taken: None });
                Answer::Added(self.next)
            }
            Command::Take { worker, for_ms } => match self.jobs.iter_mut().find(|(_, job)| job.taken.is_none()) {
                Some((id, job)) => {
                    job.taken = Some((worker, now.saturating_add(Duration::from_millis(for_ms))));
                    Answer::Taken { id: *id, work: job.work.clone() }
                }
                None => Answer::Nothing,
            },
            Command::Finish { id, worker } => {
                let is_theirs = |job: &Job| job.taken.as_ref().is_some_and(|(owner, _)| *owner == worker);
                if self.jobs.get(&id).is_some_and(is_theirs) {
                    self.jobs.remove(&id);
                    Answer::Done
                } else {
                    Answer::NotYours
                }
            }
        }
    }

    /// Answers a question.
    #[must_use]
    pub fn answer(&self, question: &Question) -> Answer {
        match question {
            Question::Counts => {
                let taken = self.jobs.values().filter(|job| job.taken.is_some()).count();
                Answer::Counts { waiting: self.jobs.len() - taken, taken }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_given_to_one_worker_at_a_time() {
        let mut queue = Queue::default();
        let at = Duration::from_millis;
        let take = |worker: &str| Command::Take { worker: worker.into(), for_ms: 100 };
        let finish = |worker: &str| Command::Finish { id: 1, worker: worker.into() };
        assert_eq!(queue.apply(Command::Add { work: "paint".into() }, at(0)), Answer::Added(1));
        assert_eq!(queue.apply(take("a"), at(10)), Answer::Taken { id: 1, work: "paint".into() });
        assert_eq!(queue.apply(take("b"), at(109)), Answer::Nothing);
        assert_eq!(queue.apply(take("b"), at(110)), Answer::Taken { id: 1, work: "paint".into() });
        assert_eq!(queue.apply(finish("a"), at(111)), Answer::NotYours);
        assert_eq!(queue.answer(&Question::Counts), Answer::Counts { waiting: 0, taken: 1 });
        assert_eq!(queue.apply(finish("b"), at(112)), Answer::Done);
        assert_eq!(queue.apply(finish("b"), at(113)), Answer::NotYours);
        assert_eq!(queue.answer(&Question::Counts), Answer::Counts { waiting: 0, taken: 0 });
    }
}
