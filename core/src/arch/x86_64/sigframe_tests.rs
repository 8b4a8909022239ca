//! A forked child leaves through a frame full of odd values and reports what it finds itself with.

use super::*;
use std::arch::global_asm;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

/// What the landing code writes: eighteen words of registers, mask, alternate stack, XSAVE area.
const DUMP_XSAVE: usize = 192;
const DUMP_LEN: usize = DUMP_XSAVE + 16384;

global_asm!(
    ".pushsection .bss.slipstream_test, \"aw\", @nobits",
    ".balign 64",
    "slipstream_test_dump: .skip {len}",
    ".balign 64",
    "slipstream_test_stack: .skip 4096",
    "slipstream_test_stack_end: .skip 64",
    "slipstream_test_fd: .skip 8",
    ".popsection",
    ".pushsection .text.slipstream_test, \"ax\", @progbits",
    "slipstream_test_landing:",
    "mov [rip + slipstream_test_dump], r8",
    "mov [rip + slipstream_test_dump + 8], r9",
    "mov [rip + slipstream_test_dump + 16], r10",
    "mov [rip + slipstream_test_dump + 24], r11",
    "mov [rip + slipstream_test_dump + 32], r12",
    "mov [rip + slipstream_test_dump + 40], r13",
    "mov [rip + slipstream_test_dump + 48], r14",
    "mov [rip + slipstream_test_dump + 56], r15",
    "mov [rip + slipstream_test_dump + 64], rdi",
    "mov [rip + slipstream_test_dump + 72], rsi",
    "mov [rip + slipstream_test_dump + 80], rbp",
    "mov [rip + slipstream_test_dump + 88], rbx",
    "mov [rip + slipstream_test_dump + 96], rdx",
    "mov [rip + slipstream_test_dump + 104], rax",
    "mov [rip + slipstream_test_dump + 112], rcx",
    "mov [rip + slipstream_test_dump + 120], rsp",
    "pushfq",
    "pop [rip + slipstream_test_dump + 128]",
    "mov [rip + slipstream_test_dump + 136], cs",
    "mov [rip + slipstream_test_dump + 138], ss",
    "cld",
    "mov eax, -1",
    "mov edx, -1",
    "xsave [rip + slipstream_test_dump + {xsave}]",
    "mov eax, 14", // rt_sigprocmask(_, NULL, &mask, 8)
    "xor edi, edi",
    "xor esi, esi",
    "lea rdx, [rip + slipstream_test_dump + 144]",
    "mov r10d, 8",
    "syscall",
    "mov eax, 131", // sigaltstack(NULL, &old)
    "xor edi, edi",
    "lea rsi, [rip + slipstream_test_dump + 152]",
    "syscall",
    "mov eax, 1", // write
    "mov rdi, [rip + slipstream_test_fd]",
    "lea rsi, [rip + slipstream_test_dump]",
    "mov edx, {len}",
    "syscall",
    "xor edi, edi",
    "mov eax, 231",
    "syscall",
    "ud2",
    ".popsection",
    len = const DUMP_LEN,
    xsave = const DUMP_XSAVE,
);

unsafe extern "C" {
    static slipstream_test_landing: u8;
    static slipstream_test_stack_end: u8;
    static mut slipstream_test_fd: u64;
}

/// Forks a child that may touch a tile register and leaves through the frame; returns its dump.
fn run(frame: &[u8], tiles: bool) -> Vec<u8> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: both descriptors are fresh and owned by nobody else.
    let (mut reader, writer) = unsafe { (File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])) };
    // SAFETY: the child calls no allocator and no lock: it stores one word, makes syscalls and jumps.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: single-threaded here; the frame is a live buffer that outlives the jump.
        unsafe {
            slipstream_test_fd = writer.as_raw_fd() as u64;
            libc::alarm(20);
            if tiles && !touch_tiles() {
                libc::_exit(9);
            }
            std::arch::asm!("mov rsp, {f}", "mov eax, 15", "syscall", "ud2",
                f = in(reg) frame.as_ptr(), options(noreturn));
        }
    }
    drop(writer);
    let mut dump = Vec::new();
    reader.read_to_end(&mut dump).expect("read dump");
    let mut status = 0;
    // SAFETY: `status` outlives the call; the child is ours.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "child ended with status {status:#x}");
    assert_eq!(dump.len(), DUMP_LEN);
    dump
}

/// Makes the kernel give this thread room for tile data.
///
/// # Safety
/// The processor must have AMX.
unsafe fn touch_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    // SAFETY: arch_prctl with this code takes a number.
    if unsafe {
        libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, i64::from(xstate::TILE_DATA))
    } != 0
    {
        return false;
    }
    let mut config = [0u8; 64];
    config[0] = 1; // palette
    config[16] = 64; // bytes a row of tile 0
    config[48] = 16; // rows of tile 0
    // SAFETY: the caller vouches for AMX; the configuration is 64 live bytes; tiles are released.
    unsafe {
        std::arch::asm!("ldtilecfg [{c}]", "tilezero tmm0", "tilerelease", c = in(reg) config.as_ptr(),
            options(nostack));
    }
    true
}

