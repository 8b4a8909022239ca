//! Making a process from a manifest.

pub mod files;
