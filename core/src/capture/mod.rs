//! Capture: from a frozen process to a manifest.

pub mod assemble;
pub mod files;
pub mod frozen_memory;
pub mod pages;
pub mod state;
