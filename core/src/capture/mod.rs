//! Reading a process into a manifest.
