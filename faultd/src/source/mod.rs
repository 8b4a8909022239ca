//! The source's side of a migration.

pub mod afterwards;
pub mod arguments;
pub mod check;
pub mod commit;
pub mod cost;
pub mod events_out;
pub mod figures;
pub mod gone;
pub mod interrupt;
pub mod local;
pub mod opening;
pub mod orphans;
pub mod page_server;
pub mod presend;
pub mod rdma;
pub mod record;
pub mod session;
