//! The extended state (x87, SSE, AVX, AVX-512, AMX, ...) in the standard XSAVE format.
//!
//! Where a component lies in the standard format is a property of the processor (CPUID leaf 0xD; Intel
//! and AMD put the protection-key register at different offsets), so an area is only meaningful
//! together with the [`XsaveLayout`] of the processor that saved it.

use crate::error::{Error, Result};
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

/// Legacy region and XSAVE header: what every area has.
pub const XSAVE_LEN_MIN: usize = 512 + 64;
/// Component number of AMX tile data, the one component the kernel hands out on demand only.
pub const TILE_DATA: u32 = 18;
/// State components whose place is fixed by the architecture: x87 and SSE.
const LEGACY: u64 = 0b11;
const XSTATE_BV: usize = 512;
/// The kernel stores XCR0 here in areas given out by ptrace.
const SAVED_XCR0: usize = 464;
const LEN_MAX: usize = 64 * 1024;

/// Which components a processor has enabled and where each lies in the standard format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XsaveLayout {
    features: u64,
    /// Offset and length in bytes of components 2..=62; zero for those not enabled.
    places: Vec<(u32, u32)>,
}

impl XsaveLayout {
    /// The layout of the processor this runs on.
    pub fn this_cpu() -> Self {
        const OSXSAVE: u32 = 1 << 27;
        // The intrinsic is a safe function in newer compilers only.
        #[allow(unused_unsafe)]
        // SAFETY: CPUID exists on every x86-64 processor.
        let has_xsave = unsafe { __cpuid(1) }.ecx & OSXSAVE != 0;
        let features = if has_xsave { xcr0() } else { LEGACY };
        let places = (0..63)
            .map(|i| if i < 2 || features >> i & 1 == 0 { (0, 0) } else { component(i) })
            .collect();
        Self { features, places }
    }

    /// Enabled components (XCR0).
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Length in bytes of an area that holds the components in `features`.
    pub fn len_for(&self, features: u64) -> usize {
        let used = self.places.iter().enumerate().filter(|(i, _)| features >> i & 1 == 1);
        used.map(|(_, &(at, len))| (at + len) as usize).fold(XSAVE_LEN_MIN, usize::max)
    }

    /// The layout as words, for a peer: features, then offset << 32 | length of each component.
    pub fn to_words(&self) -> Vec<u64> {
        let places = self.places.iter().map(|&(at, len)| u64::from(at) << 32 | u64::from(len));
        std::iter::once(self.features).chain(places).collect()
    }

    /// The layout from a peer's words; `None` when they make no sense.
    pub fn from_words(words: &[u64]) -> Option<Self> {
        let (&features, rest) = words.split_first()?;
        let places: Vec<(u32, u32)> = rest.iter().map(|w| ((w >> 32) as u32, *w as u32)).collect();
        let sane = |&(at, len): &(u32, u32)| {
            len == 0 || (at as usize >= XSAVE_LEN_MIN && at as usize + len as usize <= LEN_MAX)
        };
        (places.len() == 63 && features >> 63 == 0 && places.iter().all(sane))
            .then_some(Self { features, places })
    }

    /// Components of `source` that this processor lacks or keeps in another size.
    pub fn lacks(&self, source: &Self) -> u64 {
        let differs = |i: &u32| self.places[*i as usize].1 != source.places[*i as usize].1;
        let resized = (2..63).filter(differs).fold(0, |mask, i| mask | 1 << i);
        source.features & (!self.features | resized)
    }
}

fn component(i: u32) -> (u32, u32) {
    // The intrinsic is a safe function in newer compilers only.
    #[allow(unused_unsafe)]
    // SAFETY: CPUID leaf 0xD exists where OSXSAVE is set, which the caller checked.
    let leaf = unsafe { __cpuid_count(0xd, i) };
    (leaf.ebx, leaf.eax)
}

fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller checked OSXSAVE, so the instruction exists; it only writes the two registers.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

fn word(area: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(area[at..at + 8].try_into().expect("eight bytes"))
}

