//! Integer registers as ptrace and signal frames lay them out.

use libc::c_void;
use nix::errno::Errno;

/// `struct user_regs_struct`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // named as in sys/user.h
pub struct Regs {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// Size of [`Regs`] in bytes.
pub const REGS_LEN: usize = 27 * 8;
const _: () = assert!(size_of::<Regs>() == REGS_LEN);

impl Regs {
    /// For ptrace: where the kernel reads or writes the structure.
    pub fn as_mut_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self).cast()
    }

    /// The general registers, but for the stack pointer.
    pub fn general(&self) -> [u64; 15] {
        let r = self;
        [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
            r.r13, r.r14, r.r15,
        ]
    }

    /// The structure as little-endian words, for the manifest.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words().iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// The structure from a manifest; `None` when the length is wrong.
    ///
    /// # Panics
    /// Never: the length is checked.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != REGS_LEN {
            return None;
        }
        let mut w = bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().expect("8")));
        let mut next = || w.next().expect("27 words");
        Some(Self {
            r15: next(),
            r14: next(),
            r13: next(),
            r12: next(),
            rbp: next(),
            rbx: next(),
            r11: next(),
            r10: next(),
            r9: next(),
            r8: next(),
            rax: next(),
            rcx: next(),
            rdx: next(),
            rsi: next(),
            rdi: next(),
            orig_rax: next(),
            rip: next(),
            cs: next(),
            eflags: next(),
            rsp: next(),
            ss: next(),
            fs_base: next(),
            gs_base: next(),
            ds: next(),
            es: next(),
            fs: next(),
            gs: next(),
        })
    }

    fn words(&self) -> [u64; 27] {
        [
            self.r15,
            self.r14,
            self.r13,
            self.r12,
            self.rbp,
            self.rbx,
            self.r11,
            self.r10,
            self.r9,
            self.r8,
            self.rax,
            self.rcx,
            self.rdx,
            self.rsi,
            self.rdi,
            self.orig_rax,
            self.rip,
            self.cs,
            self.eflags,
            self.rsp,
            self.ss,
            self.fs_base,
            self.gs_base,
            self.ds,
            self.es,
            self.fs,
            self.gs,
        ]
    }
}

/// What [`crate::program::Op::Leave`] loads: fifteen integer registers and the interrupt frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context(pub Regs);

impl Context {
    /// Words in the order the loop pops them: r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx,
    /// rdx, rsi, rdi, then rip, cs, eflags, rsp, ss.
    pub fn words(&self) -> [u64; 20] {
        let r = &self.0;
        [
            r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx,
            r.rdx, r.rsi, r.rdi, r.rip, r.cs, r.eflags, r.rsp, r.ss,
        ]
    }
}

/// Points registers at the runner (or any code): `entries` is its first entry, `header` its header.
/// The thread forgets that it was in a syscall, so that the kernel restarts nothing.
pub fn set_start(regs: &mut Regs, code: u64, entries: u64, header: u64) {
    regs.rip = code;
    regs.rbx = entries;
    regs.r15 = header;
    regs.rax = 0;
    regs.orig_rax = u64::MAX;
}

/// Sets up one syscall at `insn`, the address of a `syscall` instruction.
pub fn set_syscall(regs: &mut Regs, insn: u64, nr: i64, args: [u64; 6]) {
    regs.rip = insn;
    regs.rax = nr as u64;
    regs.orig_rax = u64::MAX;
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
}

/// Raw return value of the syscall a thread has just left.
pub fn return_value(regs: &Regs) -> u64 {
    regs.rax
}

/// The address of the entry that a thread in the runner is at.
pub fn current_entry(regs: &Regs) -> u64 {
    regs.rbx
}

/// The instruction that enters the kernel.
pub const SYSCALL_INSN: [u8; 2] = [0x0f, 0x05];

/// A raw syscall return value as a result.
pub fn syscall_result(raw: u64) -> Result<u64, Errno> {
    let signed = raw as i64;
    if (-4095..0).contains(&signed) { Err(Errno::from_raw(-signed as i32)) } else { Ok(raw) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip() {
        let regs = Regs { r15: 1, rip: 2, gs: 3, orig_rax: u64::MAX, ..Regs::default() };
        assert_eq!(Regs::from_bytes(&regs.to_bytes()), Some(regs));
        assert_eq!(Regs::from_bytes(&[0; 8]), None);
    }

    #[test]
    fn errors_are_the_last_page() {
        assert_eq!(syscall_result(-2i64 as u64), Err(Errno::ENOENT));
        assert_eq!(syscall_result(0x7fff_ffff_f000), Ok(0x7fff_ffff_f000));
    }
}
