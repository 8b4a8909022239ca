//! Taking up what an earlier fault daemon left. To be done before any copy.

use super::{Pages, PagesError, Space, SpaceId, Span, TableMemory};
use std::ops::Range;
use std::sync::PoisonError;

impl Pages {
    /// Begins a space of which only the spans that follow are tracked; a child with the table it had.
    pub fn restore_space(
        &mut self,
        id: SpaceId,
        memory: Option<TableMemory>,
    ) -> Result<(), PagesError> {
        let bad = PagesError::NoSpace(id);
        let process = self.spaces.get_mut(&SpaceId::PROCESS).ok_or(bad.clone())?;
        let Some(memory) = memory else {
            if id != SpaceId::PROCESS {
                return Err(bad);
            }
            process.clear_spans();
            return Ok(());
        };
        let space = process.sibling(memory)?;
        self.put_space(id, space);
        Ok(())
    }

    /// Adds a span to a space begun by [`Pages::restore_space`].
    pub fn restore_span(&mut self, id: SpaceId, span: Span) -> Result<(), PagesError> {
        let end = span.source.checked_add(span.len_bytes);
        let placed = self.layout.find(span.source);
        let inside = placed.is_some_and(|p| end.is_some_and(|end| end <= p.region.end()));
        if !inside || span.start.checked_add(span.len_bytes).is_none() {
            return Err(PagesError::BadRange { start: span.source, len_bytes: span.len_bytes });
        }
        self.spaces.get_mut(&id).ok_or(PagesError::NoSpace(id))?.restore_span(span);
        Ok(())
    }

    /// A place that a mapping of the space has moved away from (see [`Space::left`]), oldest first.
    pub fn restore_left(&mut self, id: SpaceId, range: Range<u64>) -> Result<(), PagesError> {
        self.spaces.get_mut(&id).ok_or(PagesError::NoSpace(id))?.restore_left(range);
        Ok(())
    }

    /// A part of the space whose event is yet to come (see [`Space::overtaken`]).
    pub fn restore_overtaken(&mut self, id: SpaceId, span: Span) -> Result<(), PagesError> {
        self.spaces.get_mut(&id).ok_or(PagesError::NoSpace(id))?.restore_overtaken(span);
        Ok(())
    }

    /// A fork that was applied before: the child `id` has its table already.
    pub fn fork_again(
        &mut self,
        parent: SpaceId,
        id: SpaceId,
        memory: TableMemory,
    ) -> Result<(), PagesError> {
        let parent = self.spaces.get(&parent).ok_or(PagesError::NoSpace(parent))?;
        let child = parent.fork_again(memory)?;
        self.put_space(id, child);
        Ok(())
    }

    fn put_space(&mut self, id: SpaceId, space: Space) {
        self.next_space = self.next_space.max(id.0.saturating_add(1));
        self.spaces.insert(id, space);
        self.prefetch.get_mut().unwrap_or_else(PoisonError::into_inner).add_space(id);
    }

    /// The number the next forked child will have.
    pub fn next_space(&self) -> SpaceId {
        SpaceId(self.next_space)
    }
}
