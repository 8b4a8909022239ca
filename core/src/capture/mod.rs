//! Capture: from a frozen process to a manifest.

pub mod assemble;
pub mod frozen_memory;
pub mod pages;
pub mod state;
pub mod files;
