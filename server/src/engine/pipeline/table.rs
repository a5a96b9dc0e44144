//! What is in flight, by its id.

use std::collections::HashMap;

use d_engine_proto::v1;
use futures_util::future::AbortHandle;
use tracing::Span;

use super::operation::{Other, Query};
use crate::consensus::Ticket;
use crate::engine::Deadline;
use crate::limits::{PIPELINE_BYTES_MAX, PIPELINE_OPERATIONS_MAX, PIPELINE_RETURNING_MAX};
use crate::trace;

/// A table that was once full keeps memory for no more than so many operations when it is nearly empty.
const KEPT: usize = 256;

/// What is to be told of an operation when it ends.
pub(crate) struct Origin {
    /// The unary method that does the same.
    pub(crate) method: &'static str,
    /// When it began.
    pub(crate) began: Deadline,
    pub(crate) call: Span,
    /// Of what it proposes: it ends with the operation.
    _propose: Span,
}

impl Origin {
    pub(super) fn new(method: &'static str, began: Deadline, parent: Option<&v1::TraceContext>) -> Self {
        Self { method, began, call: trace::call(method, parent), _propose: Span::none() }
    }

    /// Begins to propose, and tells the span of it, if somebody records that.
    pub(super) fn proposing(self) -> (Self, Option<v1::TraceContext>) {
        let propose = self.call.in_scope(trace::propose);
        let context = trace::context(&propose);
        (Self { _propose: propose, ..self }, context)
    }
}

/// An operation in flight.
pub(super) struct Flight {
    /// Tells it from others that had its id.
    pub(super) serial: u64,
    pub(super) deadline: Deadline,
    pub(super) origin: Origin,
    /// What it takes of the bound.
    pub(super) bytes: usize,
    /// Whether it is a write whose answer may be large.
    pub(super) returns_values: bool,
    pub(super) stage: Stage,
}

/// What an operation waits for.
#[derive(Default)]
pub(super) enum Stage {
    /// The right to be read.
    Read(Query),
    /// Its turn in the log, or its answer from there.
    #[default]
    Write,
    /// A place among the calls.
    Waits(Other),
    /// A call of its own, which knows the deadline.
    Call {
        handle: AbortHandle,
        /// Whether it has changed nothing whenever it is dropped.
        withdrawable: bool,
    },
}

/// The operations in flight.
#[derive(Default)]
pub(super) struct Table {
    flights: HashMap<u64, Flight>,
    /// Sum of the bytes of all.
    bytes: usize,
    /// Writes whose answers may be large.
    returning: usize,
    last_serial: u64,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.flights.len()
    }

    pub(super) fn has_room(&self) -> bool {
        self.flights.len() < PIPELINE_OPERATIONS_MAX
            && self.bytes < PIPELINE_BYTES_MAX
            && self.returning < PIPELINE_RETURNING_MAX
    }

    pub(super) fn contains(&self, id: u64) -> bool {
        self.flights.contains_key(&id)
    }

    pub(super) fn get(&self, id: u64) -> Option<&Flight> {
        self.flights.get(&id)
    }

    /// Adds an operation whose id none has, and gives it the next serial.
    pub(super) fn insert(&mut self, id: u64, flight: Flight) -> Ticket {
        self.last_serial += 1;
        let serial = self.last_serial;
        self.bytes += flight.bytes;
        self.returning += usize::from(flight.returns_values);
        self.flights.insert(id, Flight { serial, ..flight });
        Ticket { id, serial }
    }

    /// Whether the operation is still in flight.
    pub(super) fn holds(&self, ticket: Ticket) -> bool {
        self.find(ticket).is_some()
    }

    pub(super) fn find(&self, ticket: Ticket) -> Option<&Flight> {
        self.flights.get(&ticket.id).filter(|flight| flight.serial == ticket.serial)
    }

    pub(super) fn find_mut(&mut self, ticket: Ticket) -> Option<&mut Flight> {
        self.flights.get_mut(&ticket.id).filter(|flight| flight.serial == ticket.serial)
    }

    pub(super) fn remove(&mut self, id: u64) -> Option<Flight> {
        let flight = self.flights.remove(&id)?;
        self.bytes -= flight.bytes;
        self.returning -= usize::from(flight.returns_values);
        Some(flight)
    }

    /// Removes an operation that is still in flight.
    pub(super) fn remove_held(&mut self, ticket: Ticket) -> Option<Flight> {
        let held = self.flights.get(&ticket.id).is_some_and(|flight| flight.serial == ticket.serial);
        if held { self.remove(ticket.id) } else { None }
    }

    /// Removes what has come to its deadline, and tells the next one. Calls of their own see to theirs.
    pub(super) fn take_due(&mut self, now: Deadline) -> (Vec<(u64, Flight)>, Option<Deadline>) {
        let mut earliest = None;
        let is_due = |_: &u64, flight: &mut Flight| {
            if matches!(flight.stage, Stage::Call { .. }) {
                return false;
            }
            if flight.deadline > now {
                earliest = Some(earliest.map_or(flight.deadline, |earliest: Deadline| earliest.min(flight.deadline)));
            }
            flight.deadline <= now
        };
        let due: Vec<_> = self.flights.extract_if(is_due).collect();
        for (_, flight) in &due {
            self.bytes -= flight.bytes;
            self.returning -= usize::from(flight.returns_values);
        }
        if self.flights.capacity() > KEPT.max(4 * self.flights.len()) {
            self.flights.shrink_to(KEPT);
        }
        (due, earliest)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn flight(deadline: Deadline) -> Flight {
        let stage = Stage::Write;
        let origin = Origin::new("", deadline, None);
        Flight { serial: 0, deadline, origin, bytes: 10, returns_values: true, stage }
    }

    #[test]
    fn a_ticket_is_worth_nothing_for_the_next_operation_of_its_id() {
        let mut table = Table::default();
        let first = table.insert(7, flight(Deadline::now()));
        assert!(table.holds(first));
        assert!(table.remove(7).is_some());
        let second = table.insert(7, flight(Deadline::now()));
        assert!(!table.holds(first) && table.find_mut(first).is_none());
        assert!(table.remove_held(first).is_none());
        assert!(table.remove_held(second).is_some());
        assert_eq!((table.len(), table.bytes, table.returning), (0, 0, 0));
    }

    #[test]
    fn what_is_due_leaves_and_the_next_deadline_is_known() {
        let mut table = Table::default();
        let now = Deadline::now();
        let later = now + Duration::from_secs(1);
        for (id, deadline) in [(1, now), (2, later), (3, later + Duration::from_secs(1))] {
            table.insert(id, flight(deadline));
        }
        let (due, next) = table.take_due(now);
        assert_eq!((due.iter().map(|(id, _)| *id).collect::<Vec<_>>(), next), (vec![1], Some(later)));
        assert_eq!((table.len(), table.bytes, table.returning), (2, 20, 2));
    }
}
