//! placeholder

pub mod pages;
