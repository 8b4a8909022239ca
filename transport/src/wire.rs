//! Page requests and replies as bytes: the contents of a lane's records. Pure, for tests and fuzzing.
//!
//! A record from the destination is a row of requests of 12 bytes: address, length. A record from the source is a row of
//! replies: 16 bytes of address, length and status (0 data, -1 absent, else an errno), and behind a data reply its pages.

use crate::lane::{Content, PageReply, PageRequest, REPLY_DATA_LEN_BYTES_MAX, is_page_range};

/// Length of a request.
pub const REQUEST_LEN_BYTES: usize = 12;
/// Length of a reply without its data.
pub const REPLY_HEAD_LEN_BYTES: usize = 16;
/// Highest errno the kernel has.
pub const ERRNO_MAX: i32 = 4095;

const STATUS_DATA: i32 = 0;
const STATUS_ABSENT: i32 = -1;

/// The bytes of a request.
pub fn encode_request(request: PageRequest) -> [u8; REQUEST_LEN_BYTES] {
    let mut bytes = [0; REQUEST_LEN_BYTES];
    bytes[..8].copy_from_slice(&request.address.to_le_bytes());
    bytes[8..].copy_from_slice(&request.len_bytes.to_le_bytes());
    bytes
}

/// Takes the first request off a record; the error says what is wrong with it.
pub fn decode_request(record: &[u8]) -> Result<(PageRequest, &[u8]), &'static str> {
    let Some((bytes, rest)) = record.split_first_chunk::<REQUEST_LEN_BYTES>() else {
        return Err("a page request is cut short");
    };
    let (address, len_bytes) = address_and_len(bytes);
    let request = PageRequest { address, len_bytes };
    if !request.is_valid() {
        return Err("a page request is not whole pages or too long");
    }
    Ok((request, rest))
}

/// The bytes of a reply without its data, which is `len_bytes` long if the content is data.
pub fn encode_reply_head(
    address: u64,
    len_bytes: u32,
    content: &Content<'_>,
) -> [u8; REPLY_HEAD_LEN_BYTES] {
    let status = match *content {
        Content::Data(_) => STATUS_DATA,
        Content::Absent => STATUS_ABSENT,
        Content::Failed(errno) => errno.clamp(1, ERRNO_MAX),
    };
    let mut bytes = [0; REPLY_HEAD_LEN_BYTES];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len_bytes.to_le_bytes());
    bytes[12..].copy_from_slice(&status.to_le_bytes());
    bytes
}

/// Takes the first reply off a record; the error says what is wrong with it. Whether anyone asked for it is
/// another question.
pub fn decode_reply(record: &[u8]) -> Result<(PageReply<'_>, &[u8]), &'static str> {
    let Some((head, rest)) = record.split_first_chunk::<REPLY_HEAD_LEN_BYTES>() else {
        return Err("a page reply is cut short");
    };
    let (address, len_bytes) = address_and_len(head);
    if !is_page_range(address, len_bytes) {
        return Err("a page reply is not whole pages");
    }
    let status = i32::from_le_bytes([head[12], head[13], head[14], head[15]]);
    let (content, rest) = match status {
        STATUS_DATA if len_bytes > REPLY_DATA_LEN_BYTES_MAX => {
            return Err("a page reply holds too much data");
        }
        STATUS_DATA => match rest.split_at_checked(len_bytes as usize) {
            Some((data, rest)) => (Content::Data(data), rest),
            None => return Err("a page reply's data is cut short"),
        },
        STATUS_ABSENT => (Content::Absent, rest),
        errno @ 1..=ERRNO_MAX => (Content::Failed(errno), rest),
        _ => return Err("a page reply has an unknown status"),
    };
    Ok((PageReply { tag: 0, address, len_bytes, content }, rest))
}

/// The first twelve bytes of requests and replies alike.
fn address_and_len(bytes: &[u8]) -> (u64, u32) {
    let mut address = [0; 8];
    let mut len_bytes = [0; 4];
    address.copy_from_slice(&bytes[..8]);
    len_bytes.copy_from_slice(&bytes[8..12]);
    (u64::from_le_bytes(address), u32::from_le_bytes(len_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::{PAGE_LEN_BYTES, REQUEST_LEN_BYTES_MAX};
    use proptest::prelude::*;

    const PAGE: u32 = PAGE_LEN_BYTES;

    fn encode(reply: &PageReply<'_>) -> Vec<u8> {
        let mut bytes = encode_reply_head(reply.address, reply.len_bytes, &reply.content).to_vec();
        if let Content::Data(data) = reply.content {
            bytes.extend_from_slice(data);
        }
        bytes
    }

    #[test]
    fn bad_requests_are_refused() {
        let refused = |address, len_bytes| {
            let bytes = encode_request(PageRequest { address, len_bytes });
            assert!(decode_request(&bytes).is_err(), "{address:#x} {len_bytes:#x}");
        };
        refused(0, 0);
        refused(1, PAGE);
        refused(0, PAGE + 1);
        refused(0, REQUEST_LEN_BYTES_MAX + PAGE);
        refused(u64::MAX - u64::from(PAGE) + 1, PAGE);
        refused(0, u32::MAX);
        assert!(decode_request(&[0; 11]).is_err());
    }

    #[test]
    fn bad_replies_are_refused() {
        let data = vec![0; 16 * PAGE as usize];
        let too_long =
            PageReply { tag: 0, address: 0, len_bytes: 16 * PAGE, content: Content::Data(&data) };
        assert!(decode_reply(&encode(&too_long)).is_err());
        for status in [-2, i32::MIN, ERRNO_MAX + 1, i32::MAX] {
            let mut bytes = encode_reply_head(0, PAGE, &Content::Absent);
            bytes[12..].copy_from_slice(&status.to_le_bytes());
            assert!(decode_reply(&bytes).is_err());
        }
        let good = PageReply {
            tag: 0,
            address: 0,
            len_bytes: PAGE,
            content: Content::Data(&data[..4096]),
        };
        let bytes = encode(&good);
        for len in 0..bytes.len() {
            assert!(decode_reply(&bytes[..len]).is_err());
        }
    }

    proptest! {
        #[test]
        fn requests_survive(page in 0..1u64 << 51, pages in 1..=REQUEST_LEN_BYTES_MAX / PAGE, more: Vec<u8>) {
            let request = PageRequest { address: page * u64::from(PAGE), len_bytes: pages * PAGE };
            let bytes = [&encode_request(request)[..], &more].concat();
            prop_assert_eq!(decode_request(&bytes), Ok((request, &more[..])));
        }

        #[test]
        fn replies_survive(page in 0..1u64 << 51, pages in 1..=15u32, kind in 0..3, errno in 1..=ERRNO_MAX, more: Vec<u8>) {
            let data = vec![page as u8; (pages * PAGE) as usize];
            let content = match kind {
                0 => Content::Data(&data),
                1 => Content::Absent,
                _ => Content::Failed(errno),
            };
            let reply = PageReply { tag: 0, address: page * u64::from(PAGE), len_bytes: pages * PAGE, content };
            let bytes = [encode(&reply), more.clone()].concat();
            prop_assert_eq!(decode_reply(&bytes), Ok((reply, &more[..])));
        }

        #[test]
        fn any_bytes_are_judged_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode_request(&bytes);
            let _ = decode_reply(&bytes);
        }
    }
}