fn odd_area(here: &XsaveLayout, features: u64) -> Vec<u8> {
    let mut area = vec![0u8; here.len_for(features)];
    area[0..2].copy_from_slice(&0x027fu16.to_le_bytes()); // x87 control word
    area[4] = 0xff; // all registers in use
    area[24..28].copy_from_slice(&0x3fa0u32.to_le_bytes()); // MXCSR: round down, masks, a sticky flag
    for st in 0..8 {
        let at = 32 + st * 16;
        area[at + 7] = 0x80 | st as u8;
        area[at + 8..at + 10].copy_from_slice(&0x3fffu16.to_le_bytes());
    }
    for (i, b) in area[160..416].iter_mut().enumerate() {
        *b = (i * 7 + 3) as u8;
    }
    for i in (2..63).filter(|i| features >> i & 1 == 1) {
        let at = here.len_for(1 << i);
        let len = here.to_words()[1 + i] as u32 as usize;
        for (k, b) in area[at - len..at].iter_mut().enumerate() {
            *b = (k * 5 + i) as u8;
        }
        if i == 17 {
            // Tile configuration: only a valid one can be loaded.
            area[at - len..at].fill(0);
            area[at - len] = 1;
            area[at - len + 16] = 64;
            area[at - len + 48] = 16;
        }
    }
    area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&features.to_le_bytes());
    area
}

const XSTATE_BV: usize = 512;

fn odd_regs() -> Regs {
    let rip = &raw const slipstream_test_landing as u64;
    let rsp = &raw const slipstream_test_stack_end as u64;
    Regs {
        r15: 0x15_1515,
        r14: 0x14,
        r13: u64::MAX,
        r12: 0x12,
        rbp: 0xbbbb_0000_bbbb,
        rbx: 0xb,
        r11: 0x11_1111_1111,
        r10: 10,
        r9: 9,
        r8: 8,
        rax: -512i64 as u64,
        rcx: 0xcccc_cccc_cccc,
        rdx: 0xd,
        rsi: 0x51,
        rdi: 0xd1,
        orig_rax: 7,
        rip,
        cs: 0x33,
        eflags: 0x202 | 0x8d5 | 0x400, // carry, parity, adjust, zero, sign, overflow, direction
        rsp,
        ss: 0x2b,
        ..Regs::default()
    }
}

fn check(features: u64, tiles: bool) {
    let here = XsaveLayout::this_cpu();
    let area = odd_area(&here, features);
    let regs = odd_regs();
    let altstack = AltStack { sp: 0x7000_0000, flags: 1, size: 65536 };
    let sigmask = 0xffff_0000_0000_0f0f & !(1 << 8 | 1 << 18 | 1 << 13);
    let frame =
        Frame { regs: &regs, sigmask, altstack: Some(altstack), xstate: &area, saved_under: &here };
    // The frame's address is only known once there is room for it.
    let len = frame.build(0, &here).expect("build").len();
    let mut room = vec![0u8; len + FRAME_ALIGN];
    let shift = room.as_ptr().align_offset(FRAME_ALIGN);
    let bytes = frame.build(room.as_ptr() as u64 + shift as u64, &here).expect("build");
    room[shift..shift + len].copy_from_slice(&bytes);
    let dump = run(&room[shift..shift + len], tiles);

    let word = |i: usize| u64::from_le_bytes(dump[i * 8..i * 8 + 8].try_into().expect("8"));
    let want = [
        regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15, regs.rdi,
        regs.rsi, regs.rbp, regs.rbx, regs.rdx, regs.rax, regs.rcx, regs.rsp,
    ];
    for (i, want) in want.into_iter().enumerate() {
        assert_eq!(word(i), want, "register word {i}");
    }
    assert_eq!(word(16) & 0xcd5, regs.eflags & 0xcd5);
    assert_eq!(word(17) as u32, 0x2b_0033);
    assert_eq!(word(18), sigmask);
    assert_eq!((word(19), word(20) as u32, word(21)), (altstack.sp, 0, altstack.size));
    let xsave = &dump[DUMP_XSAVE..];
    assert_eq!(xsave[0..2], area[0..2], "x87 control");
    assert_eq!(xsave[24..28], area[24..28], "MXCSR");
    assert_eq!(xsave[32..416], area[32..416], "x87 and xmm registers");
    assert_eq!(xsave[XSTATE_BV] & features as u8, features as u8);
    for i in (2..63).filter(|i| features >> i & 1 == 1) {
        let end = here.len_for(1 << i);
        let len = here.to_words()[1 + i] as u32 as usize;
        assert!(xsave[end - len..end] == area[end - len..end], "XSAVE component {i}");
    }
}

/// x87, SSE, AVX, AVX-512 as far as this processor has them.
const VECTORS: u64 = 0b1110_0111;

#[test]
fn a_frame_restores_everything() {
    let features = VECTORS & XsaveLayout::this_cpu().features();
    println!("XSAVE components tested: {features:#x}");
    check(features, false);
}

#[test]
fn a_frame_with_legacy_state_only() {
    check(0b11, false);
}

#[test]
fn a_frame_restores_tiles() {
    let here = XsaveLayout::this_cpu().features();
    if here >> xstate::TILE_DATA & 1 == 0 {
        println!("not tested: this processor has no AMX tiles");
        return;
    }
    check(VECTORS & here | 0b11 << 17, true);
}

#[test]
fn unknown_components_are_refused() {
    let here = XsaveLayout::this_cpu();
    let mut area = odd_area(&here, 0b11);
    area[XSTATE_BV + 7] = 0x20;
    let regs = Regs::default();
    let frame =
        Frame { regs: &regs, sigmask: 0, altstack: None, xstate: &area, saved_under: &here };
    assert!(frame.build(0, &here).is_err());
}
