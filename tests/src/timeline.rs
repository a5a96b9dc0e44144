//! The course of a long run as one picture: what was done to the cluster, what callers felt, and what the processes
//! held meanwhile, above each other on one axis of time.
//!
//! It keeps one row for each second, however much happens in it, so that an hour costs no more than a few megabytes. It
//! judges nothing but [`flat`](Timeline::flat): whether what the processes hold goes on growing.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use hdrhistogram::Histogram;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::history::{Operation, Outcome};

const WIDTH: u32 = 1600;
const PANEL_HEIGHT: u32 = 260;
/// Points of a line; what is between two of them is shown by its worst.
const POINTS_MAX: usize = 400;
/// Colours of the kinds of faults, in the order in which they first come.
const FAULT_COLOURS: [RGBColor; 12] = [
    RGBColor(228, 26, 28),
    RGBColor(55, 126, 184),
    RGBColor(77, 175, 74),
    RGBColor(152, 78, 163),
    RGBColor(255, 127, 0),
    RGBColor(166, 86, 40),
    RGBColor(247, 129, 191),
    RGBColor(0, 139, 139),
    RGBColor(128, 128, 0),
    RGBColor(70, 70, 70),
    RGBColor(27, 158, 119),
    RGBColor(117, 112, 179),
];
/// Growth that counts as noise: what caches, arenas and one more segment of the log make.
const GROWTH_MAX: f64 = 1.3;

/// Something done to the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When it began, since the start of the run.
    pub at: Duration,
    /// How long it lasted.
    pub lasting: Duration,
    /// Its kind.
    pub name: &'static str,
}

/// What all processes of the cluster held at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// When, since the start of the run.
    pub at: Duration,
    /// Resident memory, in bytes.
    pub memory: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Bytes in the data directories.
    pub disk: u64,
}

/// The calls that ended within one second.
struct Second {
    latency_us: Histogram<u64>,
    not_applied: u64,
    unknown: u64,
}

type Area<'b> = DrawingArea<SVGBackend<'b>, Shift>;
type Chart<'a, 'b, Y> =
    ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, <Y as AsRangedCoord>::CoordDescType>>;

/// A run, second by second.
#[derive(Default)]
pub struct Timeline {
    seconds: Vec<Second>,
    events: Vec<Event>,
    holdings: Vec<Holding>,
}

impl Timeline {
    /// Adds the calls of a history whose clock began `begun` after the start of the run.
    pub fn add_operations(&mut self, begun: Duration, operations: &[Operation]) {
        for operation in operations {
            let ended = begun + Duration::from_nanos(operation.returned);
            let second = self.second(ended.as_secs() as usize);
            match operation.outcome {
                Outcome::Ok => {
                    let took_us = operation.returned.saturating_sub(operation.call) / 1000;
                    second.latency_us.saturating_record(took_us.max(1));
                }
                Outcome::NotApplied => second.not_applied += 1,
                Outcome::Unknown => second.unknown += 1,
            }
        }
    }

    /// Adds what was done.
    pub fn add_events(&mut self, events: impl IntoIterator<Item = Event>) {
        self.events.extend(events);
    }

    /// Adds what the processes held.
    pub fn add_holding(&mut self, holding: Holding) {
        self.holdings.push(holding);
    }

    fn second(&mut self, number: usize) -> &mut Second {
        while self.seconds.len() <= number {
            // One minute is more than any call takes.
            let latency_us = Histogram::new_with_bounds(1, 60_000_000, 2).expect("the bounds are in order");
            self.seconds.push(Second { latency_us, not_applied: 0, unknown: 0 });
        }
        &mut self.seconds[number]
    }

