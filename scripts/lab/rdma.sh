# What softroce-lab rdma checks; sourced there, with a lab of its own up and `bin` the binary.
# shellcheck shell=bash disable=SC2154
#
#   LAB_RDMA_MB=N   megabytes that the moved program holds (default 96)

mb=${LAB_RDMA_MB:-96}

# start_program NAME: starts the program on host 1 and sets `pid`.
start_program() {
    rm -f "$share/$1.flag"
    start_on_1 "$1" "$python" "$here/lab/memory.py" "$mb" "$share/$1.flag"
    for _ in $(seq 300); do grep -q ready "$share/$1.out" && return; sleep 0.2; done
    die "the program on host 1 does not get ready"
}

# migrate NAME ARG...: moves $pid; events go to NAME.json in the share. Sets `code`.
migrate() {
    local name=$1
    shift
    code=0
    run_on 1 "$bin" migrate "$pid" "tcp://$address" --key "$share/key" --run-dir /run/slipstream --json "$@" \
        >"$share/$name.json" 2>"$share/$name.err" || code=$?
}

# field NAME EVENT KEY: a field of the first such event.
field() {
    python3 - "$share/$1.json" "$2" "$3" <<'P'
import json, sys
events = [json.loads(line) for line in open(sys.argv[1])]
print(next((e[sys.argv[3]] for e in events if e["event"] == sys.argv[2]), ""))
P
}

fails() {
    cat "$share/$1.json" "$share/$1.err" "$share/agent.log" >&2 2>/dev/null || true
    die "$2"
}

# check_memory NAME: has the moved program check all it holds.
check_memory() {
    touch "$share/$1.flag"
    for _ in $(seq 300); do
        grep -q '^wrong' "$share/$1.out" && break
        sleep 0.2
    done
    grep -qx 'wrong 0' "$share/$1.out" || fails "$1" "the moved program found $(tail -n 1 "$share/$1.out")"
}

# huge_pages always|madvise: which memory of host 1 the kernel makes huge pages of.
huge_pages() {
    # shellcheck disable=SC2016
    run_on 1 bash -c 'echo "$0" >/sys/kernel/mm/transparent_hugepage/enabled' "$1"
}

# Pages are read from the frozen process's own memory: over RDMA, and its frames are what they were.
check_zero_copy() {
    local watcher rate best
    say "a move over RDMA of $mb MB; the frozen copy's page frames are watched"
    start_program copy
    # The kernel puts pages together to huge ones, also those of a stopped process: not now.
    huge_pages madvise
    run_on 1 "$python" "$here/lab/frames.py" "$pid" $((mb * 900)) >"$share/frames.out" 2>&1 &
    watcher=$!
    for _ in $(seq 100); do grep -q watching "$share/frames.out" && break; sleep 0.1; done
    migrate copy --transport rdma
    [ $code = 0 ] || fails copy "the migration ended with exit code $code"
    wait $watcher || fails copy "frames: $(cat "$share/frames.out")"
    huge_pages always
    say "$(tail -n 1 "$share/frames.out")"
    [ "$(field copy completed transport)" = rdma ] || fails copy "it did not go over RDMA"
    [ "$(field copy completed rdma_bytes)" -gt $((mb * 500000)) ] || fails copy "too little was read by RDMA"
    check_memory copy
    rate=$(field copy completed mb_per_s)
    best=$(read_bandwidth)
    say "drain $(printf %.1f "$rate") MB/s, ib_read_bw $best MB/s: $(python3 -c "print(f'{$rate / $best:.2f}')") of it"
}

# ib_read_bw between the two hosts with 1 MiB messages, in MB/s.
read_bandwidth() {
    run_on 1 ib_read_bw -d rxe0 -x 1 -s 1048576 -n 60 >/dev/null 2>&1 &
    sleep 2
    run_on 2 ib_read_bw -d rxe0 -x 1 -s 1048576 -n 60 10.77.0.1 2>/dev/null |
        awk '$1 == 1048576 { printf "%.1f", $4 * 1.048576 }'
    wait $!
}

# ib_read_lat between the two hosts with a page, its median in microseconds.
read_latency() {
    run_on 1 ib_read_lat -d rxe0 -x 1 -s 4096 -n 1000 >/dev/null 2>&1 &
    sleep 2
    run_on 2 ib_read_lat -d rxe0 -x 1 -s 4096 -n 1000 10.77.0.1 2>/dev/null | awk '$1 == 4096 { print $5 }'
    wait $!
}

