//! Fault points: places at which a test has a node refuse, keep silent, wait, step down or die.
//!
//! Nothing here happens by itself. A point does nothing until [`prepare`] was called, which only the tests' own binary
//! does; no file, flag or environment variable is read. Without the feature `fault-points` there is nothing here.
//!
//! | point | is reached |
//! | --- | --- |
//! | [`RECEIVED`] | by a unary call whose head has come, or by an operation of a pipeline |
//! | [`BEFORE_PROPOSE`] | by a write that has passed every check |
//! | [`AFTER_COMMIT`] | by a write that was applied, before its caller is told |
//! | [`BEFORE_REPLY`] | by either when its answer exists, before any of it is sent |
//!
//! A point is armed for one operation, by the name of its method: `before-propose/Put`. What it does then is a text, see
//! [`Action`]. The points are passed in async code and hold up nothing but the call that reached them.

use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use d_engine_proto::ErrorCode;
use d_engine_proto::v1::Outcome;
use d_engine_proto::v1::command::Command;

use crate::engine::{Engine, EngineError};

/// See the module's description.
pub const RECEIVED: &str = "received";
/// See the module's description.
pub const BEFORE_PROPOSE: &str = "before-propose";
/// See the module's description.
pub const AFTER_COMMIT: &str = "after-commit";
/// See the module's description.
pub const BEFORE_REPLY: &str = "before-reply";

/// The steps of building, receiving and installing a snapshot, as `steps` names them after the slash. All that can
/// happen there is `die`.
pub const STEPS: [&str; 3] = ["build", "receive", "install"];

const POINTS: [&str; 4] = [RECEIVED, BEFORE_PROPOSE, AFTER_COMMIT, BEFORE_REPLY];

/// How long a leader that steps down waits for its successor.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two attempts to step down.
const PAUSE: Duration = Duration::from_millis(20);

static PREPARED: OnceLock<Prepared> = OnceLock::new();

struct Prepared {
    engine: Engine,
    told: fn(&str),
}

/// What happens at a point, written as `[step-down] [refuse CODE OUTCOME | silence | delay MS | die]`, such as
/// `step-down refuse Unavailable Unknown`. The words are those of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Action {
    step_down: bool,
    then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    GoOn,
    Refuse(ErrorCode, Outcome),
    /// Never answers; ends when the caller goes away.
    Silence,
    Delay(Duration),
    /// As by SIGKILL.
    Die,
}

impl FromStr for Action {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed = || format!("no action: {text:?}");
        let words: Vec<&str> = text.split_whitespace().collect();
        let (step_down, words) = match words.split_first() {
            Some((&"step-down", rest)) => (true, rest),
            _ => (false, &words[..]),
        };
        let then = match words {
            [] if step_down => Then::GoOn,
            ["refuse", code, outcome] => {
                let code = ErrorCode::ALL.iter().find(|known| known.name() == *code).ok_or_else(malformed)?;
                let outcomes = [Outcome::NotApplied, Outcome::Applied, Outcome::Unknown];
                let outcome = outcomes.into_iter().find(|known| format!("{known:?}") == *outcome);
                Then::Refuse(*code, outcome.ok_or_else(malformed)?)
            }
            ["silence"] => Then::Silence,
            ["delay", ms] => Then::Delay(Duration::from_millis(ms.parse().map_err(|_| malformed())?)),
            ["die"] => Then::Die,
            _ => return Err(malformed()),
        };
        Ok(Self { step_down, then })
    }
}

/// Switches the points of this process on, for its one node. `told` hears of each one that is reached.
pub fn prepare(engine: Engine, told: fn(&str)) {
    // A second node in the process has no points.
    let _ = PREPARED.set(Prepared { engine, told });
}

/// Whether this process has points.
pub(crate) fn is_prepared() -> bool {
    PREPARED.get().is_some()
}

/// Has the next `times` calls that reach `point` (such as `before-reply/Get`) meet with `action`; 0 disarms it.
///
/// # Errors
/// When there is no such point or action.
pub fn arm(point: &str, times: u32, action: &str) -> Result<(), String> {
    if !point.split_once('/').is_some_and(|(place, _)| POINTS.contains(&place) || STEPS.contains(&place)) {
        return Err(format!("no point: {point:?}"));
    }
    if times == 0 {
        fail::remove(point);
        return Ok(());
    }
    action.parse::<Action>()?;
    fail::cfg(point, &format!("{times}*return({action})"))
}

