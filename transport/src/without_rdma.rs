//! Stands in for the RDMA lanes in a build without them: there are none to be had, and nothing of them can exist.

use crate::error::{Error, Result};
use crate::lane::PageLane;
use crate::tcp::TcpPageLane;
use std::convert::Infallible;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

const WHY: &str = "this slipstream was built without RDMA";

/// Which adapter to use, where it is not to be chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Name of the device.
    pub device: Option<String>,
    /// Index of the GID of its port.
    pub gid_index: Option<u8>,
}

/// This host's adapters in words, a line each; one line that says so where there are none.
pub fn describe_adapters() -> Vec<String> {
    vec![WHY.to_owned()]
}

/// The source's adapter.
#[derive(Debug)]
pub struct Source(Infallible);

impl Source {
    /// Opens adapters; with them comes what the destination chooses from.
    pub fn candidates(_: &Selection, _: IpAddr) -> Result<(Self, Vec<u8>)> {
        Err(Error::Rdma { what: WHY.into() })
    }

    /// Connects as the destination has chosen.
    pub fn connect(&mut self, _: &[u8], _: usize) -> Result<Vec<u8>> {
        match self.0 {}
    }

    /// The open device.
    pub fn command_fd(&self) -> BorrowedFd<'_> {
        match self.0 {}
    }

    /// The kernel's number of the protection domain.
    pub fn pd_handle(&self) -> u32 {
        match self.0 {}
    }

    /// The kernel's number of the driver.
    pub fn driver_id(&self) -> u32 {
        match self.0 {}
    }
}

/// The destination's adapter.
#[derive(Debug)]
pub struct Reader(Infallible);

impl Reader {
    /// Chooses an adapter for what the source has.
    pub fn pick(
        _: &Selection,
        _: &[u8],
        _: IpAddr,
        _: IpAddr,
        _: usize,
    ) -> Result<(Self, Vec<u8>)> {
        Err(Error::Rdma { what: WHY.into() })
    }

    /// Connects and reads once.
    pub fn connect(&mut self, _: &[u8]) -> Result<()> {
        match self.0 {}
    }

    /// Times READs.
    pub fn time_reads(&mut self, _: u32) -> Result<Vec<Duration>> {
        match self.0 {}
    }

    /// Makes lanes that read where they can.
    pub fn into_lanes(self, _: Vec<TcpPageLane>, _: &Arc<Regions>) -> Vec<Box<dyn PageLane>> {
        match self.0 {}
    }

    /// How it goes.
    pub fn health(&self) -> Arc<Health> {
        match self.0 {}
    }
}

/// What of the source's memory can be read.
#[derive(Debug, Default)]
pub struct Regions(());

impl Regions {
    /// Adds one.
    pub fn add(&self, _: u64, _: u64, _: u32) -> Result<()> {
        Err(Error::Rdma { what: WHY.into() })
    }
}

/// How reading goes.
#[derive(Debug)]
pub struct Health(Infallible);

impl Health {
    /// Why nothing is read any more.
    pub fn failure(&self) -> Option<String> {
        match self.0 {}
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        match self.0 {}
    }
}
