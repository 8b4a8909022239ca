//! Verbs: the objects of an adapter as owned values. All `unsafe` of RDMA is here.
//!
//! Rules that make it sound: every object owns what it was made from (by `Arc`), so the library's objects are destroyed in the
//! right order; the library's calls are thread-safe (`man 7 ibv_fork_init` and the verbs manual say so), which is why objects may be
//! sent and shared; memory given to an adapter belongs to a [`Buffer`], which is unmapped after it is deregistered and whose queue
//! pairs are destroyed before it; addresses of the peer are plain numbers.

use crate::error::{Error, Result};
use ibverbs_sys as ffi;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Once};

const RDMA_VERBS_IOCTL: u64 = 0xc018_1b01;
/// Drivers known to kernels of today, and some to come (`enum rdma_driver_id`).
const DRIVER_IDS: u32 = 64;
const PAGE: usize = 4096;
/// Completions polled at a time.
const POLL_MAX: usize = 16;

fn failed(what: &str) -> Error {
    failed_with(what, Errno::last())
}

fn failed_with(what: &str, errno: Errno) -> Error {
    Error::Rdma { what: format!("{what}: {errno}") }
}

/// Verbs return an errno as a number.
fn check(what: &str, ret: i32) -> Result<()> {
    if ret == 0 { Ok(()) } else { Err(failed_with(what, Errno::from_raw(ret.abs()))) }
}

fn made<T>(what: &str, raw: *mut T) -> Result<NonNull<T>> {
    NonNull::new(raw).ok_or_else(|| failed(what))
}

fn set_nonblocking(fd: RawFd) -> Result<()> {
    // SAFETY: integers only.
    let flags = unsafe { nix::libc::fcntl(fd, nix::libc::F_GETFL) };
    // SAFETY: integers only.
    let ret = unsafe { nix::libc::fcntl(fd, nix::libc::F_SETFL, flags | nix::libc::O_NONBLOCK) };
    if flags < 0 || ret < 0 { Err(failed("make a descriptor non-blocking")) } else { Ok(()) }
}

/// An open device.
#[derive(Debug)]
pub(super) struct Context {
    raw: NonNull<ffi::ibv_context>,
    name: String,
    ports: u8,
    reads_asked: u8,
    reads_answered: u8,
}

// SAFETY: see the rules of this module.
unsafe impl Send for Context {}
// SAFETY: see the rules of this module.
unsafe impl Sync for Context {}

/// A port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Port {
    pub(super) number: u8,
    pub(super) active: bool,
    pub(super) ethernet: bool,
    pub(super) lid: u16,
    pub(super) mtu: u8,
    pub(super) gids: u32,
}

/// What a GID is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GidKind {
    InfiniBand,
    RoceV1,
    RoceV2,
}

/// An address of a port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gid {
    pub(super) index: u8,
    pub(super) bytes: [u8; 16],
    pub(super) kind: GidKind,
}

/// Opens every device of this host; none is no error.
pub(super) fn open_devices() -> Result<Vec<Arc<Context>>> {
    static FORK: Once = Once::new();
    // Sessions start processes: pages in use by an adapter stay theirs. Kernels since 5.12 see to it by themselves.
    // SAFETY: called before anything else of the library, once.
    FORK.call_once(|| unsafe {
        ffi::ibv_fork_init();
    });
    let mut count = 0;
    // SAFETY: `count` outlives the call.
    let list = unsafe { ffi::ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        return match Errno::last() {
            Errno::ENOSYS | Errno::ENOENT => Ok(Vec::new()),
            errno => Err(failed_with("list RDMA adapters", errno)),
        };
    }
    let (mut contexts, mut refused) = (Vec::new(), None);
    for i in 0..count as usize {
        // SAFETY: the list has `count` entries, all of them devices, until it is freed.
        match unsafe { Context::open(*list.add(i)) } {
            Ok(context) => contexts.push(Arc::new(context)),
            Err(e) => refused = Some(e),
        }
    }
    // SAFETY: freed once; devices that were opened stay open.
    unsafe { ffi::ibv_free_device_list(list) };
    match refused {
        // One that can't be opened is in nobody's way, unless there is no other.
        Some(e) if contexts.is_empty() => Err(e),
        _ => Ok(contexts),
    }
}

