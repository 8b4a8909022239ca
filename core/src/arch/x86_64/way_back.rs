//! The way back of a thread whose tracer dies in the middle of a remote syscall, with nothing of ours in
//! the process yet.
//!
//! The syscall is made by a `syscall; ret` that the program has anyway, on a stack of ours: below the
//! thread's own, beyond the red zone, where the kernel would put the frame of a signal. What `ret` finds
//! there is the address of the program's own return from signal handlers (`mov eax, 15; syscall`: every C
//! library and the Go runtime have one), and that finds a signal frame with all the registers of the
//! thread. So whenever the tracer dies, the thread makes the call, if it has not yet, and is where it was.

use super::sigframe::{FRAME_ALIGN, Frame};
use crate::error::Result;

/// Below the stack pointer, and a leaf function's own (System V ABI, AMD64 supplement, 3.2.2).
const RED_ZONE: u64 = 128;

/// `syscall; ret`.
const SYSCALL_RET: [u8; 3] = [0x0f, 0x05, 0xc3];
/// `mov rax, 15; syscall` and `mov eax, 15; syscall`.
const SIGRETURN: [&[u8]; 2] = [
    &[0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05],
    &[0xb8, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05],
];

/// Instructions of the program by which a thread comes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WayBack {
    /// Address of `syscall; ret`.
    syscall: Option<u64>,
    /// Address of the return from signal handlers.
    sigreturn: Option<u64>,
}

/// What has to be written to the stack first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Landing {
    /// Where to; the stack pointer at the syscall.
    pub stack: u64,
    /// What.
    pub bytes: Vec<u8>,
}

impl WayBack {
    /// Looks for what is still missing in a piece of executable memory at `address`.
    pub fn look(&mut self, address: u64, code: &[u8]) {
        let find = |pattern: &[u8]| code.windows(pattern.len()).position(|w| w == pattern);
        let at = |offset: Option<usize>| offset.map(|o| address + o as u64);
        self.syscall = self.syscall.or_else(|| at(find(&SYSCALL_RET)));
        self.sigreturn = self.sigreturn.or_else(|| at(SIGRETURN.iter().find_map(|p| find(p))));
    }

    /// Nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.syscall.is_some() && self.sigreturn.is_some()
    }

    /// The `syscall` instruction to be used, if there is a way back from it. `read` says whether the
    /// memory of the process can be read: the program may have been replaced since.
    pub fn syscall(&self, read: impl Fn(u64, &mut [u8]) -> bool) -> Option<u64> {
        let holds = |address: u64, patterns: &[&[u8]]| {
            let mut there = [0u8; 9];
            patterns.iter().any(|p| {
                let there = &mut there[..p.len()];
                read(address, there) && there == *p
            })
        };
        let (syscall, sigreturn) = (self.syscall?, self.sigreturn?);
        (holds(syscall, &[&SYSCALL_RET]) && holds(sigreturn, &SIGRETURN)).then_some(syscall)
    }

    /// The stack for a thread that is to be found again as `frame` says.
    pub fn landing(&self, frame: &Frame<'_>, here: &super::xstate::XsaveLayout) -> Result<Landing> {
        // The frame's length doesn't depend on where it is.
        let len = frame.build(0, here)?.len() as u64;
        let align = FRAME_ALIGN as u64;
        let at = (frame.regs.rsp.saturating_sub(RED_ZONE + len) / align * align).max(8);
        let mut bytes = self.sigreturn.unwrap_or_default().to_le_bytes().to_vec();
        bytes.extend(frame.build(at, here)?);
        Ok(Landing { stack: at - 8, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_both_wherever_they_are() {
        let mut way = WayBack::default();
        let none = |_: u64, _: &mut [u8]| true;
        way.look(0x1000, &[0x90, 0x0f, 0x05, 0x90, 0x0f, 0x05, 0xc3]);
        assert_eq!(way, WayBack { syscall: Some(0x1004), sigreturn: None });
        assert_eq!(way.syscall(none), None, "half of it is of no use");
        way.look(0x2000, &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x05, 0xc3]);
        assert_eq!(way, WayBack { syscall: Some(0x1004), sigreturn: Some(0x2000) });
        let memory = |address: u64, out: &mut [u8]| {
            let code: &[u8] = if address == 0x1004 { &SYSCALL_RET } else { SIGRETURN[1] };
            out.copy_from_slice(&code[..out.len().min(code.len())]);
            out.len() <= code.len()
        };
        assert_eq!(way.syscall(|a, out| out.len() <= 7 && memory(a, out)), Some(0x1004));
        assert_eq!(way.syscall(none), None, "the program was replaced");
    }
}
