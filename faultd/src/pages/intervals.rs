//! A set of addresses kept as disjoint, merged intervals.

use std::collections::BTreeMap;
use std::ops::Range;

/// Addresses as half-open intervals. Every operation costs O(log n) and the intervals it changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct IntervalSet {
    /// Start to end; neighbours never touch.
    map: BTreeMap<u64, u64>,
}

impl IntervalSet {
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Number of intervals.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.map.iter().map(|(start, end)| *start..*end)
    }

    /// The interval that holds an address.
    pub fn at(&self, address: u64) -> Option<Range<u64>> {
        let (start, end) = self.map.range(..=address).next_back()?;
        (address < *end).then_some(*start..*end)
    }

    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        if let Some((before, before_end)) = self.map.range(..start).next_back()
            && *before_end >= start
        {
            (start, end) = (*before, end.max(*before_end));
        }
        while let Some((next, next_end)) = self.map.range(start..=end).next() {
            let (next, next_end) = (*next, *next_end);
            end = end.max(next_end);
            self.map.remove(&next);
        }
        self.map.insert(start, end);
    }

    /// Takes a range out and says what of it was in.
    pub fn remove(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut removed = Vec::new();
        while let Some(part) = self.first_in(range.clone()) {
            let Some(whole) = self.at(part.start) else { break };
            self.map.remove(&whole.start);
            if whole.start < part.start {
                self.map.insert(whole.start, part.start);
            }
            if part.end < whole.end {
                self.map.insert(part.end, whole.end);
            }
            removed.push(part);
        }
        removed
    }

    /// The lowest part that lies in a range.
    pub fn first_in(&self, range: Range<u64>) -> Option<Range<u64>> {
        if range.is_empty() {
            return None;
        }
        if let Some(at) = self.at(range.start) {
            return Some(range.start..at.end.min(range.end));
        }
        let (start, end) = self.map.range(range.clone()).next()?;
        Some(*start..(*end).min(range.end))
    }

    /// The highest part that lies in a range.
    pub fn last_in(&self, range: Range<u64>) -> Option<Range<u64>> {
        let (start, end) = self.map.range(..range.end).next_back()?;
        let part = (*start).max(range.start)..(*end).min(range.end);
        (!part.is_empty()).then_some(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set(ops in prop::collection::vec((any::<bool>(), 0_u64..64, 0_u64..24), 0..60)) {
            let mut set = IntervalSet::default();
            let mut model = BTreeSet::new();
            for (add, start, len) in ops {
                let range = start..start + len;
                let inside: Vec<u64> = model.range(range.clone()).copied().collect();
                prop_assert_eq!(set.first_in(range.clone()).map(|part| part.start), inside.first().copied());
                prop_assert_eq!(set.last_in(range.clone()).map(|part| part.end - 1), inside.last().copied());
                if add {
                    set.insert(range.clone());
                    model.extend(range);
                } else {
                    let removed: Vec<u64> = set.remove(range.clone()).into_iter().flatten().collect();
                    prop_assert_eq!(removed, inside);
                    model.retain(|address| !range.contains(address));
                }
                prop_assert_eq!(set.iter().flatten().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
                let merged: Vec<_> = set.iter().collect();
                prop_assert!(merged.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}