impl Context {
    /// Opens a device.
    ///
    /// # Safety
    /// `device` is of a device list that has not been freed.
    unsafe fn open(device: *mut ffi::ibv_device) -> Result<Self> {
        // SAFETY: the caller's promise; the name lives as long as the list.
        let (raw, name) = unsafe {
            let name = CStr::from_ptr(ffi::ibv_get_device_name(device));
            (ffi::ibv_open_device(device), name.to_string_lossy().into_owned())
        };
        let raw = made(&format!("open adapter {name} (see /dev/infiniband)"), raw)?;
        let mut context = Self { raw, name, ports: 0, reads_asked: 0, reads_answered: 0 };
        let mut attr = ffi::ibv_device_attr::default();
        // SAFETY: `attr` outlives the call.
        check("query an adapter", unsafe { ffi::ibv_query_device(raw.as_ptr(), &raw mut attr) })?;
        set_nonblocking(context.async_fd())?;
        let small = |n: i32| u8::try_from(n.clamp(0, 255)).unwrap_or(u8::MAX);
        context.ports = attr.phys_port_cnt;
        context.reads_asked = small(attr.max_qp_init_rd_atom);
        context.reads_answered = small(attr.max_qp_rd_atom);
        Ok(context)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn ports(&self) -> u8 {
        self.ports
    }

    /// READs that a queue pair may have outstanding.
    pub(super) fn reads_asked(&self) -> u8 {
        self.reads_asked
    }

    /// READs that a queue pair answers at a time.
    pub(super) fn reads_answered(&self) -> u8 {
        self.reads_answered
    }

    pub(super) fn port(&self, number: u8) -> Result<Port> {
        let mut attr = ffi::ibv_port_attr::default();
        // SAFETY: the call writes no more than the older, shorter form of the structure.
        let ret = unsafe { ffi::ibv_query_port(self.raw.as_ptr(), number, (&raw mut attr).cast()) };
        check("query an adapter's port", ret)?;
        Ok(Port {
            number,
            active: attr.state == ffi::ibv_port_state::IBV_PORT_ACTIVE,
            ethernet: u32::from(attr.link_layer) == ffi::IBV_LINK_LAYER_ETHERNET,
            lid: attr.lid,
            mtu: attr.active_mtu as u8,
            gids: attr.gid_tbl_len.max(0) as u32,
        })
    }

    /// An address of a port; `None` where the table has a gap.
    pub(super) fn gid(&self, port: u8, index: u32) -> Option<Gid> {
        let mut entry = ffi::ibv_gid_entry::default();
        let len = size_of::<ffi::ibv_gid_entry>();
        let raw = self.raw.as_ptr();
        // SAFETY: `entry` outlives the call, and its length is told.
        let ret =
            unsafe { ffi::_ibv_query_gid_ex(raw, u32::from(port), index, &raw mut entry, 0, len) };
        // SAFETY: both variants are plain bytes.
        let bytes = unsafe { entry.gid.raw };
        let kind = match entry.gid_type {
            0 => GidKind::InfiniBand,
            1 => GidKind::RoceV1,
            2 => GidKind::RoceV2,
            _ => return None,
        };
        let index = u8::try_from(index).ok()?;
        (ret == 0 && bytes != [0; 16]).then_some(Gid { index, bytes, kind })
    }

    /// The open file of the device.
    pub(super) fn command_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context owns the descriptor and is borrowed as long.
        unsafe { BorrowedFd::borrow_raw(self.raw.as_ref().cmd_fd) }
    }

    fn async_fd(&self) -> RawFd {
        // SAFETY: an open context.
        unsafe { self.raw.as_ref().async_fd }
    }

