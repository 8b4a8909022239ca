//! What belongs to the process as a whole comes along.

use slipstream_tests::Build;
use slipstream_tests::moves::moves;

macro_rules! moved_programs {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { moves(Build::dynamic(stringify!($name)), &["an-argument"]); })*
    };
}

moved_programs! {
    sigactions,
    itimers,
    itimer_pending,
    posix_timers,
    credentials,
    privileges,
    umask_cwd,
    limits,
    personality,
    proc_settings,
    arguments,
    session,
    process_group,
    ids,
    chrooted,
}
