//! Which addresses of an address space show which source addresses, looked up both ways.

use std::collections::BTreeMap;
use std::ops::Range;

/// Consecutive addresses of the destination that show consecutive source addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First current address.
    pub start: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Source address that `start` shows.
    pub source: u64,
    /// It may have been unmapped without an event saying so (see [`Space::remap`](super::Space::remap)).
    pub doubtful: bool,
}

impl Span {
    /// Current addresses.
    pub fn current(&self) -> Range<u64> {
        self.start..self.start + self.len_bytes
    }

    /// Source addresses.
    pub fn sources(&self) -> Range<u64> {
        self.source..self.source + self.len_bytes
    }

    /// The part that shows a source range, which must overlap.
    pub(super) fn clip_source(self, range: &Range<u64>) -> Self {
        let start = self.source.max(range.start);
        let end = (self.source + self.len_bytes).min(range.end);
        Self {
            start: self.start + (start - self.source),
            len_bytes: end - start,
            source: start,
            ..self
        }
    }

    /// The part at a range of current addresses, which must overlap.
    pub(super) fn clip_current(self, range: &Range<u64>) -> Self {
        let start = self.start.max(range.start);
        let end = (self.start + self.len_bytes).min(range.end);
        let source = self.source + (start - self.start);
        Self { start, len_bytes: end - start, source, ..self }
    }
}

/// All spans of an address space.
///
/// Current addresses are unique. Source addresses are too, but for aliases of shared memory; so
/// the reverse index has planes, in each of which source addresses are unique. There are as many
/// planes as the most aliased page has mappings, which is one for all private memory.
#[derive(Clone, Debug, Default)]
pub(super) struct SpanMap {
    by_current: BTreeMap<u64, Span>,
    /// Source start to current start.
    planes: Vec<BTreeMap<u64, u64>>,
}

impl SpanMap {
    /// Adds a span where nothing is tracked (see [`SpanMap::cut`]).
    pub fn insert(&mut self, span: Span) {
        if span.len_bytes == 0 {
            return;
        }
        let free =
            (0..self.planes.len()).find(|plane| self.overlap(*plane, &span.sources()).is_none());
        let plane = free.unwrap_or_else(|| {
            self.planes.push(BTreeMap::new());
            self.planes.len() - 1
        });
        self.planes[plane].insert(span.source, span.start);
        self.by_current.insert(span.start, span);
    }

    /// Stops tracking a range of current addresses; yields what was tracked there.
    pub fn cut(&mut self, range: Range<u64>) -> Vec<Span> {
        let mut cut = Vec::new();
        while let Some(span) = self.first_in(&range) {
            self.drop_span(span);
            let part = span.clip_current(&range);
            if span.start < part.start {
                self.insert(span.clip_current(&(0..part.start)));
            }
            if part.current().end < span.current().end {
                self.insert(span.clip_current(&(part.current().end..u64::MAX)));
            }
            cut.push(part);
        }
        cut
    }

    /// The tracked parts of a range of current addresses.
    pub fn in_range(&self, range: &Range<u64>) -> Vec<Span> {
        let mut parts = Vec::new();
        let mut at = range.start;
        while let Some(span) = self.first_in(&(at..range.end)) {
            at = span.current().end;
            parts.push(span.clip_current(range));
        }
        parts
    }

    /// The span that holds a current address.
    pub fn at(&self, current: u64) -> Option<Span> {
        let (_, span) = self.by_current.range(..=current).next_back()?;
        (current - span.start < span.len_bytes).then_some(*span)
    }

