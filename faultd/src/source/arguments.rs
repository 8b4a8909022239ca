//! What the command hands to the source session it starts, as arguments.

use crate::carrier::Carrier;
use crate::source::session::SourceConfig;
use slipstream_core::capture::files::StdioPolicy;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

/// The configuration as arguments of the hidden subcommand.
pub fn to_args(config: &SourceConfig) -> Vec<OsString> {
    let stdio = match &config.stdio {
        StdioPolicy::Keep => OsString::from("keep"),
        StdioPolicy::Null => OsString::from("null"),
        StdioPolicy::File(path) => OsString::from_vec(path.clone()),
    };
    let mut args = vec![
        config.pid.to_string().into(),
        config.destination.clone().into(),
        config.key.clone().into(),
        config.run_dir.clone().into(),
        stdio,
        config.timeout.as_micros().to_string().into(),
        config.prefetch_limit.to_string().into(),
    ];
    args.extend(config.carrier.to_args());
    args
}

/// The configuration from arguments; `None` when they are malformed.
pub fn from_args(args: &[OsString]) -> Option<SourceConfig> {
    let [pid, destination, key, run_dir, stdio, timeout, prefetch_limit, carrier @ ..] = args
    else {
        return None;
    };
    let number = |text: &OsStr| text.to_str()?.parse::<u64>().ok();
    Some(SourceConfig {
        pid: i32::try_from(number(pid)?).ok()?,
        destination: destination.to_str()?.to_owned(),
        key: key.into(),
        run_dir: run_dir.into(),
        stdio: match stdio.as_bytes() {
            b"keep" => StdioPolicy::Keep,
            b"null" => StdioPolicy::Null,
            path => StdioPolicy::File(path.to_vec()),
        },
        carrier: Carrier::from_args(carrier)?,
        prefetch_limit: number(prefetch_limit)?,
        timeout: Duration::from_micros(number(timeout)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_round_trip() {
        let config = SourceConfig {
            pid: 7,
            destination: "host:1".into(),
            key: "/k".into(),
            run_dir: "/r".into(),
            stdio: StdioPolicy::File(b"/log".to_vec()),
            carrier: Carrier::default(),
            prefetch_limit: 5,
            timeout: Duration::from_millis(1500),
        };
        assert_eq!(from_args(&to_args(&config)), Some(config));
        assert_eq!(from_args(&[]), None);
    }
}
