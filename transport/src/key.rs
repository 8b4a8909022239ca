//! The pre-shared key two hosts prove to each other that they hold.
//!
//! A key file is one line of 64 hexadecimal digits, readable by its owner alone.

use crate::error::{Error, Result};
use nix::fcntl::OFlag;
use nix::unistd::geteuid;
use ring::rand::{SecureRandom, SystemRandom};
use std::fmt;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use zeroize::{Zeroize, Zeroizing};

/// Length of a key.
pub const KEY_LEN_BYTES: usize = 32;

/// Longest key file that is read at all; a good one has 65 bytes.
const FILE_LEN_BYTES_MAX: u64 = 256;

/// A pre-shared key. Boxed, so that moving it leaves no copies behind; wiped when dropped.
#[derive(Clone)]
pub struct Key(Box<[u8; KEY_LEN_BYTES]>);

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// A key with these bytes.
    pub fn from_bytes(bytes: [u8; KEY_LEN_BYTES]) -> Self {
        Key(Box::new(bytes))
    }

    /// A new key from the system's random numbers.
    pub fn random() -> Result<Self> {
        let mut key = Key(Box::new([0; KEY_LEN_BYTES]));
        SystemRandom::new()
            .fill(&mut key.0[..])
            .map_err(|_| Error::Crypto("no random numbers from the system"))?;
        Ok(key)
    }

    /// Makes a new key and writes it to `path`, which must not exist yet, with mode 0600.
    pub fn generate_file(path: &Path) -> Result<()> {
        let key = Key::random()?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| creation_error(path, &error))?;
        let mut line = Zeroizing::new(String::with_capacity(2 * KEY_LEN_BYTES + 1));
        for byte in key.0.iter() {
            // Writing to a string can't fail.
            let _ = write!(line, "{byte:02x}");
        }
        line.push('\n');
        let written = file.write_all(line.as_bytes()).and_then(|()| file.sync_all());
        if let Err(error) = written {
            // Half a key file is worse than none; the error that counts is the first.
            let _ = std::fs::remove_file(path);
            return Err(creation_error(path, &error));
        }
        Ok(())
    }

    /// Reads a key file, refusing one that others than its owner could have read or written.
    pub fn load(path: &Path) -> Result<Self> {
        // O_NONBLOCK: a FIFO given by mistake must not hang the program.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .map_err(|error| open_error(path, &error))?;
        check_owner(path, &file)?;
        let mut text = Zeroizing::new(String::with_capacity(FILE_LEN_BYTES_MAX as usize + 1));
        file.take(FILE_LEN_BYTES_MAX + 1)
            .read_to_string(&mut text)
            .map_err(|error| malformed(path, &format!("cannot be read ({error})")))?;
        Self::parse(text.trim()).map_err(|problem| malformed(path, problem))
    }

    /// Hands the key to a process of our own, through a pipe or socket that only it reads.
    pub fn hand_over(&self, mut to: impl Write) -> std::io::Result<()> {
        to.write_all(&self.0[..])
    }

    /// Takes a key that was handed over.
    pub fn take_over(mut from: impl Read) -> std::io::Result<Self> {
        let mut key = Key(Box::new([0; KEY_LEN_BYTES]));
        from.read_exact(&mut key.0[..])?;
        Ok(key)
    }

    /// Decodes 64 hexadecimal digits.
    fn parse(digits: &str) -> std::result::Result<Self, &'static str> {
        let mut key = Key(Box::new([0; KEY_LEN_BYTES]));
        if digits.len() != 2 * KEY_LEN_BYTES {
            return Err("is not one line of 64 hexadecimal digits (wrong length)");
        }
        let digit = |c: u8| (c as char).to_digit(16).ok_or("holds other than hexadecimal digits");
        for (byte, pair) in key.0.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(key)
    }

    /// The secret itself, for the handshake.
    pub(crate) fn bytes(&self) -> &[u8; KEY_LEN_BYTES] {
        &self.0
    }
}

fn check_owner(path: &Path, file: &File) -> Result<()> {
    let meta = file.metadata().map_err(|error| open_error(path, &error))?;
    if !meta.is_file() {
        return Err(malformed(path, "is not a regular file"));
    }
    if meta.uid() != 0 && meta.uid() != geteuid().as_raw() {
        return Err(Error::KeyFile {
            path: path.into(),
            problem: format!("belongs to uid {}, who can read and replace it", meta.uid()),
            remedy: format!("run `chown {} {}`", geteuid(), path.display()),
        });
    }
    if meta.mode() & 0o077 != 0 {
        return Err(Error::KeyFile {
            path: path.into(),
            problem: format!("mode {:04o} lets others use it", meta.mode() & 0o7777),
            remedy: format!("run `chmod 600 {}`", path.display()),
        });
    }
    Ok(())
}

fn malformed(path: &Path, problem: &str) -> Error {
    Error::KeyFile {
        path: path.into(),
        problem: problem.into(),
        remedy: format!("make a new one with `slipstream keygen {}`", path.display()),
    }
}

fn open_error(path: &Path, error: &io::Error) -> Error {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => format!(
            "make one with `slipstream keygen {}` and copy it to both hosts",
            path.display()
        ),
        _ => "give a file that this user can read".into(),
    };
    Error::KeyFile { path: path.into(), problem: format!("cannot be opened ({error})"), remedy }
}

fn creation_error(path: &Path, error: &io::Error) -> Error {
    let remedy = match error.kind() {
        io::ErrorKind::AlreadyExists => "remove it first or choose another name",
        _ => "give a name in a directory that can be written to",
    };
    Error::KeyFile {
        path: path.into(),
        problem: format!("cannot be created ({error})"),
        remedy: remedy.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::{PermissionsExt, chown};

    fn message(path: &Path) -> String {
        Key::load(path).expect_err("must be refused").to_string()
    }

    #[test]
    fn generated_key_loads_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        Key::generate_file(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        let key = Key::load(&path).unwrap();
        assert_ne!(key.bytes(), &[0; KEY_LEN_BYTES]);
        assert_eq!(format!("{key:?}"), "Key(..)");
        let error = Key::generate_file(&path).unwrap_err().to_string();
        assert!(error.contains("remove it first"), "{error}");
        assert_eq!(Key::load(&path).unwrap().bytes(), key.bytes(), "the old key is untouched");
    }

    #[test]
    fn files_of_others_are_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        Key::generate_file(&path).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o610] {
            set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(message(&path).contains(&format!("chmod 600 {}", path.display())));
        }
        set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        if geteuid().is_root() {
            chown(&path, Some(12345), None).unwrap();
            assert!(message(&path).contains("uid 12345"));
        }
    }

    #[test]
    fn malformed_files_are_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(message(&path).contains("slipstream keygen"), "missing file");
        assert!(message(dir.path()).contains("regular file"));
        let long = "0".repeat(5000);
        let bad: [&[u8]; 6] =
            [b"", b"abc\n", &[b'0'; 63], &[b'g'; 64], &[0xff; 64], long.as_bytes()];
        for content in bad {
            write(&path, content).unwrap();
            set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            assert!(message(&path).contains("slipstream keygen"), "{content:?}");
        }
    }
}
