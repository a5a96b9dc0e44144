//! What was measured: samples by workload, callers and system, and what a reader sees of them.
//!
//! `report.json` has one entry for each workload, number of callers and system, of medians over the rounds. Of several
//! etcd releases it shows, row by row, the one that does better: a ratio computed from it holds for all of them.

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use super::target::{Figure, Target, figure, target};

/// One measurement of one workload on one system. A figure that a workload does not have is zero; a latency of which
/// there was none to measure is no number, so that who did nothing never looks fast.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) ops_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// Of all servers together.
    pub(crate) rss_mib: f64,
    /// Of all servers together.
    pub(crate) cpu_us_per_op: f64,
}

impl Sample {
    pub(crate) fn of(self, figure: Figure) -> f64 {
        match figure {
            Figure::PerSecond => self.ops_per_s,
            Figure::Latency => self.p50_us,
            Figure::Cpu => self.cpu_us_per_op,
            Figure::Memory => self.rss_mib,
        }
    }
}

/// What is measured: a workload with so many callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Point {
    pub(crate) workload: &'static str,
    pub(crate) callers: usize,
}

/// An entry of `report.json`.
#[derive(Debug, Serialize)]
struct Entry {
    workload: &'static str,
    system: &'static str,
    callers: usize,
    ops_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    rss_mib: f64,
    cpu_us_per_op: f64,
}

/// A median with the least and the greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    /// Of what is a number; `None` if nothing is.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_unstable_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() {
            0 => return None,
            count if count % 2 == 1 => values[middle],
            _ => f64::midpoint(values[middle - 1], values[middle]),
        };
        Some(Self { median, least: values[0], most: values[values.len() - 1] })
    }
}

/// One row: a point with the samples of every system, in the order of the rounds.
struct Row {
    point: Point,
    samples: Vec<Vec<Sample>>,
}

/// All that was measured. The first system is compared with each of the others.
pub(crate) struct Report {
    systems: Vec<String>,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(systems: Vec<String>) -> Self {
        Self { systems, rows: Vec::new() }
    }

    /// Adds what one round has measured of a system, named by its place.
    pub(crate) fn add(&mut self, point: Point, system: usize, sample: Sample) {
        let place = self.rows.iter().position(|row| row.point == point).unwrap_or_else(|| {
            self.rows.push(Row { point, samples: vec![Vec::new(); self.systems.len()] });
            self.rows.len() - 1
        });
        self.rows[place].samples[system].push(sample);
    }

    /// The names of the systems that the first one is compared with.
    pub(crate) fn others(&self) -> &[String] {
        &self.systems[1..]
    }

    /// For each point the ratios to the other systems, with the target.
    pub(crate) fn ratios(&self) -> impl Iterator<Item = (Point, Vec<Option<Spread>>, Option<Target>)> {
        self.rows.iter().map(|row| {
            let ratios = (1..self.systems.len()).map(|other| row.ratio(other)).collect();
            (row.point, ratios, target(row.point))
        })
    }

    /// The table of ratios, in which a target is met when it is met against each release.
    pub(crate) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let mut header =
            vec!["workload".to_owned(), "callers".to_owned(), "figure".to_owned(), self.systems[0].clone()];
        for other in self.others() {
            header.extend([other.clone(), "ratio (least to most)".to_owned()]);
        }
        header.extend(["target".to_owned(), String::new()]);
        table.set_header(header);
        for row in &self.rows {
            let figure = figure(row.point);
            let target = target(row.point);
            let mut cells = vec![
                Cell::new(row.point.workload),
                right(row.point.callers.to_string()),
                Cell::new(figure.unit()),
                right(row.value(0, figure)),
            ];
            let mut met = true;
            for other in 1..self.systems.len() {
                let ratio = row.ratio(other);
                let is_met =
                    target.zip(ratio).is_some_and(|(target, ratio)| target.is_met(row.own(figure), ratio.median));
                met &= is_met || row.samples[other].is_empty();
                let text = ratio.map_or_else(String::new, |ratio| {
                    format!("{} ({} to {})", times(ratio.median), times(ratio.least), times(ratio.most))
                });
                cells.extend([right(row.value(other, figure)), right(text)]);
            }
            let compared = row.samples[1..].iter().any(|samples| !samples.is_empty());
            let verdict = match (target, met) {
                (Some(_), true) if compared => "met",
                (Some(_), false) => "MISSED",
                _ => "",
            };
            cells.extend([right(target.map_or_else(String::new, |target| target.to_string())), Cell::new(verdict)]);
            table.add_row(cells);
        }
        table
    }

    /// What `report.json` holds.
    pub(crate) fn json(&self) -> serde_json::Result<String> {
        let systems = |row: &Row| [row.entry("d-engine", Some(0)), row.entry("etcd", row.strongest_other())];
        let entries: Vec<Entry> = self.rows.iter().flat_map(systems).flatten().collect();
        serde_json::to_string_pretty(&entries).map(|text| text + "\n")
    }
}

impl Row {
    /// The figure of one system over the rounds.
    fn spread(&self, system: usize, figure: Figure) -> Option<Spread> {
        Spread::of(self.samples[system].iter().map(|sample| sample.of(figure)))
    }

    /// The first system's median; nothing, if it was not measured.
    fn own(&self, figure: Figure) -> f64 {
        self.spread(0, figure).map_or(0.0, |spread| spread.median)
    }

    /// The first system's figure for each one of another's, round by round.
    fn ratio(&self, other: usize) -> Option<Spread> {
        let figure = figure(self.point);
        let rounds = self.samples[0].iter().zip(&self.samples[other]);
        Spread::of(rounds.map(|(own, other)| own.of(figure) / other.of(figure)))
    }

