# The demo of softroce-lab; sourced there, with a lab of its own up and `bin` the binary.
# shellcheck shell=bash disable=SC2154
#
#   LAB_DEMO_MB=N   megabytes that the program holds (default 24: emulation is slow)

# start_on_1 NAME CMD...: starts a command on host 1 with its output in the share, and sets `pid`, its PID there.
start_on_1() {
    local name=$1
    shift
    # shellcheck disable=SC2016
    run_on 1 setsid --fork bash -c 'out=$0; cd "$LAB_SHARE"; echo $$ >"$out.new"; mv "$out.new" "$out.pid"
        exec "$@" </dev/null >"$out.out" 2>/dev/null' "$name" "$@"
    for _ in $(seq 200); do [ -s "$share/$name.pid" ] && break; sleep 0.1; done
    pid=$(cat "$share/$name.pid")
}

start_agent_on_2() {
    "$bin" keygen "$share/key"
    # shellcheck disable=SC2016
    run_on 2 setsid --fork bash -c 'exec "$0" agent --listen 10.77.0.2:0 --key "$LAB_SHARE/key" \
        --run-dir /run/slipstream </dev/null >"$LAB_SHARE/agent.log" 2>&1' "$bin"
    for _ in $(seq 200); do
        address=$(sed -n 's/^listening on //p' "$share/agent.log" 2>/dev/null) || true
        [ -z "$address" ] || return 0
        sleep 0.1
    done
    cat "$share/agent.log" >&2
    die "the agent on host 2 does not come up"
}

lab_demo() {
    local python half there text comm
    local mb=${LAB_DEMO_MB:-24}
    [[ $mb =~ ^[1-9][0-9]*$ ]] || die "LAB_DEMO_MB must be a number of megabytes, not '$mb'"
    # The interpreter itself: a wrapper of a version manager is a shell for a while.
    python=$(python3 -c 'import os, sys; print(os.path.realpath(sys.executable))')
    cp "$here/demo-data.py" "$share/"
    say "a program that holds $mb MB and checks them, on this machine, unmoved"
    "$python" "$here/demo-data.py" "$mb" </dev/null >"$share/reference"
    start_agent_on_2
    say "the same on host 1, to be moved half way to tcp://$address"
    start_on_1 demo "$python" "$share/demo-data.py" "$mb"
    half=$(($(wc -l <"$share/reference") / 2))
    while [ "$(wc -l <"$share/demo.out")" -lt "$half" ]; do
        run_on 1 test -d "/proc/$pid" || die "the program ended early"
        sleep 0.3
    done
    comm=$(run_on 1 cat "/proc/$pid/comm")
    text=$(run_on 1 "$bin" migrate "$pid" "tcp://$address" --key "$share/key" --transport rdma \
        --run-dir /run/slipstream) ||
        { cat "$share/agent.log" >&2; die "the migration failed"; }
    printf '%s\n' "$text"
    there=$(sed -n 's/.*moved, PID \([0-9]*\) there.*/\1/p' <<<"$text")
    [ -n "$there" ] || die "the summary names no PID"
    [ "$(run_on 2 cat "/proc/$there/comm" 2>/dev/null)" = "$comm" ] || die "$comm does not run on host 2"
    say "it runs on host 2 as PID $there; waiting for its end"
    while run_on 2 test -d "/proc/$there"; do sleep 0.5; done
    cmp "$share/reference" "$share/demo.out" || die "the outputs differ"
    say "demo: $(stat -c %s "$share/demo.out") bytes, the same as those of the unmoved run"
}
