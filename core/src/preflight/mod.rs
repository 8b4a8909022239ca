//! What is found out before anything is frozen: all that would stop a migration, in one pass.

mod cpu;
pub mod destination;
pub mod digest;
pub mod host;
pub mod requirements;
pub mod source;

use std::fmt;

/// Something that can't be moved as it is, or is missing at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// The object: `fd 7`, `mapping 7f12a000`, `thread 12`, `process 812`.
    pub object: String,
    /// What is the matter with it.
    pub reason: String,
    /// What to do about it.
    pub remedy: String,
}

impl Blocker {
    /// A blocker. Control characters (a file name may hold any) are escaped, so that it is one line.
    pub fn new(
        object: impl AsRef<str>,
        reason: impl AsRef<str>,
        remedy: impl AsRef<str>,
    ) -> Blocker {
        Blocker {
            object: one_line(object.as_ref()),
            reason: one_line(reason.as_ref()),
            remedy: one_line(remedy.as_ref()),
        }
    }

    /// What could not be found out counts as a blocker too.
    pub fn unknown(object: impl AsRef<str>, error: &crate::Error) -> Blocker {
        let remedy = match error {
            crate::Error::Gone { .. } => "nothing is left to move",
            _ => "see the reason; run slipstream as root, on a kernel with /proc",
        };
        Blocker::new(object, error.to_string(), remedy)
    }
}

fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.object, self.reason, self.remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocker_is_one_line() {
        let b = Blocker::new("fd 7", "/tmp/a\nb is a socket", "close it");
        assert_eq!(b.to_string(), "fd 7: /tmp/a\\nb is a socket; close it");
    }
}