    /// Whether memory, descriptors and disk stayed within a third above what they were once the run had settled: its
    /// second fifth against its last. Shorter runs than ten samples show nothing and pass.
    ///
    /// # Errors
    /// What grew, and from what to what.
    pub fn flat(&self) -> Result<(), String> {
        type Part = (&'static str, fn(&Holding) -> u64, u64);
        // What may be added whatever it was before: an arena, a few connections, a segment and a snapshot per node.
        const PARTS: [Part; 3] = [
            ("memory", |holding| holding.memory, 64 << 20),
            ("descriptors", |holding| holding.descriptors, 64),
            ("disk", |holding| holding.disk, 256 << 20),
        ];
        let fifth = self.holdings.len() / 5;
        if fifth < 2 {
            return Ok(());
        }
        for (name, part, slack) in PARTS {
            let median = |holdings: &[Holding]| {
                let mut values: Vec<u64> = holdings.iter().map(part).collect();
                values.sort_unstable();
                values[values.len() / 2]
            };
            let before = median(&self.holdings[fifth..2 * fifth]);
            let after = median(&self.holdings[self.holdings.len() - fifth..]);
            if after as f64 > before as f64 * GROWTH_MAX + slack as f64 {
                return Err(format!("{name} of all processes grew from {before} to {after}"));
            }
        }
        Ok(())
    }

    /// Draws the run as an SVG.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn draw(&self, title: &str, path: &Path) -> Result<(), Box<dyn Error>> {
        let area = SVGBackend::new(path, (WIDTH, 4 * PANEL_HEIGHT + 80)).into_drawing_area();
        area.fill(&WHITE)?;
        let (head, panels) = area.titled(title, ("sans-serif", 22))?.split_vertically(40);
        self.draw_legend(&head)?;
        let panels = panels.split_evenly((4, 1));
        self.draw_latency(&panels[0])?;
        self.draw_outcomes(&panels[1])?;
        self.draw_holding(&panels[2], "resident memory, all nodes, MiB", |holding| holding.memory)?;
        self.draw_holding(&panels[3], "data directories, all nodes, MiB", |holding| holding.disk)?;
        area.present()?;
        Ok(())
    }

    fn end(&self) -> f64 {
        let samples = self.holdings.last().map_or(0.0, |holding| holding.at.as_secs_f64());
        samples.max(self.seconds.len() as f64).max(1.0)
    }

    /// The kinds of faults with their colours, in the order in which they first came.
    fn kinds(&self) -> Vec<(&'static str, RGBColor)> {
        let mut kinds: Vec<&'static str> = Vec::new();
        for event in &self.events {
            if !kinds.contains(&event.name) {
                kinds.push(event.name);
            }
        }
        kinds.into_iter().zip(FAULT_COLOURS.into_iter().cycle()).collect()
    }

    fn draw_legend(&self, area: &Area<'_>) -> Result<(), Box<dyn Error>> {
        for (place, (name, colour)) in self.kinds().into_iter().enumerate() {
            let x = 60 + 125 * place as i32;
            area.draw(&Rectangle::new([(x, 12), (x + 14, 26)], colour.mix(0.5).filled()))?;
            area.draw(&Text::new(name, (x + 20, 13), ("sans-serif", 14)))?;
        }
        Ok(())
    }

