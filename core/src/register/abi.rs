//! The kernel's interface for registering memory: `REG_MR` through `RDMA_VERBS_IOCTL`, as in
//! `<rdma/rdma_user_ioctl_cmds.h>` and `<rdma/ib_user_verbs.h>`. The older interface by `write` is refused to a process
//! that did not open the device.

use std::ops::Range;

/// `_IOWR(0x1b, 1, struct ib_uverbs_ioctl_hdr)`.
pub const RDMA_VERBS_IOCTL: u64 = 0xc018_1b01;
/// Bytes of a request: header, three attributes, the command and its response.
pub const REQUEST_LEN: u64 = size_of::<Request>() as u64;

const OBJECT_DEVICE: u16 = 0;
const METHOD_INVOKE_WRITE: u16 = 0;
const ATTR_CORE_IN: u16 = 0;
const ATTR_CORE_OUT: u16 = 1;
const ATTR_WRITE_CMD: u16 = 2;
const ATTR_MANDATORY: u16 = 1;
const COMMAND_REG_MR: u64 = 9;
/// `IB_ACCESS_REMOTE_READ` alone: with `LOCAL_WRITE` read-only mappings are refused, and pages would be unshared.
const ACCESS_REMOTE_READ: u32 = 4;

#[repr(C)]
struct Header {
    length: u16,
    object_id: u16,
    method_id: u16,
    num_attrs: u16,
    reserved1: u64,
    driver_id: u32,
    reserved2: u32,
}
const _: () = assert!(size_of::<Header>() == 24);

#[repr(C)]
struct Attr {
    id: u16,
    len: u16,
    flags: u16,
    reserved: u16,
    data: u64,
}
const _: () = assert!(size_of::<Attr>() == 16);

/// `struct ib_uverbs_reg_mr`.
#[repr(C)]
struct RegMr {
    response: u64,
    start: u64,
    length: u64,
    hca_va: u64,
    pd_handle: u32,
    access_flags: u32,
}
const _: () = assert!(size_of::<RegMr>() == 40);

/// `struct ib_uverbs_reg_mr_resp`.
#[repr(C)]
struct RegMrResp {
    mr_handle: u32,
    lkey: u32,
    rkey: u32,
}
const _: () = assert!(size_of::<RegMrResp>() == 12);

#[repr(C)]
struct Request {
    header: Header,
    attrs: [Attr; 3],
    command: RegMr,
    response: RegMrResp,
    pad: u32,
}
const _: () = assert!(size_of::<Request>() == 128);

const COMMAND_OFFSET: u64 = std::mem::offset_of!(Request, command) as u64;
const RESPONSE_OFFSET: u64 = std::mem::offset_of!(Request, response) as u64;

/// A piece of the frozen process's memory that an adapter can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address, also the one that the adapter knows it by.
    pub start: u64,
    /// Length.
    pub len_bytes: u64,
    /// What the peer's adapter has to show.
    pub rkey: u32,
    /// Names the region for its end.
    pub handle: u32,
}

/// Builds the bytes of a request that will lie at `at` in the process that makes it.
pub fn request(at: u64, range: &Range<u64>, pd_handle: u32, driver_id: u32) -> Vec<u8> {
    let len = range.end - range.start;
    let mut out = Vec::with_capacity(REQUEST_LEN as usize);
    let halves = |out: &mut Vec<u8>, words: [u16; 4]| {
        out.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    };
    let length = size_of::<Header>() + 3 * size_of::<Attr>();
    halves(&mut out, [length as u16, OBJECT_DEVICE, METHOD_INVOKE_WRITE, 3]);
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&driver_id.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    let attrs = [
        (ATTR_WRITE_CMD, 8, COMMAND_REG_MR),
        (ATTR_CORE_IN, size_of::<RegMr>() as u16, at + COMMAND_OFFSET),
        (ATTR_CORE_OUT, size_of::<RegMrResp>() as u16, at + RESPONSE_OFFSET),
    ];
    for (id, len, data) in attrs {
        halves(&mut out, [id, len, ATTR_MANDATORY, 0]);
        out.extend_from_slice(&data.to_le_bytes());
    }
    for word in [0, range.start, len, range.start] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&pd_handle.to_le_bytes());
    out.extend_from_slice(&ACCESS_REMOTE_READ.to_le_bytes());
    out.resize(REQUEST_LEN as usize, 0);
    out
}

/// Reads the response in a request that has succeeded.
///
/// # Panics
/// If `request` is shorter than one.
pub fn response(request: &[u8], range: &Range<u64>) -> Region {
    let word = |at: usize| {
        u32::from_le_bytes(request[at..at + 4].try_into().expect("four bytes of a request"))
    };
    let at = RESPONSE_OFFSET as usize;
    Region {
        start: range.start,
        len_bytes: range.end - range.start,
        handle: word(at),
        rkey: word(at + 8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_points_into_itself() {
        let bytes = request(0x7000_0000, &(0x1000..0x5000), 3, 14);
        assert_eq!(bytes.len() as u64, REQUEST_LEN);
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), 24 + 3 * 16);
        assert_eq!(word(24 + 16 + 8), 0x7000_0000 + COMMAND_OFFSET);
        assert_eq!(word(24 + 32 + 8), 0x7000_0000 + RESPONSE_OFFSET);
        let command = COMMAND_OFFSET as usize;
        assert_eq!(
            [word(command + 8), word(command + 16), word(command + 24)],
            [0x1000, 0x4000, 0x1000]
        );
        assert_eq!(word(command + 32), 3 | (u64::from(ACCESS_REMOTE_READ) << 32));
    }

    #[test]
    fn a_response_is_read_from_its_place() {
        let mut bytes = request(0, &(0x1000..0x5000), 3, 14);
        let at = RESPONSE_OFFSET as usize;
        for (i, word) in [7u32, 8, 9].iter().enumerate() {
            bytes[at + 4 * i..at + 4 * i + 4].copy_from_slice(&word.to_le_bytes());
        }
        let region = Region { start: 0x1000, len_bytes: 0x4000, rkey: 9, handle: 7 };
        assert_eq!(response(&bytes, &(0x1000..0x5000)), region);
    }
}