# What faults and drains cost, and beside it what the RDMA tools say of the same network. Figures are told, not judged.
measure() {
    local bench
    bench=$(dirname "$bin")/slipstream-bench
    [ -x "$bench" ] || { say "skipped: latency: there is no slipstream-bench beside $bin"; return 0; }
    say "latency of faults over RDMA, and what a drain costs the source"
    run_on 1 env SLIPSTREAM_BIN="$bin" "$bench" latency "tcp://$address" --key "$share/key" --transport rdma \
        --mb "$mb" --pages 2000 --json "$share/latency.json" --svg "$share/latency.svg" >"$share/latency.out" 2>"$share/latency.err" ||
        { cat "$share/latency.err" "$share/agent.log" >&2; die "slipstream-bench latency failed"; }
    sed '/^$/,$d' "$share/latency.out"
    python3 - "$share/latency.json" "$(read_latency)" "$(read_bandwidth)" <<'P'
import json, sys
told = json.load(open(sys.argv[1]))
m, latency, bandwidth = told["measured"], float(sys.argv[2]), float(sys.argv[3])
network = {name: m[name]["fault_parts"]["network"]["us_p50"] for name in ("alone", "beside")}
cpu = {name: m[name]["source"]["cpu_us"] for name in ("idle", "tcp")}
registered = m["idle"]["source"]
per_byte = registered["registration_cpu_us"] / max(registered["registered_bytes"], 1)
for what, ratio, wanted in (
    (f"fault's network part / ib_read_lat ({latency:.0f} us), alone", network["alone"] / latency, "<= 1.15"),
    ("the same beside prefetch", network["beside"] / latency, "<= 2.5"),
    (f"drain / ib_read_bw ({bandwidth:.1f} MB/s)", m["idle"]["mb_per_s"] / bandwidth, ">= 0.85"),
    ("processor time of the source, RDMA / TCP", cpu["idle"] / max(cpu["tcp"], 1), "<= 0.1"),
    ("registration / copy, per byte", per_byte * m["idle"]["bytes"] / m["copy_us"], "<= 0.3"),
):
    print(f"{what:<60} {ratio:>9.2f} {wanted:>9}")
P
}

# RoCE packets (UDP port 4791) are lost from the middle of a drain on: the rest comes over TCP.
check_fail_over() {
    local mover note
    say "a move during which the network loses all of RDMA"
    start_program over
    migrate over --transport rdma &
    mover=$!
    for _ in $(seq 300); do
        grep -q '"resumed"' "$share/over.json" 2>/dev/null && break
        sleep 0.05
    done
    sleep 0.5
    run_on 2 tc qdisc add dev eth0 ingress
    run_on 2 tc filter add dev eth0 parent ffff: protocol ip u32 match ip protocol 17 0xff \
        match ip dport 4791 0xffff action drop
    wait $mover
    [ "$(field over completed pages_total)" ] || fails over "it did not complete"
    note=$(field over note text)
    [[ $note == *"RDMA has failed"* ]] || fails over "nobody was told that RDMA failed"
    say "$note"
    check_memory over
    run_on 2 tc qdisc del dev eth0 ingress
}

# Without an adapter RDMA is refused by name, and `auto` takes TCP and says why.
check_without_adapter() {
    say "moves from a host without an adapter"
    run_on 1 rdma link delete rxe0
    start_program none
    migrate none --transport rdma
    [ $code = 3 ] || fails none "--transport rdma without an adapter ended with $code"
    grep -q 'no RDMA adapter' "$share/none.err" || fails none "the refusal names no reason"
    migrate none
    [ $code = 0 ] || fails none "--transport auto without an adapter ended with $code"
    [ "$(field none completed transport)" = tcp ] || fails none "it did not go over TCP"
    [[ $(field none completed why_tcp) == *"no RDMA adapter"* ]] || fails none "nobody was told why"
    check_memory none
    run_on 1 rdma link add rxe0 type rxe netdev eth0
}

lab_rdma() {
    # The interpreter itself: a wrapper of a version manager is a shell for a while.
    python=$(python3 -c 'import os, sys; print(os.path.realpath(sys.executable))')
    start_agent_on_2
    run_on 1 "$bin" check | grep -q 'rxe0 port 1: Ethernet, active' || die "check does not list the adapter"
    check_zero_copy
    measure
    check_fail_over
    check_without_adapter
    say "lab: everything passed"
}
