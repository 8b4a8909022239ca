//! Which memory of the source is served page by page, and where its pages sit in a page table.

use super::PagesError;
use std::ops::Range;

/// Most pages of all regions together: the whole user address space in 4 KiB pages. Their table
/// is 8 GiB of address space, of which only what is written costs memory.
pub const PAGES_MAX: u64 = 1 << 35;
/// Most regions: the kernel's default limit on mappings is a fraction of this.
pub const REGIONS_MAX: usize = 1 << 20;
/// Pages of one table word; every region starts at a word of its own.
pub(super) const WORD_PAGES: u64 = 32;

/// A range of the source's memory that is moved page by page. Fixed at the start of the drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First source address, a multiple of `page_size`.
    pub start: u64,
    /// Length in bytes, a multiple of `page_size`.
    pub len_bytes: u64,
    /// Page size in bytes: 4096 or a huge page's.
    pub page_size: u32,
    /// Anonymous shared memory: mappings are views of one object, whose pages outlive a view.
    /// Where the source maps an object more than once, one view is the region and the others are
    /// aliases of it (see [`Space::track_alias`](super::Space::track_alias)).
    pub shared: bool,
    /// A forked child has a copy. False for `MADV_DONTFORK` and `MADV_WIPEONFORK`.
    pub forks: bool,
}

impl Region {
    /// Address after the last.
    pub fn end(&self) -> u64 {
        self.start + self.len_bytes
    }
}

/// A region and its place in the tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    pub region: Region,
    first_page: u64,
    shift: u32,
}

impl Placed {
    pub fn page_size(&self) -> u64 {
        1 << self.shift
    }

    /// Index of the page that holds a source address of this region.
    pub fn page_of(&self, source: u64) -> u64 {
        self.first_page + ((source - self.region.start) >> self.shift)
    }

    /// Indices of the pages that a source range of this region touches.
    pub fn pages_of(&self, source: Range<u64>) -> Range<u64> {
        if source.is_empty() {
            return 0..0;
        }
        self.page_of(source.start)..self.page_of(source.end - 1) + 1
    }

    /// First source address of a page of this region.
    pub fn source_of(&self, page: u64) -> u64 {
        self.region.start + ((page - self.first_page) << self.shift)
    }
}

/// All regions of a migration and the page indices they occupy.
#[derive(Debug)]
pub struct Layout {
    placed: Vec<Placed>,
    pages: u64,
}

impl Layout {
    /// Checks and orders the regions.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, PagesError> {
        if regions.len() > REGIONS_MAX {
            return Err(PagesError::TooMuch { what: "regions", limit: REGIONS_MAX as u64 });
        }
        regions.sort_by_key(|region| region.start);
        let mut placed = Vec::with_capacity(regions.len());
        let (mut pages, mut free_from) = (0_u64, 0_u64);
        for region in regions {
            let size = u64::from(region.page_size);
            let end = region.start.checked_add(region.len_bytes);
            let well_formed = size.is_power_of_two()
                && size >= 4096
                && (region.start | region.len_bytes).is_multiple_of(size)
                && region.len_bytes > 0
                && region.start >= free_from;
            let (true, Some(end)) = (well_formed, end) else {
                return Err(PagesError::BadRange {
                    start: region.start,
                    len_bytes: region.len_bytes,
                });
            };
            free_from = end;
            let shift = size.trailing_zeros();
            placed.push(Placed { region, first_page: pages, shift });
            pages += (region.len_bytes >> shift).next_multiple_of(WORD_PAGES);
            if pages > PAGES_MAX {
                return Err(PagesError::TooMuch { what: "pages", limit: PAGES_MAX });
            }
        }
        Ok(Self { placed, pages })
    }

    /// Page indices in use, including padding.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The regions, ascending.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.placed.iter().map(|placed| placed.region)
    }

    /// The region that holds a source address.
    pub(super) fn find(&self, source: u64) -> Option<&Placed> {
        let after = self.placed.partition_point(|placed| placed.region.start <= source);
        let placed = self.placed.get(after.checked_sub(1)?)?;
        (source < placed.region.end()).then_some(placed)
    }

    /// A range from a peer, in the pieces that each lie in one region. Refused when a part is
    /// outside all regions or not a whole number of pages.
    pub(super) fn split(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, PagesError> {
        let bad = PagesError::BadRange {
            start: range.start,
            len_bytes: range.end.saturating_sub(range.start),
        };
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Some(placed) = self.find(at) else { return Err(bad) };
            let end = range.end.min(placed.region.end());
            if !(at | end).is_multiple_of(placed.page_size()) {
                return Err(bad);
            }
            pieces.push(at..end);
            at = end;
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, len_bytes: u64, page_size: u32) -> Region {
        Region { start, len_bytes, page_size, shared: false, forks: true }
    }

    #[test]
    fn pages_are_found_by_address() {
        let layout = Layout::new(vec![
            region(0x20_0000, 0x40_0000, 0x20_0000),
            region(0x1000, 0x3000, 4096),
        ])
        .unwrap();
        assert_eq!(layout.pages(), 64);
        let small = layout.find(0x3fff).unwrap();
        assert_eq!(small.page_of(0x3fff), 2);
        assert!(layout.find(0x4000).is_none());
        assert!(layout.find(0xfff).is_none());
        let huge = layout.find(0x5f_ffff).unwrap();
        assert_eq!(huge.page_of(0x5f_ffff), 33);
        assert_eq!(huge.source_of(33), 0x40_0000);
    }

    #[test]
    fn malformed_regions_are_refused() {
        for bad in [
            vec![region(0x1000, 0, 4096)],
            vec![region(0x1000, 0x1000, 3000)],
            vec![region(0x1000, 0x1000, 0)],
            vec![region(0x1800, 0x1000, 4096)],
            vec![region(0x1000, 0x20_0000, 0x20_0000)],
            vec![region(0x1000, 0x3000, 4096), region(0x3000, 0x1000, 4096)],
            vec![region(u64::MAX - 0xfff, 0x2000, 4096)],
        ] {
            assert!(matches!(Layout::new(bad), Err(PagesError::BadRange { .. })));
        }
        let all = region(0, 1 << 48, 4096);
        assert!(matches!(Layout::new(vec![all]), Err(PagesError::TooMuch { .. })));
    }

    #[test]
    fn ranges_from_a_peer_are_checked() {
        let layout =
            Layout::new(vec![region(0x1000, 0x1000, 4096), region(0x2000, 0x2000, 4096)]).unwrap();
        assert_eq!(layout.split(0x1000..0x3000).unwrap(), [0x1000..0x2000, 0x2000..0x3000]);
        assert!(layout.split(0x1000..0x5000).is_err());
        assert!(layout.split(0x1000..0x1800).is_err());
        assert!(layout.split(0..0x2000).is_err());
    }
}
