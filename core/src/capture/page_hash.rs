//! A fast keyed hash of pages, to tell whether a page is still what it was.
//!
//! NH with 64-bit words, twice with a shifted key (Toeplitz): Black, Halevi, Krawczyk, Krovetz and
//! Rogaway, "UMAC: Fast and Secure Message Authentication" (1999), theorem 4.3. Whatever two different
//! pages hold, they collide with a chance of at most 2^-128 over the choice of the key, which is random
//! and stays in this process. One page takes a few hundred nanoseconds: memory is the limit.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::Read;

/// Bytes of a page.
pub const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// The second pass uses the key two words further on.
const SHIFT: usize = 2;

/// Hash of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHash([u64; 4]);

/// A random key.
#[derive(Clone)]
pub struct HashKey(Box<[u64; WORDS + SHIFT]>);

impl std::fmt::Debug for HashKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HashKey")
    }
}

impl HashKey {
    /// A new key.
    pub fn random() -> Result<Self> {
        let mut raw = [0u8; (WORDS + SHIFT) * 8];
        File::open("/dev/urandom")
            .and_then(|mut f| f.read_exact(&mut raw))
            .map_err(|e| Error::io("read /dev/urandom", e))?;
        let mut key = Box::new([0u64; WORDS + SHIFT]);
        for (word, raw) in key.iter_mut().zip(raw.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*raw);
        }
        Ok(Self(key))
    }

    /// Hashes a page.
    pub fn hash(&self, page: &[u8; PAGE]) -> PageHash {
        let key = &self.0;
        let (mut first, mut second) = (0u128, 0u128);
        for (pair, i) in page.as_chunks::<16>().0.iter().zip((0..WORDS).step_by(2)) {
            let both = u128::from_le_bytes(*pair);
            let (low, high) = (both as u64, (both >> 64) as u64);
            let product = |at: usize| {
                u128::from(low.wrapping_add(key[at])) * u128::from(high.wrapping_add(key[at + 1]))
            };
            first = first.wrapping_add(product(i));
            second = second.wrapping_add(product(i + SHIFT));
        }
        PageHash([first as u64, (first >> 64) as u64, second as u64, (second >> 64) as u64])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_differ() {
        let page = [7u8; PAGE];
        let hash = || HashKey::random().unwrap().hash(&page);
        assert_ne!(hash(), hash());
    }

    proptest! {
        #[test]
        fn a_changed_bit_changes_the_hash(at in 0..PAGE, bit in 0..8, fill: u8) {
            let key = HashKey::random().unwrap();
            let mut page = [fill; PAGE];
            let before = key.hash(&page);
            prop_assert_eq!(key.hash(&page), before);
            page[at] ^= 1u8 << bit;
            prop_assert_ne!(key.hash(&page), before);
        }

        #[test]
        fn words_that_change_places_change_the_hash(a in 0..WORDS, b in 0..WORDS) {
            let key = HashKey::random().unwrap();
            let mut page = [0u8; PAGE];
            page[a * 8] = 1;
            let before = key.hash(&page);
            page[a * 8] = 0;
            page[b * 8] = 1;
            prop_assert_eq!(key.hash(&page) == before, a == b);
        }
    }
}
