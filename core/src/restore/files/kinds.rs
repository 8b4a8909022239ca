//! eventfd, timerfd, signalfd, epoll.

use super::{O_CLOEXEC, Planner, Result, bad};
use crate::manifest::{Epoll, EventFd, TimerFd};
use crate::program::Program;

const EFD_SEMAPHORE: i32 = 1;
const TFD_TIMER_ABSTIME: u32 = 1;
/// `_IOW('T', 0, u64)`; the kernel has it for checkpoints (`CONFIG_CHECKPOINT_RESTORE`).
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

impl Planner<'_> {
    pub(super) fn eventfd(&mut self, event: &EventFd, at: i32) {
        let semaphore = if event.semaphore { EFD_SEMAPHORE } else { 0 };
        let flags = O_CLOEXEC | libc::O_NONBLOCK | semaphore;
        let args = [0.into(), flags.into()];
        let fd = self.program.must("make an eventfd", libc::SYS_eventfd2, args);
        self.shift(fd, at);
        if event.count > 0 {
            // The initial value has 32 bits, the counter 64.
            let count = self.program.words(&[event.count]);
            let args = [at.into(), count.into(), 8.into()];
            self.program.must("set an eventfd's counter", libc::SYS_write, args);
        }
    }

    pub(super) fn signalfd(&mut self, mask: u64, at: i32) {
        let mask = self.program.words(&[mask]);
        let args = [(-1).into(), mask.into(), 8.into(), O_CLOEXEC.into()];
        let fd = self.program.must("make a signalfd", libc::SYS_signalfd4, args);
        self.shift(fd, at);
    }

    /// A timer is armed for its deadline where it had one, else for the time that was left.
    pub(super) fn timerfd(&mut self, timer: &TimerFd, at: i32) -> Result<()> {
        let args = [timer.clock.into(), O_CLOEXEC.into()];
        let fd = self.program.must("make a timerfd", libc::SYS_timerfd_create, args);
        self.shift(fd, at);
        let absolute = timer.settime_flags & TFD_TIMER_ABSTIME != 0 && timer.deadline_ns != 0;
        let value = if absolute { timer.deadline_ns } else { timer.time.value_ns };
        if value < 0 || timer.time.interval_ns < 0 {
            return Err(bad("a timerfd with a negative time"));
        }
        if value > 0 {
            let timespec = |ns: i64| [ns as u64 / 1_000_000_000, ns as u64 % 1_000_000_000];
            let spec = [timespec(timer.time.interval_ns), timespec(value)].concat();
            let spec = self.program.words(&spec);
            let flags = if absolute { timer.settime_flags & 3 } else { 0 };
            let args = [at.into(), flags.into(), spec.into(), 0.into()];
            self.program.must("arm a timerfd", libc::SYS_timerfd_settime, args);
        }
        if timer.ticks > 0 {
            let ticks = self.program.words(&[timer.ticks]);
            let args = [at.into(), TFD_IOC_SET_TICKS.into(), ticks.into()];
            self.program.must("set a timerfd's ticks", libc::SYS_ioctl, args);
        }
        Ok(())
    }
}

/// Adds the entries of the epoll set open at `at`, when all descriptors are at their numbers.
pub(super) fn fill_epoll(program: &mut Program, at: i32, epoll: &Epoll) {
    for watch in &epoll.watches {
        // struct epoll_event is packed on this architecture.
        let event =
            program.data(&[&watch.events.to_le_bytes()[..], &watch.data.to_le_bytes()].concat());
        let args = [at.into(), libc::EPOLL_CTL_ADD.into(), watch.fd.into(), event.into()];
        program.must(format!("watch fd {}", watch.fd), libc::SYS_epoll_ctl, args);
    }
}
