//! temporary
use super::Blocker; use super::requirements::Requirements; use crate::capture::files::StdioPolicy;
/// t
#[derive(Clone, Debug, Default)] pub struct Options { /// t
pub stdio: StdioPolicy }
/// t
#[derive(Debug)] pub struct SourceReport { /// t
pub requirements: Requirements }
/// t
pub fn check_process(pid: i32, _o: &Options) -> Result<SourceReport, Vec<Blocker>> {
  let s = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|_| vec![Blocker::new("process","does not exist","give another")])?;
  let ns = s.lines().find_map(|l| l.strip_prefix("NSpid:")).and_then(|l| l.split_whitespace().last()).and_then(|x| x.parse().ok()).unwrap_or(pid);
  Ok(SourceReport{requirements: Requirements{pid: ns, ..Requirements::default()}})
}