    /// What the adapter has said that means the end of reading from `here`, if it has said so. What it says of other ports,
    /// and of other addresses of this one, means nothing.
    pub(super) fn failure(&self, here: Here) -> Option<&'static str> {
        let mut event = ffi::ibv_async_event::default();
        loop {
            // SAFETY: `event` outlives the call; the descriptor does not block.
            if unsafe { ffi::ibv_get_async_event(self.raw.as_ptr(), &raw mut event) } != 0 {
                return None;
            }
            // SAFETY: of events that are about a port, which are those it is looked at for, this is the number.
            let port = unsafe { event.element.port_num };
            let kind = event.event_type;
            // SAFETY: an event that was got just now, acknowledged once.
            unsafe { ffi::ibv_ack_async_event(&raw mut event) };
            if let Some(fatal) = self.end_of_reading(kind, port, here) {
                return Some(fatal);
            }
        }
    }

    fn end_of_reading(
        &self,
        event: ffi::ibv_event_type,
        port: i32,
        here: Here,
    ) -> Option<&'static str> {
        let ours = port == i32::from(here.port);
        match event {
            ffi::IBV_EVENT_DEVICE_FATAL => Some("the adapter has failed or was removed"),
            ffi::IBV_EVENT_QP_FATAL | ffi::IBV_EVENT_QP_REQ_ERR | ffi::IBV_EVENT_QP_ACCESS_ERR => {
                Some("a queue pair has failed")
            }
            ffi::IBV_EVENT_CQ_ERR => Some("a completion queue has failed"),
            ffi::IBV_EVENT_PORT_ERR if ours => Some("its port went down"),
            ffi::IBV_EVENT_GID_CHANGE if ours && !self.has_address(here) => {
                Some("its address is gone")
            }
            ffi::IBV_EVENT_LID_CHANGE if ours && !here.ethernet => Some("its address changed"),
            _ => None,
        }
    }

    /// True while the port has the address that the queue pairs were connected by.
    fn has_address(&self, here: Here) -> bool {
        self.gid(here.port, u32::from(here.gid_index)).is_some_and(|gid| gid.bytes == here.gid)
    }

    /// The kernel's number of the driver. A request for a method that does not exist is refused in one way by the right
    /// driver, and in another for all the wrong ones (seen on Linux 6.1 and 6.12).
    pub(super) fn driver_id(&self) -> Option<u32> {
        #[repr(C)]
        #[derive(Default)]
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
        let fd = self.command_fd().as_raw_fd();
        (0..DRIVER_IDS).find(|driver_id| {
            let driver_id = *driver_id;
            let mut header =
                Header { length: 24, method_id: 0xfff, driver_id, ..Header::default() };
            // SAFETY: the request is as long as its header says.
            let ret = unsafe { nix::libc::ioctl(fd, RDMA_VERBS_IOCTL, &raw mut header) };
            ret < 0 && Errno::last() == Errno::EPROTONOSUPPORT
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: everything made from it is gone: it held an `Arc` of this.
        unsafe { ffi::ibv_close_device(self.raw.as_ptr()) };
    }
}

/// The library's words for how a READ failed.
pub(super) fn status_name(status: u32) -> String {
    // SAFETY: any number is answered by a string that lives for ever.
    unsafe { CStr::from_ptr(ffi::ibv_wc_status_str(status)) }.to_string_lossy().into_owned()
}

/// A descriptor that is readable when a queue pair's channel or another descriptor is. It is of no use any longer than either.
pub(super) fn watch(pair: &QueuePair, other: Option<RawFd>) -> Result<Epoll> {
    let failed = |errno| failed_with("watch an adapter", errno);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
    for fd in [Some(pair.channel_fd()), other].into_iter().flatten() {
        // SAFETY: borrowed for this call only.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(failed)?;
    }
    Ok(epoll)
}

/// Leaves a queue pair's channel out of a set. It can be readable for ever once nobody takes its notices.
pub(super) fn unwatch(epoll: &Epoll, pair: &QueuePair) {
    // SAFETY: borrowed for this call only.
    let fd = unsafe { BorrowedFd::borrow_raw(pair.channel_fd()) };
    // Fails only where it is not in the set.
    let _ = epoll.delete(fd);
}

/// A protection domain.
#[derive(Debug)]
pub(super) struct Domain {
    raw: NonNull<ffi::ibv_pd>,
    context: Arc<Context>,
}

// SAFETY: see the rules of this module.
unsafe impl Send for Domain {}
// SAFETY: see the rules of this module.
unsafe impl Sync for Domain {}

impl Domain {
    pub(super) fn new(context: Arc<Context>) -> Result<Arc<Self>> {
        // SAFETY: an open context.
        let raw =
            made("make a protection domain", unsafe { ffi::ibv_alloc_pd(context.raw.as_ptr()) })?;
        Ok(Arc::new(Self { raw, context }))
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The kernel's number of it.
    pub(super) fn handle(&self) -> u32 {
        // SAFETY: a live protection domain.
        unsafe { self.raw.as_ref().handle }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // Refused while a frozen process has regions in it; closing the device ends those as well.
        // SAFETY: everything of ours made from it is gone: it held an `Arc` of this.
        unsafe { ffi::ibv_dealloc_pd(self.raw.as_ptr()) };
    }
}

/// Memory of ours that adapters read or write.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: NonNull<u8>,
    layout: Layout,
    region: NonNull<ffi::ibv_mr>,
    _domain: Arc<Domain>,
}

// SAFETY: see the rules of this module; the memory is the buffer's own.
unsafe impl Send for Buffer {}
// SAFETY: shared, it is only read.
unsafe impl Sync for Buffer {}

/// What may be done with a buffer, or over a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Our READs write to it.
    Target,
    /// The peer's READs read it.
    Source,
}

