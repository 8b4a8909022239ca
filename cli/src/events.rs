//! What the display waits for: lines of the session and signals, on one channel.

use nix::sys::signal::{SigSet, Signal};
use std::io::{self, BufRead, Read};
use std::sync::mpsc::SyncSender;
use std::thread;
use std::time::Instant;

/// Longest line taken from a session; a report of some thousand blockers fits.
pub const LINE_LEN_MAX: usize = 4 << 20;

/// Something to react to.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// A line of the session, without its newline.
    Line(String),
    /// The session has nothing more to say, or can't be heard any more.
    End,
    /// Ctrl-C, or what amounts to it, and when.
    Interrupt(Instant),
}

/// Reads one line; `None` at the end. What is over [`LINE_LEN_MAX`] is cut off, and bytes that are no
/// UTF-8 are replaced: such a line is no event, and is reported as one that can't be read.
pub fn read_line(reader: &mut dyn BufRead) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    if reader.take(LINE_LEN_MAX as u64).read_until(b'\n', &mut bytes)? == 0 {
        return Ok(None);
    }
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    } else if bytes.len() == LINE_LEN_MAX {
        reader.skip_until(b'\n')?;
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Sends every line of `reader`, then [`Input::End`], from a thread of its own, which ends with the
/// reader or with the receiver.
pub fn pump(mut reader: Box<dyn BufRead + Send>, to: SyncSender<Input>) {
    thread::spawn(move || {
        loop {
            let input = match read_line(&mut *reader) {
                Ok(Some(line)) => Input::Line(line),
                Ok(None) => Input::End,
                Err(error) => {
                    tracing::warn!("reading the session's events: {error}");
                    Input::End
                }
            };
            let last = input == Input::End;
            if to.send(input).is_err() || last {
                return;
            }
        }
    });
}

/// Blocks the signals that ask the display to end, in this thread and those it starts, and returns
/// them. One that was ignored from the start (`nohup`, or a job in the background) stays so.
pub fn block_signals() -> io::Result<SigSet> {
    let ignored = ignored_signals();
    let wanted = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    let set: SigSet =
        wanted.into_iter().filter(|s| ignored & (1 << (*s as u32 - 1)) == 0).collect();
    set.thread_block()?;
    Ok(set)
}

/// Sends [`Input::Interrupt`] for every signal of a blocked set, from a thread of its own.
pub fn watch_signals(set: SigSet, to: SyncSender<Input>) {
    if set.iter().next().is_none() {
        return;
    }
    thread::spawn(move || {
        while set.wait().is_ok() {
            if to.send(Input::Interrupt(Instant::now())).is_err() {
                return;
            }
        }
    });
}

/// Bit n-1 is set when signal n is ignored. Without a readable /proc none counts as ignored.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;
    use std::sync::mpsc::sync_channel;

    #[test]
    fn lines_then_the_end() {
        let (to, from) = sync_channel(16);
        pump(Box::new(Cursor::new(b"one\n\ntwo".to_vec())), to);
        let all: Vec<Input> = from.iter().collect();
        let line = |text: &str| Input::Line(text.into());
        assert_eq!(all, [line("one"), line(""), line("two"), Input::End]);
    }

    #[test]
    fn an_endless_line_is_cut_and_the_next_one_is_whole() {
        let mut bytes = vec![b'x'; 3 * LINE_LEN_MAX];
        bytes.extend_from_slice(b"\nnext\n");
        let mut reader = Cursor::new(bytes);
        let first = read_line(&mut reader).expect("reads").expect("a line");
        assert_eq!(first.len(), LINE_LEN_MAX);
        assert_eq!(read_line(&mut reader).expect("reads").as_deref(), Some("next"));
        assert_eq!(read_line(&mut reader).expect("reads"), None);
    }

    #[test]
    fn bytes_that_are_no_text_do_not_end_the_stream() {
        let mut reader = Cursor::new(b"\xff\xfe\nnext\n".to_vec());
        assert!(read_line(&mut reader).expect("reads").is_some());
        assert_eq!(read_line(&mut reader).expect("reads").as_deref(), Some("next"));
    }
}
