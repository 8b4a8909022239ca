//! Making the memory of a frozen process readable by an RDMA adapter, with no copy.
//!
//! An adapter reads memory that was *registered*: pinned, and entered in a protection domain. The kernel pins pages of
//! the process that asks. So the frozen process itself asks, by a remote syscall on an open device that it
//! was handed, and its own pages become regions of the agent's protection domain (`ib_umem_get` pins pages of
//! `current->mm`; shown by experiment on Linux 6.1 and 6.12).
//!
//! Only pages that exist and that no other process shares are registered: pinning any other page would make
//! the kernel allocate one.

mod abi;
mod plan;
mod registrar;

pub use abi::Region;
pub use plan::{Plan, RUN_BYTES_MIN};
pub use registrar::{Registrar, Target};
