//! temporary
use super::Blocker; use super::requirements::Requirements;
/// t
pub fn check_destination(_r: &Requirements) -> Vec<Blocker> { Vec::new() }
