//! Making a process from a manifest.
