//! Capture: from a frozen process to a manifest.

pub mod frozen_memory;
pub mod pages;
pub mod state;
