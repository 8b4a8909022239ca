//! End-to-end tests of Slipstream: two hosts, the real binary between them, and programs that check themselves.
//!
//! A test makes [`Hosts`] (network namespaces of its own), starts an agent and a [`Program`] there, migrates the program and asks it
//! for its verdict. Everything that was started lives in those namespaces, which is how it is all found and ended again,
//! also after a panic. Whatever takes too long panics with what it was waiting for, and dropping the hosts then prints every log and
//! the state of every process.
//!
//! The binary under test is `$SLIPSTREAM_BIN`, or `slipstream` in the target directory these tests were built into.
#![allow(clippy::missing_panics_doc, reason = "a test harness says by panicking what went wrong")]

pub mod build;
pub mod cgroup;
pub mod chaos;
pub mod compare;
pub mod far;
pub mod host;
pub mod hosts;
pub mod huge_pages;
pub mod migration;
pub mod moves;
pub mod namespace;
pub mod process;
pub mod program;
pub mod proxy;
pub mod settle;
pub mod stepper;
pub mod wait;

pub use build::{Build, Linkage};
pub use hosts::{Agent, Hosts, Side};
pub use migration::{Migration, Outcome};
pub use moves::{moves, skipped};
pub use process::Moved;
pub use program::Program;