impl Buffer {
    pub(super) fn new(domain: &Arc<Domain>, len: usize, usage: Use) -> Result<Self> {
        let layout = Layout::from_size_align(len.max(PAGE), PAGE)
            .map_err(|e| Error::Rdma { what: format!("a buffer of {len} bytes: {e}") })?;
        // SAFETY: the layout is not empty.
        let memory = made("make a buffer", unsafe { alloc_zeroed(layout) })?;
        let access = match usage {
            Use::Target => ffi::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE,
            Use::Source => ffi::ibv_access_flags::IBV_ACCESS_REMOTE_READ,
        };
        let (raw, at) = (domain.raw.as_ptr(), memory.as_ptr().cast());
        // SAFETY: the range was allocated above and lives until the region is deregistered.
        let region = unsafe { ffi::ibv_reg_mr(raw, at, layout.size(), access.0 as i32) };
        match made("register a buffer (see `ulimit -l`)", region) {
            Ok(region) => Ok(Self { memory, layout, region, _domain: Arc::clone(domain) }),
            Err(e) => {
                // SAFETY: allocated above with this layout, and nobody has it.
                unsafe { dealloc(memory.as_ptr(), layout) };
                Err(e)
            }
        }
    }

    pub(super) fn fill(&mut self, content: &[u8]) {
        let len = content.len().min(self.layout.size());
        // SAFETY: inside the allocation; the peer may only read.
        unsafe { ptr::copy_nonoverlapping(content.as_ptr(), self.memory.as_ptr(), len) };
    }

    /// A range that no READ is writing to: the caller's bookkeeping sees to that.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub(super) fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.layout.size()));
        // SAFETY: inside the allocation, initialised (zeroed, then written by the adapter).
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(offset), len) }
    }

    pub(super) fn address(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    fn lkey(&self) -> u32 {
        // SAFETY: a live region.
        unsafe { self.region.as_ref().lkey }
    }

    pub(super) fn rkey(&self) -> u32 {
        // SAFETY: a live region.
        unsafe { self.region.as_ref().rkey }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: a live region, deregistered once; queue pairs that could write to it are gone.
        let ret = unsafe { ffi::ibv_dereg_mr(self.region.as_ptr()) };
        if ret == 0 {
            // SAFETY: allocated with this layout, and the adapter can't reach it any more. (Where it can, it is left to it.)
            unsafe { dealloc(self.memory.as_ptr(), self.layout) };
        }
    }
}

