//! What the destination has: a hash of every page that was sent. Sans-IO.

use crate::capture::page_hash::{PAGE, PageHash};
use std::ops::Range;

const PAGE_LEN: u64 = PAGE as u64;

/// A page and its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashed {
    /// Address or offset in bytes.
    pub address: u64,
    /// Hash of its content.
    pub hash: PageHash,
}

/// Pages that the destination has, ascending.
#[derive(Clone, Debug, Default)]
pub struct Table(Vec<Hashed>);

/// What became of pages since they were sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Runs of pages that are new or changed, ascending.
    pub changed: Vec<Range<u64>>,
    /// Runs of pages that are no more, ascending.
    pub gone: Vec<Range<u64>>,
}

impl Difference {
    /// Bytes of pages, changed or gone.
    pub fn bytes(&self) -> u64 {
        self.changed.iter().chain(&self.gone).map(|r| r.end - r.start).sum()
    }
}

impl Table {
    /// Hash of what the destination has at `address`.
    pub fn get(&self, address: u64) -> Option<PageHash> {
        let at = self.0.binary_search_by_key(&address, |h| h.address).ok()?;
        Some(self.0[at].hash)
    }

    /// Pages in the table.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Notes pages that were sent, ascending.
    pub fn update(&mut self, sent: &[Hashed]) {
        let old = std::mem::take(&mut self.0);
        self.0.reserve(old.len() + sent.len());
        let mut sent = sent.iter().peekable();
        for page in old {
            while let Some(new) = sent.next_if(|new| new.address < page.address) {
                self.0.push(*new);
            }
            let same = sent.next_if(|new| new.address == page.address);
            self.0.push(same.copied().unwrap_or(page));
        }
        self.0.extend(sent);
    }

    /// Compares with the pages that exist now, ascending. A new page whose hash is `absent` counts as
    /// one that does not exist.
    pub fn compare(&self, now: &[Hashed], absent: Option<PageHash>) -> Difference {
        let mut difference = Difference::default();
        let mut old = self.0.iter().peekable();
        for page in now {
            while let Some(gone) = old.next_if(|o| o.address < page.address) {
                note_gone(gone, absent, &mut difference);
            }
            let before = old.next_if(|o| o.address == page.address).map(|o| o.hash);
            if before.or(absent) != Some(page.hash) {
                push(&mut difference.changed, page.address);
            }
        }
        for gone in old {
            note_gone(gone, absent, &mut difference);
        }
        difference
    }
}

fn note_gone(page: &Hashed, absent: Option<PageHash>, difference: &mut Difference) {
    if absent != Some(page.hash) {
        push(&mut difference.gone, page.address);
    }
}

fn push(runs: &mut Vec<Range<u64>>, address: u64) {
    match runs.last_mut() {
        Some(last) if last.end == address => last.end += PAGE_LEN,
        _ => runs.push(address..address + PAGE_LEN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::page_hash::HashKey;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        /// Against a model: the table says exactly what differs from what was sent.
        #[test]
        fn like_its_model(
            sent in proptest::collection::vec(proptest::collection::btree_map(0u64..40, 0u8..3, 0..40), 1..4),
            now in proptest::collection::btree_map(0u64..40, 0u8..3, 0..40),
            zeros_are_absent: bool,
        ) {
            let key = HashKey::random().unwrap();
            let hashed = |pages: &BTreeMap<u64, u8>| -> Vec<Hashed> {
                let one = |(page, fill): (&u64, &u8)| Hashed {
                    address: page * PAGE_LEN,
                    hash: key.hash(&[*fill; PAGE]),
                };
                pages.iter().map(one).collect()
            };
            let (mut table, mut model) = (Table::default(), BTreeMap::new());
            for pages in &sent {
                table.update(&hashed(pages));
                model.extend(pages.iter().map(|(page, fill)| (*page, *fill)));
            }
            let absent = zeros_are_absent.then(|| key.hash(&[0; PAGE]));
            let found = table.compare(&hashed(&now), absent);
            let holds = |runs: &[Range<u64>], page: u64| {
                runs.iter().any(|r| r.contains(&(page * PAGE_LEN)))
            };
            for page in 0..40 {
                let view = |pages: &BTreeMap<u64, u8>| {
                    pages.get(&page).copied().filter(|fill| !zeros_are_absent || *fill != 0)
                };
                let (before, after) = (view(&model), view(&now));
                let told = holds(&found.changed, page) || holds(&found.gone, page);
                prop_assert_eq!(told, before != after, "page {}", page);
                if holds(&found.gone, page) {
                    prop_assert!(!now.contains_key(&page));
                }
            }
        }
    }
}
