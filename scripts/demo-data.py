"""Holds megabytes of data, checks a block at every step before it changes it, and writes a digest now and then.

What it writes depends on nothing but its argument, so a moved run can be compared with an unmoved one.
"""

import hashlib
import random
import sys

BLOCK_LEN = 64 * 1024
ROUNDS = 40

blocks_len = int(sys.argv[1]) * 1_000_000 // BLOCK_LEN
rng = random.Random(20240229)
blocks = [bytearray(rng.randbytes(BLOCK_LEN)) for _ in range(blocks_len)]
digests = [hashlib.sha256(block).digest() for block in blocks]
total = hashlib.sha256()

for round_number in range(ROUNDS):
    for _ in range(blocks_len // 2):
        at = rng.randrange(blocks_len)
        block = blocks[at]
        if hashlib.sha256(block).digest() != digests[at]:
            print(f"block {at} is damaged in round {round_number}", flush=True)
            sys.exit(1)
        offset = rng.randrange(BLOCK_LEN - 32)
        block[offset : offset + 32] = digests[at]
        digests[at] = hashlib.sha256(block).digest()
        total.update(digests[at])
    print(f"round {round_number}: {total.hexdigest()}", flush=True)

whole = hashlib.sha256()
for block, digest in zip(blocks, digests):
    if hashlib.sha256(block).digest() != digest:
        print("a block is damaged at the end", flush=True)
        sys.exit(1)
    whole.update(block)
print(f"all {blocks_len} blocks: {whole.hexdigest()}")
