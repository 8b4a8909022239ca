//! CPU features that a program can see and may have chosen its code by.

use std::collections::BTreeSet;
use std::fs;

/// Names in `/proc/cpuinfo` of features that change what instructions a program may use. Others tell
/// of timers, caches, virtualisation and mitigations, and differ harmlessly between hosts.
const VISIBLE: &[&str] = &[
    "3dnow",
    "3dnowext",
    "3dnowprefetch",
    "abm",
    "adx",
    "aes",
    "amx_bf16",
    "amx_complex",
    "amx_fp16",
    "amx_int8",
    "amx_tile",
    "avx",
    "avx2",
    "avx10",
    "avx512_4fmaps",
    "avx512_4vnniw",
    "avx512_bf16",
    "avx512_bitalg",
    "avx512_fp16",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_vp2intersect",
    "avx512_vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vbmi",
    "avx512vl",
    "avx_ifma",
    "avx_ne_convert",
    "avx_vnni",
    "avx_vnni_int16",
    "avx_vnni_int8",
    "bmi1",
    "bmi2",
    "cldemote",
    "clflush",
    "clflushopt",
    "clwb",
    "clzero",
    "cmov",
    "cmpccxadd",
    "cx16",
    "cx8",
    "erms",
    "f16c",
    "fma",
    "fma4",
    "fsgsbase",
    "fsrm",
    "fxsr",
    "gfni",
    "hle",
    "lahf_lm",
    "lwp",
    "misalignsse",
    "mmx",
    "mmxext",
    "monitorx",
    "movbe",
    "movdir64b",
    "movdiri",
    "mwaitx",
    "ospke",
    "pclmulqdq",
    "pku",
    "pni",
    "popcnt",
    "prefetchi",
    "raoint",
    "rdpid",
    "rdpru",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha512",
    "sha_ni",
    "sm3",
    "sm4",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "tsc",
    "tsxldtrk",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "wbnoinvd",
    "xgetbv1",
    "xop",
    "xsave",
    "xsavec",
    "xsaveopt",
    "xsaves",
];

/// True if a program can tell whether the CPU has the feature.
pub(super) fn is_visible(flag: &str) -> bool {
    VISIBLE.contains(&flag)
}

/// Visible features of this host's first CPU, sorted.
pub(super) fn flags() -> BTreeSet<String> {
    parse(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn parse(cpuinfo: &str) -> BTreeSet<String> {
    let line = cpuinfo.lines().find_map(|l| l.strip_prefix("flags")?.split_once(':'));
    let words = line.map(|(_, flags)| flags.split_whitespace()).into_iter().flatten();
    words.filter(|flag| is_visible(flag)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_ones_only() {
        let got = parse("processor\t: 0\nflags\t\t: fpu vme sse2 constant_tsc avx\nbugs\t: x\n");
        assert_eq!(got.into_iter().collect::<Vec<_>>(), ["avx", "sse2"]);
        assert!(flags().contains("sse2"));
        assert!(parse("").is_empty());
    }
}