/// How a READ ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completion {
    pub(super) number: u64,
    /// The verbs' status, if it failed.
    pub(super) error: Option<u32>,
}

/// One READ to be posted.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadRequest {
    pub(super) remote_address: u64,
    pub(super) rkey: u32,
    pub(super) offset: usize,
    pub(super) len_bytes: u32,
    /// Completes with this number; without one, the next that has one tells.
    pub(super) signalled: Option<u64>,
}

/// What the two ends of a queue pair have to know of each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub(super) queue_pair: u32,
    pub(super) lid: u16,
    pub(super) gid: [u8; 16],
    pub(super) psn: u32,
    pub(super) mtu: u8,
    /// READs under way at a time, asked and answered.
    pub(super) reads: u8,
}

/// Our end's address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Here {
    pub(super) port: u8,
    pub(super) ethernet: bool,
    pub(super) gid_index: u8,
    pub(super) gid: [u8; 16],
    pub(super) psn: u32,
}

/// A reliable-connected queue pair with a completion queue and a completion channel of its own.
#[derive(Debug)]
pub(super) struct QueuePair {
    raw: NonNull<ffi::ibv_qp>,
    queue: NonNull<ffi::ibv_cq>,
    channel: NonNull<ffi::ibv_comp_channel>,
    here: Here,
    domain: Arc<Domain>,
}

