//! Where the entries of the log stand in the segments: pure, and sparse, so that a long log takes little memory.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

/// A point is kept for every so many entries,
const ENTRIES_PER_POINT: u64 = 64;
/// or for every so many bytes, whichever come first: reading one entry goes past no more than that.
const BYTES_PER_POINT: u64 = 64 << 10;

/// Where some entry's frame begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Point {
    /// The entry.
    pub(super) index: u64,
    /// In its segment.
    pub(super) offset: u64,
}

/// Entries that follow each other in one segment: between two of them stands no entry that is gone.
///
/// Invariant: `points` is not empty, ascends, and its first is not after `first`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    segment: u64,
    first: u64,
    last: u64,
    points: Vec<Point>,
    /// Entries that are gone stand behind it, so that it grows no more.
    is_closed: bool,
}

/// All entries of the log, in order and without holes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Runs(VecDeque<Run>);

/// Entries to be read in one go: from the frame at `from` on, those of `indices`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// The segment.
    pub(super) segment: u64,
    /// Where to begin; not after the first of `indices`.
    pub(super) from: Point,
    /// The entries wanted.
    pub(super) indices: RangeInclusive<u64>,
}

impl Runs {
    /// Adds an entry behind the last.
    pub(super) fn append(&mut self, segment: u64, point: Point) {
        let last = self.0.back_mut();
        match last.filter(|run| run.segment == segment && !run.is_closed && run.last + 1 == point.index) {
            Some(run) => {
                run.last = point.index;
                let is_far = |known: &Point| {
                    point.index - known.index >= ENTRIES_PER_POINT || point.offset - known.offset >= BYTES_PER_POINT
                };
                if run.points.last().is_none_or(is_far) {
                    run.points.push(point);
                }
            }
            None => {
                let (first, last) = (point.index, point.index);
                self.0.push_back(Run { segment, first, last, points: vec![point], is_closed: false });
            }
        }
    }

    /// Adds entries of a segment that is gone already: whoever looks for them finds that out.
    pub(super) fn append_lost(&mut self, indices: RangeInclusive<u64>) {
        let (first, last) = indices.into_inner();
        let points = vec![Point { index: first, offset: 0 }];
        self.0.push_back(Run { segment: 0, first, last, points, is_closed: true });
    }

    /// Drops entries at one end, or all.
    pub(super) fn drop_entries(&mut self, dropped: &RangeInclusive<u64>) {
        let (start, end) = (*dropped.start(), *dropped.end());
        if self.0.back().is_some_and(|run| run.last <= end) {
            while self.0.back().is_some_and(|run| run.first >= start) {
                self.0.pop_back();
            }
            if let Some(run) = self.0.back_mut() {
                run.is_closed = true;
                run.last = run.last.min(start.saturating_sub(1));
                run.points.retain(|point| point.index <= run.last);
            }
        } else {
            while self.0.front().is_some_and(|run| run.last <= end) {
                self.0.pop_front();
            }
            if let Some(run) = self.0.front_mut() {
                run.first = run.first.max(end.saturating_add(1));
                let needed = run.points.partition_point(|point| point.index <= run.first).saturating_sub(1);
                run.points.drain(..needed);
            }
        }
    }

    /// The segment that holds the first entry.
    pub(super) fn first_segment(&self) -> Option<u64> {
        self.0.front().map(|run| run.segment)
    }

    /// Where to read the entries of `start..end`, in order.
    pub(super) fn locate(&self, start: u64, end: u64) -> impl Iterator<Item = Piece> {
        let skipped = self.0.partition_point(|run| run.last < start);
        self.0.iter().skip(skipped).take_while(move |run| run.first < end).filter_map(move |run| {
            let (first, last) = (run.first.max(start), run.last.min(end.saturating_sub(1)));
            let point = run.points.partition_point(|point| point.index <= first).checked_sub(1)?;
            Some(Piece { segment: run.segment, from: *run.points.get(point)?, indices: first..=last })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(runs: &Runs, start: u64, end: u64) -> Vec<(u64, u64, RangeInclusive<u64>)> {
        runs.locate(start, end).map(|piece| (piece.segment, piece.from.index, piece.indices)).collect()
    }

    #[test]
    fn entries_are_found_from_the_nearest_point() {
        let mut runs = Runs::default();
        for index in 10..500 {
            runs.append(1, Point { index, offset: index * 100 });
        }
        for index in 500..510 {
            runs.append(2, Point { index, offset: (index - 500) * BYTES_PER_POINT });
        }
        assert_eq!(pieces(&runs, 0, 12), [(1, 10, 10..=11)]);
        assert_eq!(pieces(&runs, 73, 76), [(1, 10, 73..=75)]);
        assert_eq!(pieces(&runs, 74, 76), [(1, 74, 74..=75)]);
        assert_eq!(pieces(&runs, 499, u64::MAX), [(1, 458, 499..=499), (2, 500, 500..=509)]);
        assert_eq!(pieces(&runs, 505, 506), [(2, 505, 505..=505)]);
        assert_eq!(pieces(&runs, 510, 600), []);
        assert_eq!(runs.0[0].points.len(), 490 / 64 + 1);
    }

    #[test]
    fn what_replaces_a_truncated_tail_is_a_run_of_its_own() {
        let mut runs = Runs::default();
        for index in 1..200 {
            runs.append(1, Point { index, offset: index * 10 });
        }
        runs.drop_entries(&(130..=199));
        runs.append(1, Point { index: 130, offset: 5000 });
        assert_eq!(pieces(&runs, 129, 131), [(1, 129, 129..=129), (1, 130, 130..=130)]);
        runs.drop_entries(&(130..=130));
        runs.append(1, Point { index: 130, offset: 6000 });
        assert_eq!(runs.locate(130, 131).next().map(|piece| piece.from.offset), Some(6000));
    }

    #[test]
    fn a_purge_keeps_the_point_before_what_is_left() {
        let mut runs = Runs::default();
        for index in 1..200 {
            runs.append(index / 100 + 1, Point { index, offset: index * 10 });
        }
        runs.drop_entries(&(1..=70));
        assert_eq!((runs.first_segment(), pieces(&runs, 0, 72)), (Some(1), vec![(1, 65, 71..=71)]));
        runs.drop_entries(&(71..=99));
        assert_eq!((runs.first_segment(), pieces(&runs, 0, 101)), (Some(2), vec![(2, 100, 100..=100)]));
        runs.drop_entries(&(100..=199));
        assert_eq!(runs.first_segment(), None);
    }
}
