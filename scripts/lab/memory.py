"""Holds MB megabytes of known content; checks them all once FLAG exists, and says how many were wrong."""
import hashlib
import os
import sys
import time


def content(number):
    return hashlib.sha256(b"%d" % number).digest() * 32768


megabytes, flag = int(sys.argv[1]), sys.argv[2]
blocks = [bytearray(content(number)) for number in range(megabytes)]
print("ready", flush=True)
while not os.path.exists(flag):
    time.sleep(0.1)
print("wrong", sum(block != content(number) for number, block in enumerate(blocks)), flush=True)
