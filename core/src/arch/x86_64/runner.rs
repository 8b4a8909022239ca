//! The loop that runs a [`crate::program::Program`] inside another process.
//!
//! It is position-independent, uses no stack, and keeps its state in rbx (the current entry) and r15
//! (the header), so that it can run in any thread without touching what the thread owns. A syscall
//! clobbers only rax, rcx and r11. When a syscall that must succeed fails, the address of its entry is
//! stored in the first word of the header and the process exits: only a process that exists for the
//! restore runs such entries.

use std::arch::global_asm;

global_asm!(
    ".pushsection .text.slipstream_runner, \"ax\", @progbits",
    ".balign 64",
    ".globl slipstream_runner_start",
    "slipstream_runner_start:",
    // next entry
    "2:",
    "mov rax, [rbx]",
    "mov r12, [rbx + 56]",
    "mov rdi, [rbx + 8]",
    "test r12b, 1",
    "jz 3f",
    "mov rdi, [rdi]",
    "3: mov rsi, [rbx + 16]",
    "test r12b, 2",
    "jz 3f",
    "mov rsi, [rsi]",
    "3: mov rdx, [rbx + 24]",
    "test r12b, 4",
    "jz 3f",
    "mov rdx, [rdx]",
    "3: mov r10, [rbx + 32]",
    "test r12b, 8",
    "jz 3f",
    "mov r10, [r10]",
    "3: mov r8, [rbx + 40]",
    "test r12b, 16",
    "jz 3f",
    "mov r8, [r8]",
    "3: mov r9, [rbx + 48]",
    "test r12b, 32",
    "jz 3f",
    "mov r9, [r9]",
    "3: cmp rax, 0x10000",
    "jae 5f",
    "syscall",
    "test r12d, 0x200",
    "jz 4f",
    "test rax, rax",
    "jnz 4f",
    // A new thread: its table is where its stack pointer points.
    "mov rbx, rsp",
    "jmp 2b",
    "4: mov [rbx + 64], rax",
    "test r12d, 0x100",
    "jz 6f",
    "cmp rax, -4095",
    "jae 9f",
    "6: add rbx, 72",
    "jmp 2b",
    // operations
    "5: je 10f",
    "cmp rax, 0x10001",
    "je 11f",
    "cmp rax, 0x10002",
    "je 12f",
    "cmp rax, 0x10003",
    "je 14f",
    "cmp rax, 0x10004",
    "je 15f",
    "cmp rax, 0x10005",
    "je 16f",
    "cmp rax, 0x10006",
    "je 17f",
    "cmp rax, 0x10007",
    "je 18f",
    "jmp 9f",
    "10: lock add dword ptr [rdi], esi",
    "jmp 6b",
    "11: mov [rdi], rsi",
    "jmp 6b",
    // Wait while [rdi] == esi: FUTEX_WAIT without a time-out, so that a restart block is left alone.
    "12: mov r13, rdi",
    "mov r14, rsi",
    "13: cmp dword ptr [r13], r14d",
    "jne 6b",
    "mov rdi, r13",
    "xor esi, esi",
    "mov edx, r14d",
    "xor r10d, r10d",
    "mov eax, 202",
    "syscall",
    "jmp 13b",
    "14: cmp dword ptr [rdi], esi",
    "jne 6b",
    "mov rbx, rdx",
    "jmp 2b",
    "15: mov rsp, rdi",
    "jmp 6b",
    "16: mov rsp, rdi",
    "mov eax, 15",
    "syscall",
    "ud2",
    // Leave: pop fifteen registers, then an interrupt frame. Signals must be blocked or rsp-safe here:
    // the frame is never below rsp while a signal could be taken, because the last entry before this
    // one decides the mask and the handler's frame goes below the context.
    "17: mov r15, [rdi]",
    "mov r14, [rdi + 8]",
    "mov r13, [rdi + 16]",
    "mov r12, [rdi + 24]",
    "mov rbp, [rdi + 32]",
    "mov rbx, [rdi + 40]",
    "mov r11, [rdi + 48]",
    "mov r10, [rdi + 56]",
    "mov r9, [rdi + 64]",
    "mov r8, [rdi + 72]",
    "mov rax, [rdi + 80]",
    "mov rcx, [rdi + 88]",
    "mov rdx, [rdi + 96]",
    "mov rsi, [rdi + 104]",
    "lea rsp, [rdi + 112]",
    "pop rdi",
    "iretq",
    // ldtilecfg [rdi]; tilezero tmm0; tilerelease
    "18: .byte 0xc4, 0xe2, 0x78, 0x49, 0x07",
    ".byte 0xc4, 0xe2, 0x7b, 0x49, 0xc0",
    ".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0",
    "jmp 6b",
    // failure: header word 0 = entry, word 1 (32 bits) += 1 and woken, then exit_group(70)
    "9: mov [r15], rbx",
    "lea rdi, [r15 + 8]",
    "lock add dword ptr [rdi], 1",
    "mov esi, 1",
    "mov edx, 0x7fffffff",
    "mov eax, 202",
    "syscall",
    "mov edi, 70",
    "mov eax, 231",
    "syscall",
    "ud2",
    // Where the threads of a parked process are: whatever wakes them, they only pause.
    ".globl slipstream_pause",
    "slipstream_pause:",
    "mov eax, 34",
    "syscall",
    "jmp slipstream_pause",
    ".globl slipstream_runner_end",
    "slipstream_runner_end:",
    ".popsection",
);

unsafe extern "C" {
    static slipstream_runner_start: u8;
    static slipstream_pause: u8;
    static slipstream_runner_end: u8;
}

/// The machine code of the loop.
#[derive(Clone, Copy, Debug)]
pub struct Runner {
    /// The code, to be copied to any executable address; its first byte is the entry.
    pub code: &'static [u8],
    /// Offset in the code of the loop that only pauses, for parked threads.
    pub pause_offset: u64,
}

/// The loop. Entered at its first byte with rbx = address of the first entry, r15 = header address.
pub fn runner() -> Runner {
    let start = &raw const slipstream_runner_start;
    let end = &raw const slipstream_runner_end;
    // SAFETY: both symbols delimit one piece of the text section, defined above, readable for the
    // whole life of the program.
    let code = unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) };
    let pause = &raw const slipstream_pause;
    Runner { code, pause_offset: pause as u64 - start as u64 }
}
