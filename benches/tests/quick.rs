//! The harness works: a small run yields every row. No figure is judged here but those that are about being right.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn a_small_run_yields_every_row() {
    let bench = Path::new(env!("CARGO_BIN_EXE_slipstream-bench"));
    let beside = bench.parent().expect("a folder").join("slipstream");
    if std::env::var_os("SLIPSTREAM_BIN").is_none() && !beside.exists() {
        println!(
            "SKIPPED a_small_run_yields_every_row: no slipstream binary; cargo build -p slipstream"
        );
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary folder");
    let json = directory.path().join("rows.json");
    // The harness limits every wait of its own.
    let output = Command::new(bench)
        .args(["--quick", "--json"])
        .arg(&json)
        .stdin(Stdio::null())
        .output()
        .expect("running the harness");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = std::fs::read_to_string(&json).expect("the JSON file");
    let all: Value = serde_json::from_str(&text).expect("JSON");
    let rows = all["rows"].as_array().expect("rows");
    assert!(rows.len() > 30, "{text}");
    for row in rows {
        assert!(row["median"].is_number(), "no figure: {row}");
    }
    for name in ["left in the program, all", "pages with wrong content, all"] {
        let row = rows.iter().find(|row| row["figure"] == name).expect(name);
        assert_eq!(row["median"], 0.0, "{text}");
    }
}