    /// Of the systems after the first, the one that does best here.
    fn strongest_other(&self) -> Option<usize> {
        let figure = figure(self.point);
        let measured = (1..self.samples.len()).filter_map(|other| Some((other, self.spread(other, figure)?.median)));
        measured
            .reduce(|best, other| if figure.is_better(other.1, best.1) { other } else { best })
            .map(|(other, _)| other)
    }

    /// `None` if the system was not measured.
    fn entry(&self, name: &'static str, system: Option<usize>) -> Option<Entry> {
        let samples = &self.samples[system?];
        let median = |part: fn(&Sample) -> f64| Spread::of(samples.iter().map(part)).map(|spread| spread.median);
        Some(Entry {
            workload: self.point.workload,
            system: name,
            callers: self.point.callers,
            ops_per_s: median(|sample| sample.ops_per_s)?,
            p50_us: median(|sample| sample.p50_us)?,
            p99_us: median(|sample| sample.p99_us)?,
            rss_mib: median(|sample| sample.rss_mib)?,
            cpu_us_per_op: median(|sample| sample.cpu_us_per_op)?,
        })
    }

    /// The median with the greatest deviation from it.
    fn value(&self, system: usize, figure: Figure) -> String {
        self.spread(system, figure).map_or_else(String::new, |spread| {
            let deviation = (spread.most - spread.median).max(spread.median - spread.least);
            format!("{} ±{:.0} %", digits(spread.median), 100.0 * deviation / spread.median.max(f64::MIN_POSITIVE))
        })
    }
}

fn right(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

fn times(ratio: f64) -> String {
    format!("{}×", digits(ratio))
}

/// A number to three digits or more, none of them a fraction of a large one.
fn digits(number: f64) -> String {
    match number {
        number if number >= 100.0 => format!("{number:.0}"),
        number if number >= 10.0 => format!("{number:.1}"),
        number => format!("{number:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUT: Point = Point { workload: "put", callers: 1000 };
    const ALONE: Point = Point { workload: "put", callers: 1 };

    fn sample(ops_per_s: f64, p50_us: f64) -> Sample {
        Sample { ops_per_s, p50_us, p99_us: 2.0 * p50_us, rss_mib: 10.0, cpu_us_per_op: 5.0 }
    }

    /// Operations per second and microseconds, round by round, of three systems.
    type Rounds<'a> = [&'a [(f64, f64)]; 3];

    fn report(rows: &[(Point, Rounds<'_>)]) -> Report {
        let mut report = Report::new(["d-engine", "etcd 3.4", "etcd 3.7"].map(str::to_owned).to_vec());
        for (point, systems) in rows {
            for (system, samples) in systems.iter().enumerate() {
                for (ops_per_s, p50_us) in *samples {
                    report.add(*point, system, sample(*ops_per_s, *p50_us));
                }
            }
        }
        report
    }

    #[test]
    fn a_ratio_is_the_median_of_the_rounds_and_not_of_one_side() {
        // Round by round 10, 5 and 20; the medians of both sides would say 8.
        let report =
            report(&[(PUT, [&[(100.0, 1.0), (80.0, 1.0), (40.0, 1.0)], &[(10.0, 1.0), (16.0, 1.0), (2.0, 1.0)], &[]])]);
        let (_, ratios, _) = report.ratios().next().expect("one row");
        assert_eq!(ratios, [Some(Spread { median: 10.0, least: 5.0, most: 20.0 }), None]);
    }

    #[test]
    fn the_report_is_an_array_of_both_systems_with_the_stronger_release() {
        let report = report(&[
            (PUT, [&[(90.0, 1.0)], &[(10.0, 9.0)], &[(12.0, 8.0)]]),
            (ALONE, [&[(9.0, 100.0)], &[(5.0, 200.0)], &[(4.0, 250.0)]]),
        ]);
        let json: serde_json::Value = serde_json::from_str(&report.json().expect("it can be written")).expect("JSON");
        let entry = |workload, callers, system, ops_per_s: f64, p50_us: f64| {
            serde_json::json!({
                "workload": workload, "system": system, "callers": callers, "ops_per_s": ops_per_s, "p50_us": p50_us,
                "p99_us": 2.0 * p50_us, "rss_mib": 10.0, "cpu_us_per_op": 5.0,
            })
        };
        let expected = serde_json::json!([
            entry("put", 1000, "d-engine", 90.0, 1.0),
            entry("put", 1000, "etcd", 12.0, 8.0),
            entry("put", 1, "d-engine", 9.0, 100.0),
            entry("put", 1, "etcd", 5.0, 200.0),
        ]);
        assert_eq!(json, expected);
    }

    #[test]
    fn a_target_is_met_only_against_every_release() {
        let table =
            |second: f64| report(&[(PUT, [&[(80.0, 1.0)], &[(10.0, 1.0)], &[(second, 1.0)]])]).table().to_string();
        assert!(table(10.0).contains(" met "), "{}", table(10.0));
        assert!(table(10.1).contains("MISSED"), "{}", table(10.1));
    }

    #[test]
    fn who_did_nothing_meets_no_target() {
        let idle = (0.0, f64::NAN);
        for systems in [[&[idle][..], &[(5.0, 200.0)], &[]], [&[(5.0, 200.0)], &[idle], &[]]] {
            for point in [PUT, ALONE] {
                let table = report(&[(point, systems)]).table().to_string();
                assert!(!table.contains(" met "), "{table}");
            }
        }
    }

    #[test]
    fn a_target_of_latency_is_a_bound_from_above() {
        let table = |own: f64| report(&[(ALONE, [&[(1.0, own)], &[(1.0, 200.0)], &[]])]).table().to_string();
        assert!(table(100.0).contains(" met "), "{}", table(100.0));
        assert!(table(101.0).contains("MISSED"), "{}", table(101.0));
    }
}
