//! Where the threads of a page service run.
//!
//! A fault is resolved fastest on the CPU on which the thread waits for it: no interrupt to another CPU,
//! which an idle virtual one answers late (measured: 18 us from touch to touch in place of 80 to 140).
//! So the fault thread follows the threads that fault, the urgent thread of the page server follows the
//! network's receive processing, and bulk lanes leave that CPU alone while faults come. On a machine with
//! one CPU nothing of this happens.

use slipstream_core::sys::task;
use slipstream_transport::Pace;

/// Where a thread may run by its own choice, within what it was allowed when it began.
#[derive(Debug)]
pub struct Placement {
    allowed: Vec<u8>,
    chosen: Choice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Anywhere,
    On(u32),
    Off(u32),
}

impl Placement {
    /// Of the calling thread.
    pub fn of_this_thread() -> Self {
        Self { allowed: task::affinity(0).unwrap_or_default(), chosen: Choice::Anywhere }
    }

    /// Runs the calling thread on that CPU only, if it may run there and elsewhere; says whether it does.
    pub fn follow(&mut self, cpu: u32) -> bool {
        if mask(&self.allowed, Choice::Off(cpu)).is_none() {
            return false;
        }
        self.choose(Choice::On(cpu));
        self.chosen == Choice::On(cpu)
    }

    /// Keeps the calling thread off the CPU of urgent work, if there is any now and there is another CPU.
    pub fn make_room(&mut self, pace: &Pace) {
        self.choose(pace.urgent_cpu().map_or(Choice::Anywhere, Choice::Off));
    }

    fn choose(&mut self, choice: Choice) {
        if choice == self.chosen {
            return;
        }
        let Some(mask) = mask(&self.allowed, choice) else { return };
        // The set may have been changed from outside: then it stays as that wants it.
        if task::set_affinity(0, &mask).is_ok() {
            self.chosen = choice;
        }
    }
}

/// The CPUs of a choice; `None` if nothing remains.
fn mask(allowed: &[u8], choice: Choice) -> Option<Vec<u8>> {
    let bit = |cpu: u32, byte: usize| {
        if cpu as usize / 8 == byte { 1u8 << (cpu % 8) } else { 0 }
    };
    let mask: Vec<u8> = allowed
        .iter()
        .enumerate()
        .map(|(byte, bits)| match choice {
            Choice::Anywhere => *bits,
            Choice::On(cpu) => bits & bit(cpu, byte),
            Choice::Off(cpu) => bits & !bit(cpu, byte),
        })
        .collect();
    mask.iter().any(|bits| *bits != 0).then_some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_stay_within_what_is_allowed() {
        let allowed = [0b0000_0110, 0b1];
        assert_eq!(mask(&allowed, Choice::On(2)), Some(vec![0b100, 0]));
        assert_eq!(mask(&allowed, Choice::On(0)), None);
        assert_eq!(mask(&allowed, Choice::Off(8)), Some(vec![0b110, 0]));
        assert_eq!(mask(&allowed, Choice::Off(77)), Some(vec![0b110, 1]));
        assert_eq!(mask(&[0b1], Choice::Off(0)), None, "the only CPU");
    }

    #[test]
    fn a_thread_goes_where_it_may() {
        let mut placement = Placement::of_this_thread();
        let first = (0..8192).find(|cpu| placement.allowed[cpu / 8] & 1 << (cpu % 8) != 0);
        let first = first.expect("a CPU") as u32;
        assert!(placement.follow(first));
        assert_eq!(
            task::affinity(0).expect("affinity").iter().map(|b| b.count_ones()).sum::<u32>(),
            1
        );
        assert!(!placement.follow(100_000));
        placement.make_room(&Pace::default());
        assert_eq!(task::affinity(0).expect("affinity"), placement.allowed);
    }
}
