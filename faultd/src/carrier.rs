//! What shall carry the pages: RDMA where both hosts have it, or TCP.

use crate::error::Error;
use slipstream_transport::rdma::Selection;
use std::ffi::OsString;

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// RDMA if both hosts can reach each other by it, else TCP.
    #[default]
    Auto,
    /// RDMA, or nothing.
    Rdma,
    /// TCP.
    Tcp,
}

/// What was asked for, and which adapter if it is RDMA.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carrier {
    /// What was asked for.
    pub wish: Wish,
    /// The adapter.
    pub selection: Selection,
}

/// Arguments that a carrier takes on a command line.
pub const ARGS: usize = 3;

impl Carrier {
    /// As arguments of a hidden subcommand.
    pub fn to_args(&self) -> [OsString; ARGS] {
        let wish = match self.wish {
            Wish::Auto => "auto",
            Wish::Rdma => "rdma",
            Wish::Tcp => "tcp",
        };
        let device = self.selection.device.clone().unwrap_or_default();
        let gid = self.selection.gid_index.map(|i| i.to_string()).unwrap_or_default();
        [wish.into(), device.into(), gid.into()]
    }

    /// From arguments; `None` when they are malformed.
    pub fn from_args(args: &[OsString]) -> Option<Self> {
        let [wish, device, gid] = args else { return None };
        let wish = match wish.to_str()? {
            "auto" => Wish::Auto,
            "rdma" => Wish::Rdma,
            "tcp" => Wish::Tcp,
            _ => return None,
        };
        let device = Some(device.to_str()?.to_owned()).filter(|d| !d.is_empty());
        let gid_index = match gid.to_str()? {
            "" => None,
            index => Some(index.parse().ok()?),
        };
        Some(Self { wish, selection: Selection { device, gid_index } })
    }
}

/// RDMA was asked for and can't be had.
pub fn refusal(why: &str) -> Error {
    Error::Refused {
        reason: format!("--transport rdma: {why}"),
        remedy: "`slipstream check` lists adapters; or use --transport auto".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_round_trip() {
        let chosen = Selection { device: Some("rxe0".into()), gid_index: Some(1) };
        for carrier in [Carrier::default(), Carrier { wish: Wish::Rdma, selection: chosen }] {
            assert_eq!(Carrier::from_args(&carrier.to_args()), Some(carrier));
        }
        assert_eq!(Carrier::from_args(&["pigeon".into(), "".into(), "".into()]), None);
    }
}
