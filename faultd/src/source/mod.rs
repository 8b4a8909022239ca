//! The source's side of a migration.

pub mod commit;
pub mod interrupt;
pub mod local;
pub mod page_server;
pub mod session;
