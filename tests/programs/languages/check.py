"""Holds a few hundred MB of checked data in many small and some large objects, with threads; moved in the middle."""
import hashlib, os, sys, threading

flag = sys.argv[1]
small = {i: hashlib.md5(b"%d" % i).hexdigest() for i in range(300_000)}
large = [hashlib.sha256(b"%d" % i).digest() * 32768 for i in range(100)]
stop = threading.Event()
failures = []


def check_small(step):
    number = 0
    while not stop.is_set():
        number = (number * 61 + step) % 300_000
        if small[number] != hashlib.md5(b"%d" % number).hexdigest():
            failures.append("small %d" % number)
        temporary = [str(i) for i in range(200)]  # The allocator is never at rest.
        del temporary


threads = [threading.Thread(target=check_small, args=(step,)) for step in (1, 7)]
for thread in threads:
    thread.start()
print("ready", flush=True)
while not os.path.exists(flag):
    stop.wait(0.01)
stop.set()
for thread in threads:
    thread.join()
for i, block in enumerate(large):
    if block != hashlib.sha256(b"%d" % i).digest() * 32768:
        failures.append("large %d" % i)
for i, text in small.items():
    if text != hashlib.md5(b"%d" % i).hexdigest():
        failures.append("small %d at the end" % i)
print("FAIL: " + ", ".join(failures[:5]) if failures else "OK", flush=True)