    /// A panel whose background shows the faults.
    fn panel<'a, 'b, Y>(
        &self,
        area: &'a Area<'b>,
        caption: &str,
        y: Y,
        (low, high): (f64, f64),
    ) -> Result<Chart<'a, 'b, Y>, Box<dyn Error>>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let mut chart = ChartBuilder::on(area)
            .caption(caption, ("sans-serif", 16))
            .margin(8)
            .x_label_area_size(24)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..self.end(), y)?;
        chart.configure_mesh().light_line_style(TRANSPARENT).x_desc("s").draw()?;
        let colours = self.kinds();
        chart.draw_series(self.events.iter().map(|event| {
            let colour = colours.iter().find(|(name, _)| *name == event.name).map_or(BLACK, |(_, colour)| *colour);
            let (from, to) = (event.at.as_secs_f64(), (event.at + event.lasting).as_secs_f64());
            Rectangle::new([(from, low), (to, high)], colour.mix(0.25).filled())
        }))?;
        Ok(chart)
    }

    /// For each point of a line, the seconds it stands for.
    fn steps(&self) -> impl Iterator<Item = (f64, &[Second])> {
        let step = self.seconds.len().div_ceil(POINTS_MAX).max(1);
        self.seconds.chunks(step).enumerate().map(move |(number, seconds)| ((number * step) as f64, seconds))
    }

    fn draw_latency(&self, area: &Area<'_>) -> Result<(), Box<dyn Error>> {
        let (low, high) = (0.1, 10_000.0);
        let caption = "latency of answered calls, ms: median (black), p99 (blue), worst (red)";
        let mut chart = self.panel(area, caption, (low..high).log_scale(), (low, high))?;
        let lines: [(f64, RGBColor); 3] = [(0.5, BLACK), (0.99, BLUE), (1.0, RED)];
        for (quantile, colour) in lines {
            let points = self.steps().filter_map(|(at, seconds)| {
                let answered = seconds.iter().filter(|second| !second.latency_us.is_empty());
                let worst = answered.map(|second| second.latency_us.value_at_quantile(quantile)).max()?;
                Some((at, (worst as f64 / 1000.0).clamp(low, high)))
            });
            chart.draw_series(LineSeries::new(points, colour.stroke_width(1)))?;
        }
        Ok(())
    }

    fn draw_outcomes(&self, area: &Area<'_>) -> Result<(), Box<dyn Error>> {
        let caption = "calls a second: answered (black), refused (blue), unknown (red)";
        type Part = (fn(&Second) -> u64, RGBColor);
        let parts: [Part; 3] = [
            (|second| second.latency_us.len(), BLACK),
            (|second| second.not_applied, BLUE),
            (|second| second.unknown, RED),
        ];
        let mean = |seconds: &[Second], part: fn(&Second) -> u64| {
            seconds.iter().map(part).sum::<u64>() as f64 / seconds.len() as f64
        };
        let most = self.steps().flat_map(|(_, seconds)| parts.map(|(part, _)| mean(seconds, part))).fold(1.0, f64::max);
        let mut chart = self.panel(area, caption, 0.0..most, (0.0, most))?;
        for (part, colour) in parts {
            let points = self.steps().map(|(at, seconds)| (at, mean(seconds, part)));
            chart.draw_series(LineSeries::new(points, colour.stroke_width(1)))?;
        }
        Ok(())
    }

    fn draw_holding(&self, area: &Area<'_>, caption: &str, part: fn(&Holding) -> u64) -> Result<(), Box<dyn Error>> {
        let mib = |holding: &Holding| part(holding) as f64 / f64::from(1 << 20);
        let most = self.holdings.iter().map(mib).fold(1.0, f64::max) * 1.1;
        let mut chart = self.panel(area, caption, 0.0..most, (0.0, most))?;
        let points = self.holdings.iter().map(|holding| (holding.at.as_secs_f64(), mib(holding)));
        chart.draw_series(LineSeries::new(points, BLACK.stroke_width(1)))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_of(seconds: u64, memory: impl Fn(u64) -> u64) -> Timeline {
        let mut timeline = Timeline::default();
        for at in 0..seconds {
            timeline.add_holding(Holding { at: Duration::from_secs(at), memory: memory(at), ..Holding::default() });
        }
        timeline
    }

    #[test]
    fn memory_that_comes_and_goes_is_flat() {
        run_of(600, |at| (100 << 20) + (at % 60) * (1 << 20)).flat().expect("nothing grows");
    }

    #[test]
    fn memory_that_grows_all_the_time_is_named() {
        let wrong = run_of(600, |at| (100 << 20) + at * (1 << 20)).flat().expect_err("it grows");
        assert!(wrong.contains("memory"), "{wrong}");
    }

    #[test]
    fn what_grows_only_at_the_beginning_is_flat() {
        run_of(600, |at| (100 << 20) + at.min(100) * (1 << 20)).flat().expect("it has settled");
    }

    #[test]
    fn a_picture_shows_every_fault_and_every_panel() {
        let mut timeline = run_of(20, |_| 1 << 20);
        let event = |at, name| Event { at: Duration::from_secs(at), lasting: Duration::from_secs(2), name };
        timeline.add_events([event(3, "kill"), event(9, "one-way cut")]);
        timeline.second(19).latency_us.record(1500).expect("within the bounds");
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        timeline.draw("a run", file.path()).expect("it can be written");
        let picture = std::fs::read_to_string(file.path()).expect("it was written");
        for text in ["kill", "one-way cut", "latency", "calls a second", "resident memory", "data directories"] {
            assert!(picture.contains(text), "{text} is missing");
        }
    }
}