// SAFETY: see the rules of this module.
unsafe impl Send for QueuePair {}
// SAFETY: see the rules of this module; only the creation of a lane moves it between threads.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// `depth` is how many READs may be posted at a time; the peer may READ only where `usage` is `Source`.
    pub(super) fn new(domain: &Arc<Domain>, depth: u32, here: Here, usage: Use) -> Result<Self> {
        let context = domain.context.raw.as_ptr();
        // SAFETY: an open context.
        let channel =
            made("make a completion channel", unsafe { ffi::ibv_create_comp_channel(context) })?;
        let entries = depth.max(1) as i32;
        // SAFETY: context and channel are live; no user pointer is kept.
        let queue = made("make a completion queue", unsafe {
            ffi::ibv_create_cq(context, entries, ptr::null_mut(), channel.as_ptr(), 0)
        });
        let queue = queue.inspect_err(|_| {
            // SAFETY: made above, and nothing uses it.
            unsafe { ffi::ibv_destroy_comp_channel(channel.as_ptr()) };
        })?;
        let mut attr = ffi::ibv_qp_init_attr {
            send_cq: queue.as_ptr(),
            recv_cq: queue.as_ptr(),
            qp_type: ffi::ibv_qp_type::IBV_QPT_RC,
            ..Default::default()
        };
        attr.cap.max_send_wr = depth.max(1);
        attr.cap.max_recv_wr = 1;
        attr.cap.max_send_sge = 1;
        attr.cap.max_recv_sge = 1;
        // SAFETY: the domain and the queue are live, `attr` outlives the call.
        let raw = made("make a queue pair", unsafe {
            ffi::ibv_create_qp(domain.raw.as_ptr(), &raw mut attr)
        });
        let raw = raw.inspect_err(|_| {
            // SAFETY: made above, and nothing uses them.
            unsafe {
                ffi::ibv_destroy_cq(queue.as_ptr());
                ffi::ibv_destroy_comp_channel(channel.as_ptr());
            }
        })?;
        let pair = Self { raw, queue, channel, here, domain: Arc::clone(domain) };
        set_nonblocking(pair.channel_fd())?;
        pair.init(usage)?;
        Ok(pair)
    }

    pub(super) fn number(&self) -> u32 {
        // SAFETY: a live queue pair.
        unsafe { self.raw.as_ref().qp_num }
    }

    /// Readable when a completion has come since [`QueuePair::arm`].
    pub(super) fn channel_fd(&self) -> RawFd {
        // SAFETY: a live channel.
        unsafe { self.channel.as_ref().fd }
    }

    fn modify(
        &self,
        what: &str,
        attr: &mut ffi::ibv_qp_attr,
        mask: ffi::ibv_qp_attr_mask,
    ) -> Result<()> {
        // SAFETY: a live queue pair; `attr` outlives the call.
        let ret = unsafe { ffi::ibv_modify_qp(self.raw.as_ptr(), attr, mask.0 as i32) };
        check(what, ret)
    }

    fn init(&self, usage: Use) -> Result<()> {
        use ffi::ibv_qp_attr_mask as Mask;
        let access = match usage {
            Use::Target => 0,
            Use::Source => ffi::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0,
        };
        let mut attr = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_INIT,
            port_num: self.here.port,
            qp_access_flags: access,
            ..Default::default()
        };
        let mask = Mask::IBV_QP_STATE
            | Mask::IBV_QP_PKEY_INDEX
            | Mask::IBV_QP_PORT
            | Mask::IBV_QP_ACCESS_FLAGS;
        self.modify("prepare a queue pair", &mut attr, mask)
    }

    /// Connects to the peer's queue pair.
    pub(super) fn connect(&self, peer: &Peer) -> Result<()> {
        use ffi::ibv_qp_attr_mask as Mask;
        /// 4.096 us times two to this power, 0.13 s, and so often: a peer that is gone is noticed in one to four seconds (measured
        /// on Soft-RoCE; the standard lets adapters take four times as long).
        const ACK_TIMEOUT: u8 = 15;
        /// Soft-RoCE takes 7 for without end (`rxe_completer`, seen on Linux 6.1), as the standard has it for the other count.
        const RETRIES: u8 = 6;
        const HOPS: u8 = 64;
        /// 0.64 ms.
        const RNR_TIMER: u8 = 12;
        let mut attr = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTR,
            path_mtu: u32::from(peer.mtu),
            dest_qp_num: peer.queue_pair,
            rq_psn: peer.psn,
            max_dest_rd_atomic: peer.reads,
            min_rnr_timer: RNR_TIMER,
            ..Default::default()
        };
        attr.ah_attr.dlid = peer.lid;
        attr.ah_attr.port_num = self.here.port;
        if self.here.ethernet {
            attr.ah_attr.is_global = 1;
            attr.ah_attr.grh.dgid = ffi::ibv_gid { raw: peer.gid };
            attr.ah_attr.grh.sgid_index = self.here.gid_index;
            attr.ah_attr.grh.hop_limit = HOPS;
        }
        let mask = Mask::IBV_QP_STATE
            | Mask::IBV_QP_AV
            | Mask::IBV_QP_PATH_MTU
            | Mask::IBV_QP_DEST_QPN
            | Mask::IBV_QP_RQ_PSN
            | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | Mask::IBV_QP_MIN_RNR_TIMER;
        self.modify("connect a queue pair", &mut attr, mask)?;
        let mut attr = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTS,
            timeout: ACK_TIMEOUT,
            retry_cnt: RETRIES,
            rnr_retry: RETRIES,
            sq_psn: self.here.psn,
            max_rd_atomic: peer.reads.min(self.domain.context.reads_asked()).max(1),
            ..Default::default()
        };
        let mask = Mask::IBV_QP_STATE
            | Mask::IBV_QP_TIMEOUT
            | Mask::IBV_QP_RETRY_CNT
            | Mask::IBV_QP_RNR_RETRY
            | Mask::IBV_QP_SQ_PSN
            | Mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify("start a queue pair", &mut attr, mask)
    }

    /// Ends it: nothing is written to buffers any more.
    pub(super) fn stop(&self) {
        let mut attr =
            ffi::ibv_qp_attr { qp_state: ffi::ibv_qp_state::IBV_QPS_ERR, ..Default::default() };
        // A device that is gone can't be told.
        let _ = self.modify("stop a queue pair", &mut attr, ffi::ibv_qp_attr_mask::IBV_QP_STATE);
    }

    /// Posts READs into a buffer by one call. It is the caller's bookkeeping that no two write to the same place, and that
    /// nobody looks there before they have completed.
    pub(super) fn read(&self, buffer: &Buffer, requests: &[ReadRequest]) -> Result<()> {
        let mut pieces: Vec<ffi::ibv_sge> = requests
            .iter()
            .map(|r| {
                let end = r.offset + r.len_bytes as usize;
                assert!(end <= buffer.layout.size(), "a READ beyond its buffer");
                let addr = buffer.address() + r.offset as u64;
                ffi::ibv_sge { addr, length: r.len_bytes, lkey: buffer.lkey() }
            })
            .collect();
        let mut chain: Vec<ffi::ibv_send_wr> = Vec::with_capacity(requests.len());
        for (request, piece) in requests.iter().zip(&mut pieces) {
            let mut wr = ffi::ibv_send_wr {
                wr_id: request.signalled.unwrap_or(u64::MAX),
                sg_list: piece,
                num_sge: 1,
                opcode: ffi::ibv_wr_opcode::IBV_WR_RDMA_READ,
                ..Default::default()
            };
            if request.signalled.is_some() {
                wr.send_flags = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
            }
            wr.wr.rdma.remote_addr = request.remote_address;
            wr.wr.rdma.rkey = request.rkey;
            chain.push(wr);
        }
        for i in 1..chain.len() {
            let next: *mut ffi::ibv_send_wr = &raw mut chain[i];
            chain[i - 1].next = next;
        }
        let Some(first) = chain.first_mut() else { return Ok(()) };
        let mut bad = ptr::null_mut();
        // SAFETY: a live queue pair, whose context has the call; the chain and its pieces outlive the call, and the
        // buffer outlives the queue pair (a lane owns both and drops the queue pair first).
        let ret = unsafe {
            let context = &*self.raw.as_ref().context;
            match context.ops.post_send {
                Some(post) => post(self.raw.as_ptr(), first, &raw mut bad),
                None => Errno::ENOSYS as i32,
            }
        };
        check("post a READ", ret)
    }

    /// Completions that have come, at most a few.
    pub(super) fn poll(&self, found: &mut Vec<Completion>) -> Result<()> {
        let mut completions = [ffi::ibv_wc::default(); POLL_MAX];
        // SAFETY: a live queue, whose context has the call; the array is as long as told.
        let count = unsafe {
            let context = &*self.queue.as_ref().context;
            match context.ops.poll_cq {
                Some(poll) => poll(self.queue.as_ptr(), POLL_MAX as i32, completions.as_mut_ptr()),
                None => -1,
            }
        };
        if count < 0 {
            return Err(Error::Rdma { what: "a completion queue can't be polled".into() });
        }
        found.extend(
            completions.iter().take(count as usize).map(|c| Completion {
                number: c.wr_id(),
                error: c.error().map(|(status, _)| status),
            }),
        );
        Ok(())
    }

    /// Has the next completion make the channel readable. Poll again afterwards: one may have come before.
    pub(super) fn arm(&self) -> Result<()> {
        // SAFETY: a live queue, whose context has the call.
        let ret = unsafe {
            let context = &*self.queue.as_ref().context;
            match context.ops.req_notify_cq {
                Some(notify) => notify(self.queue.as_ptr(), 0),
                None => Errno::ENOSYS as i32,
            }
        };
        check("arm a completion queue", ret)
    }

    /// Takes the notice that made the channel readable; false if there is none.
    pub(super) fn take_notice(&self) -> bool {
        let (mut queue, mut user) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: a live channel that does not block; a notice that was got is acknowledged once.
        unsafe {
            let channel = self.channel.as_ptr();
            if ffi::ibv_get_cq_event(channel, &raw mut queue, &raw mut user) != 0 {
                return false;
            }
            ffi::ibv_ack_cq_events(queue, 1);
        }
        true
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: each destroyed once, users before what they use; all notices are acknowledged.
        unsafe {
            ffi::ibv_destroy_qp(self.raw.as_ptr());
            ffi::ibv_destroy_cq(self.queue.as_ptr());
            ffi::ibv_destroy_comp_channel(self.channel.as_ptr());
        }
    }
}
