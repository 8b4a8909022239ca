"""Watches the memory of process PID while it is being moved away from this host: when its frozen copy has been pinned for an
adapter, its page frames have to be the same as before, and there must not be more of them."""
import os
import struct
import sys
import time

pid, pinned_kb_min = sys.argv[1], int(sys.argv[2])


def status(name):
    with open(f"/proc/{pid}/status") as lines:
        for line in lines:
            if line.startswith(name + ":"):
                return line.split()[1]
    return None


def areas():
    """Large private mappings of nothing, and the heap: where the program's blocks are."""
    with open(f"/proc/{pid}/maps") as lines:
        for line in lines:
            fields = line.split()
            start, end = (int(part, 16) for part in fields[0].split("-"))
            nothing = len(fields) == 5 or fields[5] == "[heap]"
            if fields[1] == "rw-p" and nothing and end - start >= 1 << 20:
                yield start, end


def frames(ranges):
    found = {}
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        for start, end in ranges:
            pagemap.seek(start // 4096 * 8)
            count = (end - start) // 4096
            for page, entry in enumerate(struct.unpack(f"<{count}Q", pagemap.read(count * 8))):
                if entry >> 63:
                    found[start + page * 4096] = entry & (1 << 55) - 1
    return found


def wait_pinned(kb_min):
    """Until the copy stands still and so much of it is pinned. Returns how much."""
    while True:
        try:
            state, pinned = status("State"), int(status("VmPin") or 0)
        except (OSError, TypeError):
            sys.exit("the copy was gone before it had been pinned")
        if state in "Tt" and pinned >= kb_min:
            return pinned
        time.sleep(0.01)


ranges = list(areas())
print("watching", flush=True)
# Before the freeze the kernel may put pages together to huge ones.
if wait_pinned(0) > 0:
    sys.exit("the copy was pinned before it had been looked at")
before, rss_before = frames(ranges), int(status("VmRSS"))
pinned = wait_pinned(pinned_kb_min)
after, rss_after = frames(ranges), int(status("VmRSS"))
moved = sum(after.get(address) != frame for address, frame in before.items())
print(f"pinned {pinned} kB, {moved} of {len(before)} frames changed, {len(after) - len(before)} more,"
      f" resident {rss_after - rss_before} kB more", flush=True)
# Our own mapping in the copy is resident, too.
sys.exit(moved != 0 or len(after) != len(before) or rss_after - rss_before > 1024)
