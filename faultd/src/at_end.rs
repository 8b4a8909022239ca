//! Something to be done when a scope is left, also by a panic.

/// Runs a closure when it is dropped.
pub struct AtEnd<F: FnMut()>(F);

impl<F: FnMut()> AtEnd<F> {
    /// Runs `f` at the end of the scope, whichever way it is left.
    pub fn new(f: F) -> Self {
        Self(f)
    }
}

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn a_panic_is_an_end() {
        let ends = AtomicU32::new(0);
        let end = || {
            AtEnd::new(|| {
                ends.fetch_add(1, Ordering::SeqCst);
            })
        };
        drop(end());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _end = end();
            panic!("as asked");
        }));
        assert!(panicked.is_err());
        assert_eq!(ends.load(Ordering::SeqCst), 2);
    }
}
