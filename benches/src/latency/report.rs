//! Rows, as a table and as JSON.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;

/// Parts of a fault, with what they are.
pub const PARTS: [(&str, &str); 4] = [
    ("ask", "event read to request posted"),
    ("network", "posted to completion"),
    ("install", "completion to page copied and thread woken"),
    ("whole", "event read to thread woken"),
];

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// Single READs of a page, if there is RDMA: median and 99th percentile.
    pub read_us: Option<[f64; 2]>,
    /// `completed` of the move with nothing but faults on the network.
    pub alone: Value,
    /// With prefetch beside them.
    pub beside: Value,
    /// With prefetch alone.
    pub idle: Value,
    /// The same over TCP.
    pub tcp: Value,
    /// A copy of that program's memory here.
    pub copy_us: f64,
}

/// One figure.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What it is.
    pub figure: String,
    /// Of what.
    pub unit: &'static str,
    /// Median, or the figure itself; none if it can't be had.
    pub p50: Option<f64>,
    /// 99th percentile, of a time that was measured often.
    pub p99: Option<f64>,
}

/// All rows.
pub fn rows(m: &Measured) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |figure: &str, unit, p50: Option<f64>, p99: Option<f64>| {
        rows.push(Row { figure: figure.to_owned(), unit, p50, p99 });
    };
    let (read, read_p99) = m.read_us.map_or((None, None), |[p50, p99]| (Some(p50), Some(p99)));
    row("READ of a page, one at a time", "us", read, read_p99);
    for (title, event) in [("faults alone", &m.alone), ("faults beside prefetch", &m.beside)] {
        let of = |part: &str, key: &str| event["fault_parts"][part][key].as_f64();
        row(title, "", event["faults"].as_f64(), None);
        for (part, what) in PARTS {
            let label = format!("  {part}: {what}");
            row(&label, "us", of(part, "us_p50"), of(part, "us_p99"));
        }
        row("  network / READ", "", ratio(of("network", "us_p50"), read), None);
    }
    let cpu_ms = |event: &Value| event["source"]["cpu_us"].as_f64().map(|us| us / 1e3);
    let registration = m.idle["source"]["registration_cpu_us"].as_f64();
    let registered = m.idle["source"]["registered_bytes"].as_f64().filter(|bytes| *bytes > 0.0);
    let copied = m.idle["bytes"].as_f64().map(|bytes| m.copy_us / bytes);
    row(&format!("drain over {}", carrier(&m.idle)), "MB/s", m.idle["mb_per_s"].as_f64(), None);
    row("  processor time of the source", "ms", cpu_ms(&m.idle), None);
    row("drain over tcp", "MB/s", m.tcp["mb_per_s"].as_f64(), None);
    row("  processor time of the source", "ms", cpu_ms(&m.tcp), None);
    row(
        "processor time of the source, first / second",
        "",
        ratio(cpu_ms(&m.idle), cpu_ms(&m.tcp)),
        None,
    );
    let registration = registered.and_then(|bytes| registration.map(|us| us / bytes));
    row("registration / copy, per byte", "", ratio(registration, copied), None);
    rows
}

fn ratio(over: Option<f64>, under: Option<f64>) -> Option<f64> {
    over.zip(under).map(|(over, under)| over / under)
}

fn carrier(event: &Value) -> &str {
    event["transport"].as_str().unwrap_or("?")
}

/// One table, for people.
pub fn table(rows: &[Row]) -> String {
    let number = |value: Option<f64>| match value {
        None => "-".to_owned(),
        Some(v) if v.abs() >= 100.0 => format!("{v:.0}"),
        Some(v) if v.abs() >= 10.0 => format!("{v:.1}"),
        Some(v) => format!("{v:.2}"),
    };
    let mut text = format!("{:<60} {:>9} {:>9} unit\n", "figure", "median", "p99");
    for row in rows {
        let p99 = row.p99.map_or(String::new(), |v| number(Some(v)));
        let line = format!("{:<60} {:>9} {p99:>9} {}", row.figure, number(row.p50), row.unit);
        // Writing into a string can't fail.
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// The rows, and what they were made of.
pub fn write_json(path: &Path, rows: &[Row], measured: &Measured) -> Result<()> {
    let all = json!({"v": 1, "rows": rows, "measured": measured});
    let text = serde_json::to_string_pretty(&all).context("writing JSON")?;
    std::fs::write(path, text + "\n").with_context(|| path.display().to_string())
}
