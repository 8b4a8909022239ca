//! Whether an eventfd is a semaphore, on kernels before 6.5, whose fdinfo doesn't tell.
//!
//! Only a read tells: it takes one from a semaphore, and everything from a plain one. So one is made, while the process is
//! stopped, and what it took is given back. The count is as before in all cases; a death by SIGKILL within these microseconds
//! can leave it wrong, and an edge-triggered epoll set may tell once more that there is something to read.

use crate::sys::files::{read_counter, write_counter};
use nix::Result;
use nix::errno::Errno;
use std::os::fd::BorrowedFd;

/// Asks an eventfd with this count. `EAGAIN` when somebody else took from it meanwhile.
pub fn is_semaphore(fd: BorrowedFd<'_>, count: u64) -> Result<bool> {
    // A count of one reads the same in both.
    let added = 2u64.saturating_sub(count);
    if added > 0 {
        write_counter(fd, added)?;
    }
    let taken = read_counter(fd)?;
    let semaphore = taken == 1;
    let missing = i128::from(taken) - i128::from(added);
    match missing {
        1.. => write_counter(fd, missing as u64)?,
        0 => {}
        // Two were added, and a semaphore has given back one.
        _ if semaphore => drop(read_counter(fd)?),
        _ => return Err(Errno::EAGAIN),
    }
    Ok(semaphore)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::{AsFd, AsRawFd};

    #[test]
    fn tells_them_apart_and_leaves_them_as_they_were() {
        for count in [0, 1, 2, 3, 1000, u64::MAX - 1] {
            for semaphore in [false, true] {
                let flags = if semaphore { EfdFlags::EFD_SEMAPHORE } else { EfdFlags::empty() };
                let event = EventFd::from_value_and_flags(0, flags).unwrap();
                event.write(count).unwrap();
                assert_eq!(is_semaphore(event.as_fd(), count), Ok(semaphore), "{count}");
                let path = format!("/proc/self/fdinfo/{}", event.as_fd().as_raw_fd());
                let info = crate::proc::fdinfo::parse(&std::fs::read(path).unwrap()).unwrap();
                assert_eq!(info.eventfd.unwrap().count, count);
            }
        }
    }
}
