//! A histogram of fault times as SVG: how many faults took how long, on a logarithmic axis.

use super::report::Measured;
use serde_json::Value;
use std::fmt::Write as _;

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 46.0;

struct Series {
    name: &'static str,
    colour: &'static str,
    /// Upper end in microseconds, share of all.
    buckets: Vec<(f64, f64)>,
}

/// The picture.
pub fn histogram(m: &Measured) -> String {
    let all = [
        series("network, alone", "#1b6ca8", &m.alone, "network"),
        series("whole, alone", "#7fb3d5", &m.alone, "whole"),
        series("network, beside prefetch", "#b03a2e", &m.beside, "network"),
        series("whole, beside prefetch", "#e6a39c", &m.beside, "whole"),
    ];
    let ends = || all.iter().flat_map(|s| &s.buckets).map(|b| b.0);
    let low = 10f64.powf(ends().fold(f64::INFINITY, f64::min).clamp(0.1, 1e6).log10().floor());
    let high = 10f64.powf(ends().fold(0.0, f64::max).clamp(low * 10.0, 1e8).log10().ceil());
    let most = all.iter().flat_map(|s| &s.buckets).map(|b| b.1).fold(0.01, f64::max);
    let x = |us: f64| LEFT + (WIDTH - LEFT - RIGHT) * (us / low).log10() / (high / low).log10();
    let y = |share: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share / most;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"15\">Page faults during a drain: how long they took</text>\n"
    );
    axes(&mut svg, (low, high), most, &x, &y);
    for (index, series) in all.iter().enumerate() {
        line(&mut svg, series, &x, &y);
        let at = LEFT + 190.0 * index as f64;
        // Writing into a string can't fail.
        let _ = writeln!(
            svg,
            "<rect x=\"{at}\" y=\"32\" width=\"14\" height=\"10\" fill=\"{}\"/><text x=\"{}\" y=\"41\">{}</text>",
            series.colour,
            at + 20.0,
            series.name
        );
    }
    svg + "</svg>\n"
}

fn series(name: &'static str, colour: &'static str, event: &Value, part: &str) -> Series {
    let pairs = event["fault_parts"][part]["histogram_us"].as_array();
    let pairs = pairs.into_iter().flatten().filter_map(|p| Some((p[0].as_f64()?, p[1].as_f64()?)));
    let counted: Vec<(f64, f64)> = pairs.collect();
    let all = counted.iter().map(|b| b.1).sum::<f64>().max(1.0);
    let buckets = counted.into_iter().map(|(end, count)| (end, count / all)).collect();
    Series { name, colour, buckets }
}

fn axes(
    svg: &mut String,
    (low, high): (f64, f64),
    most: f64,
    x: &impl Fn(f64) -> f64,
    y: &impl Fn(f64) -> f64,
) {
    let mut us = low;
    while us <= high * 1.001 {
        let (at, floor) = (x(us), y(0.0));
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{floor:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{us}</text>",
            floor + 16.0
        );
        us *= 10.0;
    }
    for part in 0..=4 {
        let share = most * f64::from(part) / 4.0;
        let at = y(share);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#eee\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.0} %</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            share * 100.0
        );
    }
    let middle = f64::midpoint(LEFT, WIDTH - RIGHT);
    let _ = writeln!(
        svg,
        "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">microseconds</text>",
        HEIGHT - 8.0
    );
}

/// Steps: a bucket reaches from the one before it, or a quarter of a doubling, to its end.
fn line(svg: &mut String, series: &Series, x: &impl Fn(f64) -> f64, y: &impl Fn(f64) -> f64) {
    let mut points = String::new();
    for (end, share) in &series.buckets {
        let begin = end / 2f64.powf(0.25);
        for (at, height) in [(begin, 0.0), (begin, *share), (*end, *share), (*end, 0.0)] {
            let _ = write!(points, "{:.1},{:.1} ", x(at), y(height));
        }
    }
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\"/>",
        points.trim_end(),
        series.colour
    );
}
