//! Syscall programs: tables of syscalls that a small loop inside another process works through.
//!
//! Restore is compiled to such a table on the destination, and the few remote syscalls that capture
//! needs are one on the source. A table is plain data: it can be built and checked without a process
//! (see [`crate::arch`] for the loop that runs it). An argument may be the result of an earlier entry,
//! so that a descriptor returned by one call can be used by the next.

use crate::arch;

/// Size of an entry in bytes: operation, six arguments, flags, result.
pub const ENTRY_LEN: u64 = 72;
/// Offset of the result in an entry.
pub const RESULT_OFFSET: u64 = 64;

const FLAG_MUST: u64 = 1 << 8;
const FLAG_CLONE: u64 = 1 << 9;

/// An argument of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A plain value.
    Val(u64),
    /// The 64-bit word at this address at the time the entry runs.
    At(u64),
    /// The result of an earlier entry of the same program.
    Ret(Ref),
}

macro_rules! arg_from {
    ($($t:ty),*) => {$(impl From<$t> for Arg { fn from(v: $t) -> Self { Arg::Val(v as u64) } })*};
}
arg_from!(u64, u32, i64, i32, usize);

impl From<Ref> for Arg {
    fn from(r: Ref) -> Self {
        Arg::Ret(r)
    }
}

/// Names an entry of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ref(usize);

/// Operations of the loop that are not syscalls. Numbers start above every syscall number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Op {
    /// Adds the 32-bit `arg1` to the word at `arg0`, atomically.
    Add = 0x1_0000,
    /// Stores the 64-bit `arg1` at `arg0`.
    Store = 0x1_0001,
    /// Waits on the futex at `arg0` while it holds the 32-bit `arg1`.
    Wait = 0x1_0002,
    /// Continues at the entry at address `arg2` if the 32-bit word at `arg0` is `arg1`.
    JumpIf = 0x1_0003,
    /// Sets the stack pointer to `arg0`.
    SetStack = 0x1_0004,
    /// Leaves the loop by `rt_sigreturn` with the stack pointer at `arg0`.
    Sigreturn = 0x1_0005,
    /// Leaves the loop by loading the [`arch::Context`] at `arg0` (all integer registers, nothing else).
    Leave = 0x1_0006,
    /// Uses the matrix tiles once, configured by the 64 bytes at `arg0`, and releases them. Without this
    /// the kernel has no room yet for a thread's tile data, and `rt_sigreturn` silently restores
    /// nothing but x87 and SSE state (seen on Linux 6.18).
    TouchTiles = 0x1_0007,
}

/// A table of syscalls under construction, and the bytes its arguments point to.
#[derive(Debug)]
pub struct Program {
    entries_base: u64,
    data_base: u64,
    entries: Vec<u8>,
    data: Vec<u8>,
    names: Vec<String>,
}

impl Program {
    /// A program whose entries will lie at `entries_base` and whose data at `data_base` in the process
    /// that runs it.
    pub fn new(entries_base: u64, data_base: u64) -> Self {
        Self { entries_base, data_base, entries: Vec::new(), data: Vec::new(), names: Vec::new() }
    }

    /// Adds a syscall whose failure ends the program.
    pub fn must<const N: usize>(
        &mut self,
        what: impl Into<String>,
        nr: i64,
        args: [Arg; N],
    ) -> Ref {
        self.push(what.into(), nr as u64, &args, FLAG_MUST)
    }

    /// Adds a syscall that may fail; the result tells.
    pub fn may<const N: usize>(&mut self, what: impl Into<String>, nr: i64, args: [Arg; N]) -> Ref {
        self.push(what.into(), nr as u64, &args, 0)
    }

    /// Adds a `clone3` whose child continues at the entry that its new stack pointer points to.
    pub fn clone_thread(&mut self, what: impl Into<String>, args_at: u64, args_len: u64) -> Ref {
        let args = [Arg::Val(args_at), Arg::Val(args_len)];
        self.push(what.into(), libc::SYS_clone3 as u64, &args, FLAG_MUST | FLAG_CLONE)
    }

    /// Adds an operation of the loop itself.
    pub fn op<const N: usize>(&mut self, op: Op, args: [Arg; N]) -> Ref {
        self.push(format!("{op:?}"), op as u64, &args, 0)
    }