/// Passes a point, and does what it is armed with.
///
/// # Errors
/// What the call is to be refused with.
pub(crate) async fn reached(point: &str, operation: &str) -> Result<(), EngineError> {
    let Some(Prepared { engine, told }) = PREPARED.get() else { return Ok(()) };
    let point = format!("{point}/{operation}");
    told(&point);
    let action = fail::eval(&point, |action| action.and_then(|action| action.parse::<Action>().ok()));
    let Some(Action { step_down, then }) = action.flatten() else { return Ok(()) };
    if step_down {
        step_down_from(engine).await;
    }
    match then {
        Then::GoOn => Ok(()),
        Then::Refuse(code, outcome) => Err(refusal(engine, code, outcome)),
        Then::Silence => std::future::pending().await,
        Then::Delay(time) => {
            tokio::time::sleep(time).await;
            Ok(())
        }
        Then::Die => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            std::future::pending().await
        }
    }
}

/// Passes a step of what must survive a crash, and dies there if it is armed: also before [`prepare`], since a start goes
/// through some. For blocking code.
pub(crate) fn die_at(step: &str) {
    if let Some(Prepared { told, .. }) = PREPARED.get() {
        told(step);
    }
    if fail::eval(step, |_| ()).is_some() {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

/// Hands over until somebody else leads.
async fn step_down_from(engine: &Engine) {
    let node = engine.consensus().node_id().get();
    let mut leader = engine.consensus().leader_changes();
    let other = leader.wait_for(|leader| leader.is_some_and(|leader| leader.leader_id != node));
    let transfers = async {
        loop {
            engine.consensus().transfer_leadership(PATIENCE).await;
            // It comes to nothing at once while there is nobody to hand over to.
            tokio::time::sleep(PAUSE).await;
        }
    };
    let _ = tokio::time::timeout(PATIENCE, async {
        tokio::select! {
            _ = other => {}
            () = transfers => {}
        }
    })
    .await;
}

/// The refusal as this server words it, where it has one of this kind: that settles what else it says.
fn refusal(engine: &Engine, code: ErrorCode, outcome: Outcome) -> EngineError {
    const MESSAGE: &str = "a fault point was armed";
    let node = engine.consensus().node_id();
    match (code, outcome) {
        (ErrorCode::NotLeader, Outcome::NotApplied) => engine.not_leader(),
        (ErrorCode::Unavailable, Outcome::NotApplied) => EngineError::Unavailable { node, reason: MESSAGE.to_owned() },
        (ErrorCode::LeadershipLost, Outcome::Unknown) => EngineError::LeadershipLost,
        _ => EngineError::Rejected { code, message: MESSAGE.to_owned(), outcome, revision: None },
    }
}

/// The method that a command came by.
pub(crate) fn operation(command: &Command) -> &'static str {
    match command {
        Command::Put(_) => "Put",
        Command::Delete(_) => "Delete",
        Command::DeleteRange(_) => "DeleteRange",
        Command::CompareAndSwap(_) => "CompareAndSwap",
        Command::Txn(_) => "Txn",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_read_and_anything_else_is_refused() {
        let refused = "step-down refuse Unavailable Unknown".parse::<Action>().unwrap();
        let then = Then::Refuse(ErrorCode::Unavailable, Outcome::Unknown);
        assert_eq!(refused, Action { step_down: true, then });
        for text in ["step-down", "silence", "delay 5", "die", "step-down die", "refuse NotLeader Applied"] {
            text.parse::<Action>().unwrap();
        }
        for text in ["", "refuse", "refuse Unavailable", "refuse Nothing Unknown", "delay", "delay x", "panic"] {
            text.parse::<Action>().unwrap_err();
        }
        assert!(arm("nowhere/Put", 1, "die").is_err());
        assert!(arm("before-reply", 1, "die").is_err());
        assert!(arm("before-reply/Nobody", 1, "rest").is_err());
    }
}
