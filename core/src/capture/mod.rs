//! Reading a process into a manifest.

pub mod files;