    fn push(&mut self, what: String, nr: u64, args: &[Arg], mut flags: u64) -> Ref {
        assert!(args.len() <= 6, "a syscall has at most six arguments");
        self.entries.extend_from_slice(&nr.to_le_bytes());
        for i in 0..6 {
            let word = match args.get(i).copied().unwrap_or(Arg::Val(0)) {
                Arg::Val(v) => v,
                Arg::At(address) => {
                    flags |= 1 << i;
                    address
                }
                Arg::Ret(r) => {
                    flags |= 1 << i;
                    self.result_address(r)
                }
            };
            self.entries.extend_from_slice(&word.to_le_bytes());
        }
        self.entries.extend_from_slice(&flags.to_le_bytes());
        self.entries.extend_from_slice(&0u64.to_le_bytes());
        self.names.push(what);
        Ref(self.names.len() - 1)
    }

    /// Adds bytes to the data, aligned to `align` (a power of two), and returns their address.
    pub fn data_aligned(&mut self, bytes: &[u8], align: usize) -> u64 {
        let at = (self.data_base as usize + self.data.len()).next_multiple_of(align);
        self.data.resize(at - self.data_base as usize, 0);
        self.data.extend_from_slice(bytes);
        at as u64
    }

    /// Adds bytes to the data, aligned to eight, and returns their address.
    pub fn data(&mut self, bytes: &[u8]) -> u64 {
        self.data_aligned(bytes, 8)
    }

    /// Adds a NUL-terminated string and returns its address. Bytes after an inner NUL are cut off.
    pub fn c_string(&mut self, bytes: &[u8]) -> u64 {
        let mut owned: Vec<u8> = bytes.iter().copied().take_while(|b| *b != 0).collect();
        owned.push(0);
        self.data_aligned(&owned, 1)
    }

    /// Adds 64-bit words and returns their address.
    pub fn words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.data(&bytes)
    }

    /// Overwrites words added before, at their address: a value known only at the end.
    ///
    /// # Panics
    /// If the words don't lie in the data so far.
    pub fn set_words(&mut self, address: u64, words: &[u64]) {
        let at = (address - self.data_base) as usize;
        for (i, word) in words.iter().enumerate() {
            self.data[at + 8 * i..at + 8 * i + 8].copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Address of the next entry to be added.
    pub fn next_address(&self) -> u64 {
        self.entries_base + self.entries.len() as u64
    }

    /// Address after the data so far.
    pub fn data_end(&self) -> u64 {
        self.data_base + self.data.len() as u64
    }

    /// Address of the result of an entry.
    pub fn result_address(&self, r: Ref) -> u64 {
        self.entries_base + r.0 as u64 * ENTRY_LEN + RESULT_OFFSET
    }

    /// The table, to be written at the entries base.
    pub fn entries(&self) -> &[u8] {
        &self.entries
    }

    /// The data, to be written at the data base.
    pub fn data_bytes(&self) -> &[u8] {
        &self.data
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// True when nothing was added.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Entries base.
    pub fn entries_base(&self) -> u64 {
        self.entries_base
    }

    /// Data base.
    pub fn data_base(&self) -> u64 {
        self.data_base
    }

    /// What the entry at `address` was meant to do, for error messages.
    pub fn name_at(&self, address: u64) -> Option<&str> {
        let index = address.checked_sub(self.entries_base)? / ENTRY_LEN;
        self.names.get(index as usize).map(String::as_str)
    }

    /// Result of an entry, from the bytes of a table that has run.
    ///
    /// # Panics
    /// When `ran` is not the table that `r` names an entry of.
    pub fn result(ran: &[u8], r: Ref) -> Result<u64, nix::errno::Errno> {
        let at = r.0 * ENTRY_LEN as usize + RESULT_OFFSET as usize;
        let raw = u64::from_le_bytes(ran[at..at + 8].try_into().expect("eight bytes"));
        arch::syscall_result(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_feed_later_arguments() {
        let mut p = Program::new(0x1000, 0x8000);
        let path = p.c_string(b"/etc/hosts\0ignored");
        let open = p.must("open /etc/hosts", libc::SYS_open, [path.into(), 0.into()]);
        p.must("dup3", libc::SYS_dup3, [open.into(), 7.into(), 0.into()]);
        assert_eq!(p.data_bytes(), b"/etc/hosts\0");
        let second = &p.entries()[ENTRY_LEN as usize..];
        assert_eq!(second[8..16], (0x1000 + RESULT_OFFSET).to_le_bytes());
        assert_eq!(second[56..64], (FLAG_MUST | 1).to_le_bytes());
        assert_eq!(p.name_at(0x1000 + ENTRY_LEN), Some("dup3"));
    }

    #[test]
    fn data_is_aligned() {
        let mut p = Program::new(0, 0x8001);
        assert_eq!(p.data_aligned(b"x", 64) % 64, 0);
        assert_eq!(p.data(b"y") % 8, 0);
    }
}
