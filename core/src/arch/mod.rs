//! Everything that depends on the processor architecture.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "Slipstream runs on x86-64; another architecture needs a module beside core/src/arch/x86_64"
);