/// Components that hold something else than their initial value.
pub fn in_use(area: &[u8]) -> Result<u64> {
    if area.len() < XSAVE_LEN_MIN || area.len() > LEN_MAX {
        return Err(Error::Manifest(format!("XSAVE area of {} bytes", area.len())));
    }
    if word(area, XSTATE_BV + 8) != 0 {
        return Err(Error::Manifest("XSAVE area in the compacted format".into()));
    }
    Ok(word(area, XSTATE_BV))
}

/// Components that were enabled where the area was saved (0 when the area doesn't say).
pub fn saved_features(area: &[u8]) -> u64 {
    if area.len() < XSAVE_LEN_MIN { 0 } else { word(area, SAVED_XCR0) }
}

/// True when the thread holds AMX tile data: the destination thread must have touched a tile
/// register before a signal frame can restore it, because the kernel enlarges its buffer only then.
pub fn uses_tile_data(area: &[u8]) -> bool {
    in_use(area).is_ok_and(|f| f >> TILE_DATA & 1 == 1)
}

/// Rewrites an area saved under layout `from` for layout `to`. The result holds exactly the components
/// in use, and is as long as the kernel's own areas are.
pub fn convert(area: &[u8], from: &XsaveLayout, to: &XsaveLayout) -> Result<Vec<u8>> {
    let used = in_use(area)?;
    let missing = used & (to.lacks(from) | !to.features | !from.features);
    if missing != 0 {
        return Err(Error::Refused(format!(
            "a thread uses processor state this CPU does not have (XSAVE components {missing:#x}); \
             use a destination with the source's CPU features"
        )));
    }
    if area.len() < from.len_for(used) {
        return Err(Error::Manifest(format!(
            "XSAVE area of {} bytes is too short for components {used:#x}",
            area.len()
        )));
    }
    let dynamic = 1u64 << TILE_DATA;
    let mut out = vec![0; to.len_for(to.features & !dynamic | used)];
    out[..SAVED_XCR0].copy_from_slice(&area[..SAVED_XCR0]);
    out[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&used.to_le_bytes());
    for i in (2..63).filter(|i| used >> i & 1 == 1) {
        let (source, len) = from.places[i];
        let (source, dest, len) = (source as usize, to.places[i].0 as usize, len as usize);
        out[dest..dest + len].copy_from_slice(&area[source..source + len]);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_survives_the_wire() {
        let here = XsaveLayout::this_cpu();
        assert_eq!(here.features() & LEGACY, LEGACY);
        assert_eq!(XsaveLayout::from_words(&here.to_words()), Some(here.clone()));
        assert_eq!(here.lacks(&here), 0);
        assert_eq!(XsaveLayout::from_words(&[3, 1 << 32 | 8]), None);
        let mut hostile = here.to_words();
        hostile[3] = u64::MAX;
        assert_eq!(XsaveLayout::from_words(&hostile), None);
    }

    /// A made-up pair of processors that keep component 9 at different offsets.
    fn layout(features: u64, at: u32) -> XsaveLayout {
        let mut words = vec![0; 64];
        words[0] = features;
        words[1 + 9] = u64::from(at) << 32 | 8;
        XsaveLayout::from_words(&words).expect("sane")
    }

    #[test]
    fn components_move_to_the_offsets_of_the_other_cpu() {
        let (from, to) = (layout(0x203, 2688), layout(0x207, 832));
        let mut area = vec![0; 2696];
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&0x203u64.to_le_bytes());
        area[2688..2696].copy_from_slice(&0x55u64.to_le_bytes());
        let out = convert(&area, &from, &to).expect("fits");
        assert_eq!(word(&out, 832), 0x55);
        assert_eq!(out.len(), 840);
        assert!(convert(&area[..2690], &from, &to).is_err());
        assert!(convert(&area, &from, &layout(0x3, 832)).is_err());
        area[XSTATE_BV + 8] = 1;
        assert!(convert(&area, &from, &to).is_err());
    }
}