    /// All spans.
    pub fn iter(&self) -> impl Iterator<Item = Span> + '_ {
        self.by_current.values().copied()
    }

    /// Calls with each span that shows a part of a source range, clipped to it.
    pub fn each_of_source(&self, range: &Range<u64>, mut each: impl FnMut(Span)) {
        for plane in 0..self.planes.len() {
            let mut at = range.start;
            while let Some(span) = self.overlap(plane, &(at..range.end)) {
                at = span.sources().end;
                each(span.clip_source(range));
            }
        }
    }

    /// The leading part of a source range in which the same mappings show every page: where it
    /// ends, and the mapping to install pages through (none when nothing shows this part). One that
    /// is known to exist is preferred to a doubtful one.
    pub fn leading(&self, range: &Range<u64>) -> (u64, Option<Span>) {
        let mut end = range.end;
        let mut best: Option<Span> = None;
        for plane in 0..self.planes.len() {
            let Some(span) = self.overlap(plane, range) else { continue };
            if span.source > range.start {
                end = end.min(span.source);
            } else {
                end = end.min(span.sources().end);
                if best.is_none_or(|best| best.doubtful && !span.doubtful) {
                    best = Some(span);
                }
            }
        }
        (end, best.map(|span| span.clip_source(&(range.start..end))))
    }

    /// Whether any source address may be shown twice.
    pub fn has_aliases(&self) -> bool {
        self.planes.len() > 1
    }

    fn drop_span(&mut self, span: Span) {
        self.by_current.remove(&span.start);
        for plane in &mut self.planes {
            if plane.get(&span.source) == Some(&span.start) {
                plane.remove(&span.source);
                break;
            }
        }
    }

    /// The lowest span, not clipped, that overlaps a range of current addresses.
    fn first_in(&self, range: &Range<u64>) -> Option<Span> {
        if range.is_empty() {
            return None;
        }
        self.at(range.start)
            .or_else(|| self.by_current.range(range.clone()).next().map(|(_, s)| *s))
    }

    /// The lowest span of a plane, not clipped, that overlaps a source range.
    fn overlap(&self, plane: usize, range: &Range<u64>) -> Option<Span> {
        if range.is_empty() {
            return None;
        }
        let plane = &self.planes[plane];
        let covering = plane
            .range(..=range.start)
            .next_back()
            .and_then(|(_, current)| self.by_current.get(current))
            .filter(|span| range.start < span.sources().end);
        covering.or_else(|| self.by_current.get(plane.range(range.clone()).next()?.1)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn behaves_like_a_map_of_pages(
            ops in prop::collection::vec((0_u8..3, 0_u64..64, 1_u64..16, 0_u64..64), 0..40),
            probe in (0_u64..64, 1_u64..32),
        ) {
            let mut spans = SpanMap::default();
            let mut model: HashMap<u64, u64> = HashMap::new();
            for (op, start, len, other) in ops {
                let range = start..start + len;
                let mut expected: Vec<(u64, u64)> = range.clone().filter_map(|a| Some((a, *model.get(&a)?))).collect();
                let shown: Vec<(u64, u64)> = spans.in_range(&range).iter().flat_map(|s| s.current().zip(s.sources())).collect();
                prop_assert_eq!(&shown, &expected);
                let cut = spans.cut(range.clone());
                let mut cut_pages: Vec<(u64, u64)> = cut.iter().flat_map(|s| s.current().zip(s.sources())).collect();
                expected.sort_unstable();
                cut_pages.sort_unstable();
                prop_assert_eq!(cut_pages, expected);
                model.retain(|address, _| !range.contains(address));
                match op {
                    0 => {
                        spans.insert(Span { start, len_bytes: len, source: other, doubtful: other % 2 == 0 });
                        model.extend(range.zip(other..));
                    }
                    1 => for span in cut {
                        let to = 1000 + other + (span.start - start);
                        let target = to..to + span.len_bytes;
                        spans.cut(target.clone());
                        model.retain(|address, _| !target.contains(address));
                        spans.insert(Span { start: to, ..span });
                        model.extend(target.zip(span.sources()));
                    },
                    _ => {}
                }
                for address in (0..96).chain(1000..1096) {
                    let found = spans.at(address).map(|s| s.source + (address - s.start));
                    prop_assert_eq!(found, model.get(&address).copied());
                }
            }
            let range = probe.0..probe.0 + probe.1;
            let mut found = Vec::new();
            spans.each_of_source(&range, |s| found.extend(s.current().zip(s.sources())));
            found.sort_unstable();
            let mut expected: Vec<_> = model.iter().map(|(c, s)| (*c, *s)).filter(|(_, s)| range.contains(s)).collect();
            expected.sort_unstable();
            prop_assert_eq!(found, expected);
            let (end, best) = spans.leading(&range);
            prop_assert!(range.start < end && end <= range.end);
            for source in range.start..end {
                match best {
                    Some(best) => prop_assert_eq!(model.get(&(best.start + (source - best.source))), Some(&source)),
                    None => prop_assert!(!model.values().any(|shown| *shown == source)),
                }
            }
        }
    }
}
