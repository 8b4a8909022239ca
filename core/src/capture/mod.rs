//! Capture: from a frozen process to a manifest.

pub mod assemble;
pub mod files;
pub mod flush;
pub mod frozen_memory;
pub mod page_hash;
pub mod pages;
pub mod presend;
pub mod state;
