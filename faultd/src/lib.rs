//! The two sides of a migration and the page-fault service between them.

pub mod events;
pub mod pages;
