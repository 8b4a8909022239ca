//! A process that has this one's descriptors, and outlives it by one of them.
//!
//! Some descriptors appear in a process by the very call that tells of them: reading that a traced-by-userfaultfd process has forked
//! makes the child's userfaultfd. Were the reader killed in that moment, nobody would have it, and the child would read zeros where its
//! pages are missing. A *twin* shares the reader's descriptor table (and its memory, so that making it costs next to nothing) and does nothing
//! but wait for the reader's end. Then it looks in memory which descriptor is needed, keeps that one and closes all others, so that peers see
//! the connections of the dead process end. Whoever takes over fetches it by `pidfd_getfd`, and ends the twin.

use crate::arch::raw_syscall;
use crate::error::{Error, Result};
use crate::sys::mapped;
use crate::sys::pidfd::PidFd;
use libc::{c_int, c_void};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// Words of memory that the twin looks at.
pub const WORDS: usize = 8;
/// Says which descriptor is needed. It runs where nothing but plain computing is allowed.
pub type Needed = fn(&[u64; WORDS]) -> Option<RawFd>;
/// The twin calls three functions deep.
const STACK_LEN: usize = 32 << 10;
const NAME: &[u8; 16] = b"slipstream-twin\0";

/// What the twin works with.
struct Shared {
    /// This process, and the one without which nothing is of use any more.
    ours: OwnedFd,
    whole: OwnedFd,
    words: AtomicPtr<AtomicU64>,
    needed: Needed,
}

/// The twin of this process. Dropping it ends it.
pub struct Twin {
    pidfd: OwnedFd,
    stack: *mut c_void,
    shared: Box<Shared>,
    watched: Option<Arc<mapped::Shared>>,
}

// SAFETY: the stack is the twin's alone, and only its address is kept here; the rest is plain data.
unsafe impl Send for Twin {}
// SAFETY: as above.
unsafe impl Sync for Twin {}

impl std::fmt::Debug for Twin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Twin").field("pidfd", &self.pidfd).finish_non_exhaustive()
    }
}

impl Twin {
    /// Makes the twin. It ends at the latest with process `whole`.
    pub fn start(whole: &PidFd, needed: Needed) -> Result<Self> {
        let ours = PidFd::open(std::process::id() as i32)?;
        let copy = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned().map_err(|e| Error::io("duplicate a descriptor", e))
        };
        let (ours, whole) = (copy(ours.as_fd())?, copy(whole.as_fd())?);
        let shared = Box::new(Shared { ours, whole, words: AtomicPtr::new(null_mut()), needed });
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address the kernel chooses.
        let stack = unsafe { libc::mmap(null_mut(), STACK_LEN, prot, flags, -1, 0) };
        if stack == libc::MAP_FAILED {
            return Err(Error::sys("map a stack", Errno::last()));
        }
        let cloned = clone(&shared, stack);
        if cloned.is_err() {
            // SAFETY: mapped above, and used by nobody.
            unsafe { libc::munmap(stack, STACK_LEN) };
        }
        Ok(Self { pidfd: cloned?, stack, shared, watched: None })
    }

    /// What it looks at when this process has ended: the first words of this memory, from now on.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn watch(&mut self, memory: &Arc<mapped::Shared>) {
        assert!(memory.len() >= WORDS * size_of::<u64>());
        let first = std::ptr::from_ref(memory.word64(0)).cast_mut();
        self.shared.words.store(first, Ordering::SeqCst);
        self.watched = Some(Arc::clone(memory));
    }
}

impl AsFd for Twin {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        let fd = self.pidfd.as_raw_fd();
        // SAFETY: integers only, and a siginfo that outlives the call. The twin is a child without an exit signal: __WALL.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, 0, 0);
            let mut info = std::mem::zeroed::<libc::siginfo_t>();
            let options = libc::WEXITED | libc::__WALL;
            while libc::waitid(libc::P_PIDFD, fd as libc::id_t, &raw mut info, options) != 0
                && Errno::last() == Errno::EINTR
            {}
            // Nobody runs on it any more.
            libc::munmap(self.stack, STACK_LEN);
        }
    }
}

