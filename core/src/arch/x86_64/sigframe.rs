//! Signal frames: `rt_sigreturn` from one loads a thread's whole user state at once.
//!
//! A frame is the kernel's `struct ucontext` (arch/x86/include/uapi/asm/sigcontext.h) followed by an
//! XSAVE area. `mov rsp, address; mov eax, 15; syscall` restores integer registers, flags, code and
//! stack segment, extended state, signal mask and alternate stack. FS and GS base are not part of it.
//! The kernel silently falls back to x87 and SSE only if the software bytes of the area don't match its
//! expectations, hence the care with sizes here.

use super::Regs;
use super::xstate::{self, XsaveLayout};
use crate::error::Result;
use crate::manifest::AltStack;
use crate::program::Program;

/// Frames must lie at a multiple of this.
pub const FRAME_ALIGN: usize = 64;
/// Where rax lies in a frame: the result of a call made on behalf of the thread is stored here.
pub const RAX_OFFSET: u64 = MCONTEXT + 13 * 8;

const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;
const UCONTEXT_LEN: usize = 304;
const MCONTEXT: u64 = 40;
const SIGMASK: usize = 296;
/// XSAVE area: first multiple of 64 after the ucontext.
const FPSTATE: usize = UCONTEXT_LEN.next_multiple_of(FRAME_ALIGN);
const SW_RESERVED: usize = 464;
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
const SS_DISABLE: u32 = 2;
const SS_AUTODISARM: u32 = 1 << 31;
/// No mode that exists: `rt_sigreturn` goes on when the kernel refuses the stack of a frame
/// (`restore_altstack` in kernel/signal.c), and the thread keeps its own.
const SS_REFUSED: u32 = 4;

/// What a frame restores.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Integer registers; `orig_rax`, the segment bases and data segments are not restored.
    pub regs: &'a Regs,
    /// Blocked signals.
    pub sigmask: u64,
    /// Alternate signal stack; `None` leaves the thread the one it has.
    pub altstack: Option<AltStack>,
    /// XSAVE area in the standard format, as ptrace gives it.
    pub xstate: &'a [u8],
    /// Layout of the processor that saved `xstate`.
    pub saved_under: &'a XsaveLayout,
}

impl Frame<'_> {
    /// The bytes of the frame for `address` (a multiple of [`FRAME_ALIGN`]) on a processor with layout
    /// `here`. Fails when the thread uses state that this processor doesn't have.
    pub fn build(&self, address: u64, here: &XsaveLayout) -> Result<Vec<u8>> {
        let mut area = xstate::convert(self.xstate, self.saved_under, here)?;
        let used = xstate::in_use(&area)?;
        let end = seal(&mut area, used, here);
        let mut out = self.ucontext(address + FPSTATE as u64);
        out.resize(FPSTATE, 0);
        out.extend_from_slice(&area);
        // The second magic word lies right after the area; the kernel may read the rest ahead.
        out.resize(out.len().max(FPSTATE + end + 4), 0);
        out[FPSTATE + end..FPSTATE + end + 4].copy_from_slice(&MAGIC2.to_le_bytes());
        Ok(out)
    }

    /// Adds the frame to the data of a program and returns its address.
    pub fn place(&self, program: &mut Program, here: &XsaveLayout) -> Result<u64> {
        let address = program.data_end().next_multiple_of(FRAME_ALIGN as u64);
        let bytes = self.build(address, here)?;
        Ok(program.data_aligned(&bytes, FRAME_ALIGN))
    }

    fn ucontext(&self, fpstate: u64) -> Vec<u8> {
        let r = self.regs;
        // SS_ONSTACK only reports where the stack pointer was.
        let stack = self.altstack.unwrap_or_default();
        let ss_flags = self.altstack.map_or(SS_REFUSED, |s| s.flags & (SS_DISABLE | SS_AUTODISARM));
        let segments = r.cs & 0xffff | (r.gs & 0xffff) << 16 | (r.fs & 0xffff) << 32 | r.ss << 48;
        let words = [
            UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS,
            0,
            stack.sp,
            u64::from(ss_flags),
            stack.size,
            r.r8,
            r.r9,
            r.r10,
            r.r11,
            r.r12,
            r.r13,
            r.r14,
            r.r15,
            r.rdi,
            r.rsi,
            r.rbp,
            r.rbx,
            r.rdx,
            r.rax,
            r.rcx,
            r.rsp,
            r.rip,
            r.eflags,
            segments,
            0, // err
            0, // trapno
            0, // oldmask
            0, // cr2
            fpstate,
        ];
        let mut out: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        out.resize(SIGMASK, 0);
        out.extend_from_slice(&self.sigmask.to_le_bytes());
        out
    }
}

/// Fills in the software bytes of the area (`struct _fpx_sw_bytes`) and returns where it ends.
fn seal(area: &mut [u8], used: u64, here: &XsaveLayout) -> usize {
    let end = here.len_for(used);
    // Tile data is named only when there is some: the kernel refuses a size beyond its own buffer.
    let dynamic = 1u64 << xstate::TILE_DATA;
    let features = here.features() & !dynamic | used;
    let mut sw = Vec::with_capacity(48);
    sw.extend_from_slice(&MAGIC1.to_le_bytes());
    sw.extend_from_slice(&(end as u32 + 4).to_le_bytes());
    sw.extend_from_slice(&features.to_le_bytes());
    sw.extend_from_slice(&(end as u32).to_le_bytes());
    sw.resize(48, 0);
    area[SW_RESERVED..SW_RESERVED + 48].copy_from_slice(&sw);
    end
}

#[cfg(test)]
#[path = "sigframe_tests.rs"]
mod tests;
