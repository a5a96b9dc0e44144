//! One watch, as its consumer sees it: an endless stream of deliveries and bookmarks.
//!
//! ```text
//!               ┌── the window of its group reaches back to the cursor ──▶ shared deliveries
//! cursor ──▶ ───┼── the state machine's memory does ───────────────────▶ read from there, in steps
//!               └── neither does ──────────────────────────────────────▶ the history on disk, in steps
//! ```
//!
//! The cursor is all that a watch keeps: whatever serves it next begins there, and nothing at or before it is ever
//! handed out again. Being slow only means being served from further below.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use d_engine_proto::Revision;

use super::WatchError;
use super::catch_up::{self, Lane, Reading};
use super::delivery::Delivery;
use super::group::{Group, Next, WatchNumber};
use super::hub::Shared;

/// What a watch hands out.
#[derive(Clone, Debug)]
pub enum Update {
    /// Events of whole revisions.
    Events(Arc<Delivery>),
    /// Everything that matches up to this revision was handed out.
    Bookmark(Revision),
}

/// A watch. Dropping it ends it.
pub struct Watch {
    hub: Arc<Shared>,
    group: Arc<Group>,
    number: WatchNumber,
    lane: Lane,
    applied: Revision,
    from: Revision,
    /// Everything that matches from `from` up to here was handed out.
    cursor: Revision,
    /// The greatest revision the consumer has heard of. Never after `cursor`, once something was handed out.
    told: Revision,
    /// The last moment for bookmarks that was used.
    bookmark: u64,
    state: State,
}

enum State {
    /// Not yet within its group's window.
    Beginning,
    /// Within its group's window when it last looked.
    Following,
    /// Fell behind its group's window.
    Behind,
    /// Waits for a part of the history.
    Reading(Reading),
    Ended,
}

impl Watch {
    pub(super) fn new(
        hub: Arc<Shared>,
        group: Arc<Group>,
        number: WatchNumber,
        applied: Revision,
        from: Revision,
        lane: Lane,
    ) -> Self {
        let cursor = Revision(from.get().saturating_sub(1));
        let bookmark = hub.bookmarks();
        Self { hub, group, number, lane, applied, from, cursor, told: cursor, bookmark, state: State::Beginning }
    }

    /// The revision that the node had applied when the watch began.
    #[must_use]
    pub fn applied(&self) -> Revision {
        self.applied
    }

    /// The first revision that is delivered.
    #[must_use]
    pub fn from(&self) -> Revision {
        self.from
    }

    /// Everything that matches up to here was handed out: resume after it.
    #[must_use]
    pub fn cursor(&self) -> Revision {
        self.cursor
    }

    /// What comes next; an error is the last. Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// [`WatchError::Refused`] with the oldest revision left, when the watch fell behind a compaction;
    /// [`WatchError::Stopping`]; [`WatchError::Storage`].
    pub async fn next(&mut self) -> Option<Result<Update, WatchError>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// As [`next`](Self::next), for streams.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Update, WatchError>>> {
        loop {
            let update = match &mut self.state {
                State::Ended => return Poll::Ready(None),
                _ if self.hub.is_stopping() => Err(WatchError::Stopping),
                State::Reading(reading) => match ready!(reading.as_mut().poll(context)) {
                    Ok(chunk) => {
                        self.state = State::Behind;
                        match self.advance(Delivery::new(chunk.changes, self.group.interest.options), chunk.through) {
                            Some(update) => Ok(update),
                            None => continue,
                        }
                    }
                    Err(error) => Err(error),
                },
                State::Beginning | State::Following | State::Behind => match ready!(self.look(context)) {
                    Some(update) => Ok(update),
                    None => continue,
                },
            };
            if update.is_err() {
                self.end();
            }
            return Poll::Ready(Some(update));
        }
    }

    /// Looks into the window of the group, and where it begins too late, into memory. Ready with nothing: look again.
    fn look(&mut self, context: &mut Context<'_>) -> Poll<Option<Update>> {
        // Before the window, which then holds everything up to it.
        let dispatched = self.hub.dispatched();
        let (hub, used, told) = (&self.hub, self.bookmark, self.told);
        let cursor = self.cursor.max(dispatched);
        let mut waits = false;
        let next = self.group.next(self.cursor, self.number, || {
            // Looked at while nobody can be woken: what happens later wakes.
            waits = !hub.is_stopping() && (hub.bookmarks() == used || cursor <= told);
            waits.then(|| context.waker().clone())
        });
        match next {
            Next::Delivery(delivery) => {
                self.state = State::Following;
                let last = delivery.last_revision();
                Poll::Ready(self.advance(delivery.after(self.cursor), last))
            }
            Next::Nothing => {
                self.state = State::Following;
                self.cursor = cursor;
                if waits && cursor > told {
                    hub.wants_bookmark();
                }
                if waits { Poll::Pending } else { Poll::Ready(self.bookmark()) }
            }
            Next::Behind => self.catch_up(context),
        }
    }

    fn catch_up(&mut self, context: &mut Context<'_>) -> Poll<Option<Update>> {
        if matches!(self.state, State::Following) {
            self.hub.metrics.watch_overrun();
            self.state = State::Behind;
        }
        let entries = self.hub.kv.changes_after_within(self.cursor, self.hub.settings.chunk_bytes);
        let entries = entries.unwrap_or_default();
        let Some(last) = entries.last().and_then(|changes| changes.last()) else {
            self.hub.metrics.watch_history_read();
            self.state = State::Reading(catch_up::read(&self.hub, &self.group, self.cursor, &self.lane));
            return Poll::Ready(None);
        };
        let through = last.revision;
        let changes = entries.iter().flat_map(|changes| self.group.interest.select(changes, self.cursor)).collect();
        match self.advance(Delivery::new(changes, self.group.interest.options).map(Arc::new), through) {
            Some(update) => Poll::Ready(Some(update)),
            None => {
                // Others get their turn between two steps.
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }

    /// Moves the cursor, and hands out what lies between.
    fn advance(&mut self, delivery: Option<impl Into<Arc<Delivery>>>, through: Revision) -> Option<Update> {
        self.cursor = self.cursor.max(through);
        let Some(delivery) = delivery.map(Into::into) else { return self.bookmark() };
        self.told = self.told.max(delivery.last_revision());
        self.hub.metrics.watch_events(delivery.event_count());
        Some(Update::Events(delivery))
    }

    /// A bookmark, if its moment has come and it says something new.
    fn bookmark(&mut self) -> Option<Update> {
        let moment = self.hub.bookmarks();
        if moment == self.bookmark || self.cursor <= self.told {
            return None;
        }
        self.bookmark = moment;
        self.told = self.cursor;
        self.hub.metrics.watch_bookmark();
        Some(Update::Bookmark(self.cursor))
    }

    fn end(&mut self) {
        if !matches!(self.state, State::Ended) {
            self.state = State::Ended;
            self.hub.leave(&self.group, self.number);
            self.hub.metrics.watch_closed();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

impl futures_util::Stream for Watch {
    type Item = Result<Update, WatchError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Self::poll_next(self.get_mut(), context)
    }
}
