# The tests of softroce-lab; sourced there. The same end-to-end tests as everywhere, run by the same runner, which starts
# each of them in a guest instead of here.
# shellcheck shell=bash disable=SC2154

# A line a file of tests/tests. Inside one host: what another kernel than this machine's does differently.
in_a_host=(
    "memory heap shared_anon thp private_file prot_none madvise_flags"
    "threads robust_mutex rseq waits_timed"
    "process posix_timers"
    "descriptors epolls"
    "drain drain_punch"
    "rollback interrupted"
    "invisible invisible_with_one_thread"
    "languages python"
)
# Between the two over TCP: two kernels, and a network that is no veth.
over_tcp=(
    "memory foreign_vdso"
    "threads waits_endless"
    "descriptors pipes"
    "drain drain_killed"
    "adverse clocks_jump"
)
# Between the two over RDMA, with what moves much memory.
over_rdma=(
    "memory anon thp foreign_vdso"
    "threads tids waits_endless"
    "descriptors pipes"
    "drain drain_moves drain_killed"
    "oracle oracle_never_sees_a_difference"
)

lab_test_build() {
    need_rust
    cd "$here/.."
    target=$(realpath -m "${CARGO_TARGET_DIR:-target}")/debug
    say "building what is to be tested"
    cargo build --locked -q -p slipstream
    cargo test --locked -q -p slipstream-tests --no-run
    "$target/slipstream-test-host" compile
}

# run_list PLACE LINE...: the tests that the lines name.
run_list() {
    local place=$1 line file name filter='' code=0 arguments=()
    shift
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$here/softroce-lab run 1"
    if [ "$place" = between ]; then
        # Programs and their output lie where both hosts see them.
        CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER+=" env TMPDIR=$share"
    fi
    for line in "$@"; do
        read -ra arguments <<<"$line"
        file=${arguments[0]}
        if ! cargo nextest --version >/dev/null 2>&1; then
            cargo test --locked -q -p slipstream-tests --test "$file" -- --exact "${arguments[@]:1}" || code=1
            continue
        fi
        for name in "${arguments[@]:1}"; do
            filter+="${filter:+ | }(binary(=$file) & test(=$name))"
        done
    done
    [ -z "$filter" ] ||
        cargo nextest run --locked -p slipstream-tests --no-fail-fast -j 2 -E "$filter" || code=1
    return $code
}

# Sets `far`, where host 2 does what the tests in host 1 ask for.
start_far_host() {
    far=10.77.0.2:7070
    run_on 2 setsid --fork "$target/slipstream-test-host" serve "$far"
}

# test_between TRANSPORT LINE...
test_between() {
    local transport=$1
    shift
    [ -n "${far:-}" ] || start_far_host
    say "end-to-end tests between the two hosts, over $transport"
    SLIPSTREAM_TEST_HOSTS=$far SLIPSTREAM_TEST_MIGRATE_ARGUMENTS="--transport $transport" \
        run_list between "$@"
}

# lab_test [inside|tcp|rdma]...
lab_test() {
    local place failed=()
    [ $# -gt 0 ] || set -- inside tcp rdma
    export LAB_NAME=$lab_name SLIPSTREAM_TEST_SLOWNESS=5 SLIPSTREAM_ORACLE_SEEDS=1
    for place in "$@"; do
        case $place in
        inside)
            say "end-to-end tests inside a host with Linux ${kernel##*/}"
            # The tests' networks inside a host are namespaces, whose addresses the adapter does not have.
            SLIPSTREAM_TEST_MIGRATE_ARGUMENTS="--transport tcp" run_list inside "${in_a_host[@]}" || failed+=(inside)
            ;;
        tcp) test_between tcp "${over_tcp[@]}" || failed+=(tcp) ;;
        rdma) test_between rdma "${over_rdma[@]}" || failed+=(rdma) ;;
        *) die "tests are inside, tcp or rdma, not '$place'" ;;
        esac
    done
    [ ${#failed[@]} = 0 ] || die "lab tests failed: ${failed[*]}"
}
