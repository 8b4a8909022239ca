//! The two directions' ciphers after the handshake, working in place.
//!
//! Snow's own transport state copies each record once on either side; with pages that is a tenth of the whole cost. So the
//! two keys are taken out of the finished handshake and used as the Noise specification says (section 12, AESGCM: four zero
//! bytes and a big-endian counter as nonce, no associated data). Each direction's key lives in exactly one value with its
//! counter, so a nonce can't be used twice.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use std::fmt;
use zeroize::Zeroizing;

/// Length of the authentication tag behind each ciphertext.
pub(crate) const TAG_LEN_BYTES: usize = 16;

/// Records one key may protect. Far below what the 64-bit counter allows: with records of 64 KiB the bounds of AES-GCM
/// stay negligible up to here (2^36 records are 4 PiB).
const RECORDS_MAX: u64 = 1 << 36;

/// The secret of one direction, on its way from the handshake to a cipher.
pub(crate) type Secret = Zeroizing<[u8; 32]>;

/// Why a record could not be made or opened.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum CipherError {
    /// The key has protected as many records as it may.
    Exhausted,
    /// The record is not what the peer sent, or not in its place.
    Forged,
}

/// One direction's key and the number of the next record.
struct Counted {
    key: LessSafeKey,
    next: u64,
}

impl Counted {
    fn new(secret: &Secret) -> Option<Self> {
        let key = UnboundKey::new(&AES_256_GCM, &secret[..]).ok()?;
        Some(Counted { key: LessSafeKey::new(key), next: 0 })
    }

    fn nonce(&mut self) -> Result<Nonce, CipherError> {
        if self.next >= RECORDS_MAX {
            return Err(CipherError::Exhausted);
        }
        let mut bytes = [0; 12];
        bytes[4..].copy_from_slice(&self.next.to_be_bytes());
        self.next += 1;
        Ok(Nonce::assume_unique_for_key(bytes))
    }
}

/// Protects what this side sends.
pub(crate) struct Seal(Counted);

/// Opens what the other side sent.
pub(crate) struct Open(Counted);

impl Seal {
    /// None if the system's cryptography refuses the key, which it does not.
    pub(crate) fn new(secret: &Secret) -> Option<Self> {
        Counted::new(secret).map(Seal)
    }

    /// Encrypts `record`'s plaintext in place; its last `TAG_LEN_BYTES` bytes become the tag.
    pub(crate) fn seal(&mut self, record: &mut [u8]) -> Result<(), CipherError> {
        let nonce = self.0.nonce()?;
        let plain_len = record.len().checked_sub(TAG_LEN_BYTES).ok_or(CipherError::Forged)?;
        let (plain, tag_place) = record.split_at_mut(plain_len);
        let tag = self
            .0
            .key
            .seal_in_place_separate_tag(nonce, Aad::empty(), plain)
            .map_err(|_| CipherError::Exhausted)?;
        tag_place.copy_from_slice(tag.as_ref());
        Ok(())
    }
}

impl Open {
    /// None if the system's cryptography refuses the key, which it does not.
    pub(crate) fn new(secret: &Secret) -> Option<Self> {
        Counted::new(secret).map(Open)
    }

    /// Decrypts in place and gives the plaintext's length. After an error nothing more may be opened.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<usize, CipherError> {
        let nonce = self.0.nonce()?;
        match self.0.key.open_in_place(nonce, Aad::empty(), record) {
            Ok(plain) => Ok(plain.len()),
            Err(_) => Err(CipherError::Forged),
        }
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seal(record {})", self.0.next)
    }
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Open(record {})", self.0.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Seal, Open) {
        let secret = Zeroizing::new([7; 32]);
        (Seal::new(&secret).unwrap(), Open::new(&secret).unwrap())
    }

    #[test]
    fn records_open_once_and_in_order() {
        let (mut seal, mut open) = pair();
        let mut records = [[1; 40], [2; 40]];
        for record in &mut records {
            seal.seal(record).unwrap();
        }
        let mut first = records[0];
        assert_eq!(open.open(&mut first), Ok(24));
        assert_eq!(first[..24], [1; 24]);
        assert_eq!(open.open(&mut records[0].clone()), Err(CipherError::Forged), "a replay");
    }

    #[test]
    fn a_changed_bit_is_noticed() {
        for bit in 0..40 * 8 {
            let (mut seal, mut open) = pair();
            let mut record = [3; 40];
            seal.seal(&mut record).unwrap();
            record[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open.open(&mut record), Err(CipherError::Forged));
        }
        assert_eq!(pair().1.open(&mut [0; 5]), Err(CipherError::Forged));
    }

    #[test]
    fn the_counter_ends_before_a_nonce_repeats() {
        let (mut seal, mut open) = pair();
        seal.0.next = RECORDS_MAX - 1;
        open.0.next = RECORDS_MAX;
        assert_eq!(seal.seal(&mut [0; 40]), Ok(()));
        assert_eq!(seal.seal(&mut [0; 40]), Err(CipherError::Exhausted));
        assert_eq!(open.open(&mut [0; 40]), Err(CipherError::Exhausted));
    }

    /// Our use of the key must be the one of the specification, which snow implements.
    #[test]
    fn the_same_bytes_as_snow() {
        let params: snow::params::NoiseParams = crate::handshake::PATTERN.parse().unwrap();
        let psk = [9; 32];
        let mut client =
            snow::Builder::new(params.clone()).psk(0, &psk).unwrap().build_initiator().unwrap();
        let mut server =
            snow::Builder::new(params).psk(0, &psk).unwrap().build_responder().unwrap();
        let (mut message, mut payload) = ([0; 100], [0; 100]);
        let len = client.write_message(&[], &mut message).unwrap();
        server.read_message(&message[..len], &mut payload).unwrap();
        let len = server.write_message(&[], &mut message).unwrap();
        client.read_message(&message[..len], &mut payload).unwrap();

        let secret = Zeroizing::new(server.dangerously_get_raw_split().0);
        let mut open = Open::new(&secret).unwrap();
        let mut theirs = client.into_transport_mode().unwrap();
        for text in [b"one", b"two"] {
            let len = theirs.write_message(text, &mut message).unwrap();
            assert_eq!(open.open(&mut message[..len]), Ok(3));
            assert_eq!(&message[..3], text);
        }
    }
}
