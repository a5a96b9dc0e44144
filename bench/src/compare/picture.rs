//! The ratios as a picture: a bar for each, on a logarithmic axis, with its spread and its target.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use super::report::Report;
use super::target::{Figure, figure};

const WIDTH: u32 = 1100;
const ROW_HEIGHT: u32 = 34;
/// What is worse, or as much better, is drawn as if it were this.
const LEAST: f64 = 0.001;
const COLOURS: [RGBColor; 3] = [RGBColor(55, 126, 184), RGBColor(255, 127, 0), RGBColor(77, 175, 74)];

/// Draws the report as an SVG. To the right of 1 is better than etcd: ratios of times and memory are turned round.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn draw(report: &Report, path: &Path) -> Result<(), Box<dyn Error>> {
    let rows: Vec<_> = report.ratios().filter(|(_, ratios, _)| ratios.iter().any(Option::is_some)).collect();
    let others = report.others();
    // Turned round where less is better.
    let better = |point, ratio: f64| {
        let times = if figure(point) == Figure::PerSecond { ratio } else { 1.0 / ratio };
        // An axis of logarithms has no place for nothing.
        times.clamp(LEAST, 1.0 / LEAST)
    };
    let every = rows.iter().flat_map(|(point, ratios, target)| {
        let ratios = ratios.iter().flatten().flat_map(|ratio| [ratio.least, ratio.most]);
        ratios.chain(target.map(|target| target.ratio())).map(|ratio| better(*point, ratio))
    });
    let (least, most) = every.fold((1.0_f64, 1.0_f64), |(least, most), ratio| (least.min(ratio), most.max(ratio)));

    let height = rows.iter().map(|_| ROW_HEIGHT).sum::<u32>() + 130;
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let count = rows.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .caption("d-engine against etcd: how many times better, with the spread over the rounds", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(230)
        .build_cartesian_2d((least / 1.3..most * 1.3).log_scale(), 0.0..count)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_label_formatter(&|ratio| format!("{ratio}×"))
        .x_desc("times as fast, or as small")
        .draw()?;
    for (place, (point, ratios, target)) in rows.iter().enumerate() {
        // The first row is the uppermost.
        let top = count - place as f64;
        let thickness = 0.8 / others.len() as f64;
        for (other, ratio) in ratios.iter().enumerate() {
            let Some(ratio) = ratio else { continue };
            let upper = top - 0.1 - other as f64 * thickness;
            let bar = [(1.0, upper), (better(*point, ratio.median), upper - 0.85 * thickness)];
            let colour = COLOURS[other % COLOURS.len()];
            chart.draw_series([Rectangle::new(bar, colour.mix(0.7).filled())])?;
            let middle = upper - 0.425 * thickness;
            let spread = [ratio.least, ratio.most].map(|ratio| (better(*point, ratio), middle));
            chart.draw_series([PathElement::new(spread, BLACK.stroke_width(1))])?;
        }
        if let Some(target) = target {
            let at = better(*point, target.ratio());
            chart.draw_series([PathElement::new([(at, top), (at, top - 1.0)], RED.stroke_width(2))])?;
        }
        let callers = if point.callers == 1 { "1 caller".to_owned() } else { format!("{}", point.callers) };
        let label = format!("{}, {callers}: {}", point.workload, figure(*point).unit());
        let (_, y) = chart.backend_coord(&(1.0, top - 0.65));
        area.draw(&Text::new(label, (12, y), ("sans-serif", 13)))?;
    }
    let legend = others.iter().enumerate().map(|(other, name)| (name.as_str(), COLOURS[other % COLOURS.len()]));
    for ((name, colour), x) in legend.chain([("target", RED)]).zip((240..).step_by(160)) {
        let y = height as i32 - 22;
        area.draw(&Rectangle::new([(x, y), (x + 14, y + 14)], colour.filled()))?;
        area.draw(&Text::new(name.to_owned(), (x + 20, y + 1), ("sans-serif", 13)))?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::report::{Point, Sample};
    use super::*;

    #[test]
    fn a_picture_names_every_row_even_if_nothing_was_done() {
        let mut report = Report::new(vec!["d-engine".to_owned(), "etcd 3.7".to_owned()]);
        for (callers, own) in [(64, 0.0), (1000, 90.0)] {
            let point = Point { workload: "put", callers };
            report.add(point, 0, Sample { ops_per_s: own, ..Sample::default() });
            report.add(point, 1, Sample { ops_per_s: 10.0, ..Sample::default() });
        }
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        draw(&report, file.path()).expect("it can be written");
        let picture = std::fs::read_to_string(file.path()).expect("it was written");
        for text in ["put, 64", "put, 1000", "etcd 3.7", "target"] {
            assert!(picture.contains(text), "{text} is missing");
        }
    }
}
