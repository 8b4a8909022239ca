//! A program goes on calling its vdso at the addresses it knows. Where the destination's kernel has
//! another vdso, the old image stays at its address as ordinary code whose functions jump to the new
//! kernel's.

use std::collections::BTreeMap;

const SHT_DYNSYM: u32 = 11;
const SECTION_LEN: usize = 64;
const SYMBOL_LEN: usize = 24;
const STT_FUNC: u8 = 2;
/// movabs r11, ADDRESS; jmp r11: of the registers a call may clobber, the one no argument is passed in.
const JUMP_LEN: usize = 13;
const IMAGE_LEN_MAX: usize = 64 * 1024;
const SYMBOLS_MAX: usize = 256;

/// A function of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Function {
    offset: u64,
    len: u64,
}

fn number<const N: usize>(image: &[u8], at: usize) -> Option<u64> {
    let bytes = image.get(at..at.checked_add(N)?)?;
    Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

/// The functions of a vdso image by name. `None` when it is no such image.
fn functions(image: &[u8]) -> Option<BTreeMap<&[u8], Function>> {
    if image.len() > IMAGE_LEN_MAX || !image.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = usize::try_from(number::<8>(image, 40)?).ok()?;
    let count = number::<2>(image, 60)? as usize;
    let section = |i: usize| table.checked_add(i.checked_mul(SECTION_LEN)?);
    let place = |at: usize| -> Option<(usize, usize)> {
        let offset = usize::try_from(number::<8>(image, at.checked_add(24)?)?).ok()?;
        Some((offset, usize::try_from(number::<8>(image, at.checked_add(32)?)?).ok()?))
    };
    let symbols = (0..count)
        .filter_map(section)
        .find(|at| number::<4>(image, at + 4) == Some(u64::from(SHT_DYNSYM)))?;
    let (first, len) = place(symbols)?;
    let (names, _) = place(section(number::<4>(image, symbols.checked_add(40)?)? as usize)?)?;
    let mut found = BTreeMap::new();
    for i in 0..(len / SYMBOL_LEN).min(SYMBOLS_MAX) {
        let at = first.checked_add(i * SYMBOL_LEN)?;
        let defined = number::<2>(image, at + 6)? != 0;
        if image.get(at + 4)? & 15 != STT_FUNC || !defined {
            continue;
        }
        let name = names.checked_add(number::<4>(image, at)? as usize)?;
        let name = image.get(name..)?.split(|b| *b == 0).next()?;
        let (offset, len) = (number::<8>(image, at + 8)?, number::<8>(image, at + 16)?);
        found.insert(name, Function { offset, len });
    }
    Some(found)
}

/// The image `old` with every function jumping to that of the same name in `new`, which lies at
/// `new_base`. Says why when that can't be done.
pub fn redirect(old: &[u8], new: &[u8], new_base: u64) -> Result<Vec<u8>, String> {
    let ours = functions(new).ok_or("the vdso of this kernel can't be read")?;
    let theirs = functions(old).ok_or("the vdso of the source's kernel can't be read")?;
    let mut image = old.to_vec();
    for (name, function) in theirs {
        let shown = String::from_utf8_lossy(name);
        let target = ours.get(name).ok_or(format!("its vdso has no {shown}"))?;
        let at = usize::try_from(function.offset).unwrap_or(usize::MAX);
        let room = at
            .checked_add(JUMP_LEN)
            .and_then(|end| image.get_mut(at..end))
            .filter(|_| function.len >= JUMP_LEN as u64)
            .ok_or(format!("{shown} of the source's vdso has no room for a jump"))?;
        room[..2].copy_from_slice(&[0x49, 0xbb]);
        room[2..10].copy_from_slice(&(new_base + target.offset).to_le_bytes());
        room[10..].copy_from_slice(&[0x41, 0xff, 0xe3]);
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::newborn::own_vdso;
    use crate::sys::mem::ProcMem;
    use proptest::prelude::*;

    fn own() -> Vec<u8> {
        let (start, end) = *own_vdso().last().expect("a vdso");
        let mut image = vec![0; (end - start) as usize];
        ProcMem::open(std::process::id() as i32).unwrap().read(start, &mut image).unwrap();
        image
    }

    #[test]
    fn every_function_jumps() {
        let image = own();
        let functions = functions(&image).expect("functions");
        assert!(functions.contains_key(&b"__vdso_clock_gettime"[..]));
        let patched = redirect(&image, &image, 0x7000_0000_0000).expect("redirect");
        for function in functions.values() {
            let at = function.offset as usize;
            assert_eq!(&patched[at..at + 2], [0x49, 0xbb]);
            let target = u64::from_le_bytes(patched[at + 2..at + 10].try_into().unwrap());
            assert_eq!(target, 0x7000_0000_0000 + function.offset);
        }
    }

    #[test]
    fn a_missing_function_is_named() {
        let image = own();
        let mut without = image.clone();
        let at = image.windows(13).position(|w| w == b"__vdso_getcpu").expect("a name");
        without[at + 7] = b'X';
        let refusal = redirect(&image, &without, 0).expect_err("a function is missing");
        assert!(refusal.contains("getcpu"), "{refusal}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_safely(mut bytes: Vec<u8>, cut in 0usize..8192) {
            let _ = functions(&bytes);
            bytes.splice(0..0, own().into_iter().take(cut));
            let _ = functions(&bytes);
        }
    }
}
