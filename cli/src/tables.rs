//! What `check` and `status` say to people.

use crate::engine::Findings;
use crate::report::{fault_figures, grouped, one_line};
use slipstream_faultd::events::{Event, Role, Status};
use std::fmt::Write;

/// True when nothing that was found stands in the way.
pub fn all_clear(findings: &Findings) -> bool {
    let blocked = findings.preflight.as_ref().is_some_and(|p| !p.blockers.is_empty());
    !blocked && findings.facts.iter().all(|fact| fact.ok)
}

/// The findings as events, a line each.
pub fn findings_json(findings: &Findings) -> String {
    let facts = findings.facts.iter().cloned().map(Event::HostFact);
    let preflight = findings.preflight.iter().cloned().map(Event::Preflight);
    facts.chain(preflight).map(|event| event.to_line() + "\n").collect()
}

/// The findings as text; blockers in the words `migrate` would use.
pub fn findings_text(findings: &Findings, pid: Option<i32>) -> String {
    let mut text = String::new();
    let width = findings.facts.iter().map(|f| f.name.chars().count()).max().unwrap_or(0);
    for fact in &findings.facts {
        let mark = if fact.ok { "ok" } else { "NO" };
        let (name, detail) = (one_line(&fact.name), one_line(&fact.detail));
        line(&mut text, &format!("{mark}  {name:<width$}  {detail}"));
    }
    let (Some(preflight), Some(pid)) = (&findings.preflight, pid) else { return text };
    for b in &preflight.blockers {
        let what = one_line(&format!("{}: {}; {}", b.object, b.reason, b.remedy));
        line(&mut text, &format!("NO  {what}"));
    }
    if preflight.blockers.is_empty() {
        line(&mut text, &format!("ok  nothing stops process {pid} from moving"));
    }
    text
}

/// Migrations as events, a line each.
pub fn status_json(all: &[Status]) -> String {
    all.iter().cloned().map(|s| Event::Status(s).to_line() + "\n").collect()
}

/// Migrations as a table.
pub fn status_text(all: &[Status]) -> String {
    if all.is_empty() {
        return "no migrations and no moved processes on this host\n".into();
    }
    let head = ["ID", "ROLE", "PHASE", "PID", "PEER", "PAGES", "MORE"].map(String::from);
    let rows: Vec<_> = std::iter::once(head).chain(all.iter().map(cells)).collect();
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        line(&mut text, &cells.join("  "));
    }
    text
}

fn cells(status: &Status) -> [String; 7] {
    let role = match status.role {
        Role::Source => "source",
        Role::Destination => "destination",
    };
    let pages = status
        .figures
        .as_ref()
        .map(|f| format!("{}/{}", grouped(f.pages_present), grouped(f.pages_total)));
    let faults = status.figures.as_ref().map(fault_figures).unwrap_or_default();
    let more: Vec<&str> =
        [status.detail.as_str(), &faults].into_iter().filter(|s| !s.is_empty()).collect();
    [
        one_line(&status.id),
        role.into(),
        one_line(&status.phase),
        status.pid.map_or("-".into(), |pid| pid.to_string()),
        one_line(&status.peer),
        pages.unwrap_or_else(|| "-".into()),
        one_line(&more.join("; ")),
    ]
}

fn line(text: &mut String, line: &str) {
    writeln!(text, "{}", line.trim_end()).expect("a String takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipstream_faultd::events::{Blocker, Figures, HostFact, Preflight};

    fn fact(name: &str, ok: bool) -> HostFact {
        HostFact { name: name.into(), ok, detail: "as found".into(), read_us: None }
    }

    #[test]
    fn findings_name_everything_in_the_way() {
        let blocker = |object: &str| Blocker {
            object: object.into(),
            reason: "a socket".into(),
            remedy: "close it".into(),
        };
        let preflight = Preflight { blockers: vec![blocker("fd 7"), blocker("fd\n9")] };
        let facts = vec![fact("kernel", true), fact("userfaultfd", false)];
        let mut findings = Findings { facts, preflight: Some(preflight) };
        assert!(!all_clear(&findings));
        assert_eq!(
            findings_text(&findings, Some(7)),
            "ok  kernel       as found\n\
             NO  userfaultfd  as found\n\
             NO  fd 7: a socket; close it\n\
             NO  fd\u{fffd}9: a socket; close it\n"
        );
        assert_eq!(findings_json(&findings).lines().count(), 3);
        findings.facts.pop();
        findings.preflight = Some(Preflight::default());
        assert!(all_clear(&findings));
        assert!(
            findings_text(&findings, Some(7)).ends_with("nothing stops process 7 from moving\n")
        );
    }

    #[test]
    fn status_is_a_table() {
        let row = |id: &str, role, pid, figures| Status {
            id: id.into(),
            role,
            phase: "drain".into(),
            pid,
            peer: "10.0.0.2".into(),
            figures,
            detail: String::new(),
        };
        let figures = Figures { pages_present: 1000, pages_total: 2000, ..Figures::default() };
        let all = [
            row("a1", Role::Source, None, None),
            row("b22", Role::Destination, Some(7), Some(figures)),
        ];
        assert_eq!(
            status_text(&all),
            "ID   ROLE         PHASE  PID  PEER      PAGES        MORE\n\
             a1   source       drain  -    10.0.0.2  -\n\
             b22  destination  drain  7    10.0.0.2  1,000/2,000\n"
        );
        assert_eq!(status_json(&all).lines().count(), 2);
        assert!(status_text(&[]).starts_with("no migrations"));
    }
}