fn clone(shared: &Shared, stack: *mut c_void) -> Result<OwnedFd> {
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_PIDFD;
    let arg = std::ptr::from_ref(shared).cast_mut().cast::<c_void>();
    let mut before = SigSet::empty();
    // It inherits the mask, and has no use for any signal.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))
        .map_err(|e| Error::sys("block signals", e))?;
    // SAFETY: the stack is mapped, as long as said and used by nobody else; `shared` lives until the twin has been waited for. What runs there
    // uses neither thread-local storage (it would be this thread's) nor locks nor the heap.
    let pid =
        unsafe { libc::clone(twin_main, stack.byte_add(STACK_LEN), flags, arg, &raw mut pidfd) };
    let errno = Errno::last();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
    if pid < 0 {
        return Err(Error::sys("make a process that keeps descriptors", errno));
    }
    // SAFETY: the kernel stored a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

extern "C" fn twin_main(arg: *mut c_void) -> c_int {
    // SAFETY: what `clone` was given, which outlives this process.
    let shared = unsafe { &*arg.cast::<Shared>() };
    // SAFETY: the name is a string that ends.
    unsafe {
        raw_syscall(libc::SYS_prctl, [libc::PR_SET_NAME as usize, NAME.as_ptr() as usize, 0, 0, 0])
    };
    wait_end(shared.ours.as_raw_fd());
    let Some(needed) = needed_descriptor(shared) else { return 0 };
    let (low, high) = order(needed, shared.whole.as_raw_fd());
    close_between(0, low);
    close_between(low + 1, high);
    close_between(high + 1, RawFd::MAX);
    wait_end(shared.whole.as_raw_fd());
    0
}

fn needed_descriptor(shared: &Shared) -> Option<RawFd> {
    let first = shared.words.load(Ordering::SeqCst);
    if first.is_null() {
        return None;
    }
    let mut words = [0; WORDS];
    for (index, word) in words.iter_mut().enumerate() {
        // SAFETY: they are mapped as long as they are watched.
        *word = unsafe { (*first.add(index)).load(Ordering::SeqCst) };
    }
    (shared.needed)(&words)
}

fn order(a: RawFd, b: RawFd) -> (RawFd, RawFd) {
    if a < b { (a, b) } else { (b, a) }
}

/// Closes descriptors from `from` up to before `to`.
fn close_between(from: RawFd, to: RawFd) {
    if from < to {
        // SAFETY: integers only; nobody else uses this table any more.
        unsafe { raw_syscall(libc::SYS_close_range, [from as usize, to as usize - 1, 0, 0, 0]) };
    }
}

/// Waits until a process has ended, by its descriptor.
fn wait_end(process: RawFd) {
    let mut entry = libc::pollfd { fd: process, events: libc::POLLIN, revents: 0 };
    while entry.revents == 0 {
        let at = (&raw mut entry).addr();
        // SAFETY: one entry that outlives the call.
        let ready = unsafe { raw_syscall(libc::SYS_ppoll, [at, 1, 0, 0, 8]) };
        if ready < 0 && ready != -(libc::EINTR as isize) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::waitpid;
    use nix::unistd::{ForkResult, Pid, fork, pipe};
    use std::io::Read;
    use std::time::{Duration, Instant};

    fn first_word(words: &[u64; WORDS]) -> Option<RawFd> {
        (words[0] > 0).then_some(words[0] as RawFd)
    }

    fn until(what: &str, mut done: impl FnMut() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A reader that is killed with a descriptor nobody else has: its twin has it, and nothing else.
    fn killed(needed: bool) {
        let whole = PidFd::open(std::process::id() as i32).unwrap();
        let (report, told) = pipe().unwrap();
        let (connection, end) = pipe().unwrap();
        // SAFETY: the child makes only system calls and what `Twin` does, and is killed.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                drop((report, connection));
                let mut twin = Twin::start(&whole, first_word).unwrap();
                let file = mapped::memfd(c"words", 4096).unwrap();
                let words = Arc::new(mapped::Shared::map(&file, 4096).unwrap());
                if needed {
                    words.word64(0).store(told.as_raw_fd() as u64, Ordering::SeqCst);
                }
                twin.watch(&words);
                let pid = PidFd::adopt(twin.as_fd().try_clone_to_owned().unwrap()).unwrap().pid();
                nix::unistd::write(&told, &pid.to_le_bytes()).unwrap();
                loop {
                    nix::unistd::pause();
                }
            }
        };
        drop((told, end));
        let (mut report, mut connection) =
            (std::fs::File::from(report), std::fs::File::from(connection));
        let mut pid = [0; 4];
        report.read_exact(&mut pid).unwrap();
        let twin = PidFd::open(i32::from_le_bytes(pid)).unwrap();
        assert!(!twin.exited());
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
        waitpid(child, None).unwrap();
        // What is not needed has been closed.
        assert_eq!(connection.read(&mut [0]).unwrap(), 0);
        if needed {
            assert!(!twin.exited(), "it keeps what is needed");
            twin.kill(libc::SIGKILL).unwrap();
        }
        until("the twin ends", || twin.exited());
        assert_eq!(report.read(&mut [0]).unwrap(), 0);
        let _ = waitpid(Pid::from_raw(twin.pid()), None);
    }

    #[test]
    fn what_is_needed_stays() {
        killed(true);
    }

    #[test]
    fn without_need_it_ends_with_its_reader() {
        killed(false);
    }

    #[test]
    fn dropping_it_ends_it() {
        let whole = PidFd::open(std::process::id() as i32).unwrap();
        let twin = Twin::start(&whole, first_word).unwrap();
        let process = PidFd::adopt(twin.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let name = std::fs::read_to_string(format!("/proc/{}/comm", process.pid()));
        assert!(!process.exited());
        drop(twin);
        assert!(process.exited());
        assert!(name.is_ok());
    }
}
