"""A slow and lossy line between two bridges of this network namespace, since not every kernel has `tc netem`.

    python slow_line.py BRIDGE BRIDGE DELAY_MS LOST

Each frame arrives DELAY_MS later, in both directions, and a share LOST of them never does. Runs until standard input
ends; then the line is cut. Needs root.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x0002 | 0x1000


def end(name: str, bridge: str) -> int:
    """A network interface whose frames this process reads and writes, plugged into a bridge: its file descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    subprocess.run(["ip", "link", "set", name, "master", bridge, "up"], check=True)
    return descriptor


def main(near: str, far: str, delay_s: float, lost: float) -> None:
    ends = end("near", near), end("far", far)
    other = dict(zip(ends, reversed(ends), strict=True))
    chance = random.Random(0)
    on_the_way: list[tuple[float, int, int, bytes]] = []  # when it arrives, a number, where, the frame
    number = 0
    print("ready", flush=True)
    while True:
        wait_s = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for ready in select.select((*ends, sys.stdin), (), (), wait_s)[0]:
            if ready is sys.stdin:
                return
            frame = os.read(ready, 65536)
            if chance.random() >= lost:
                number += 1
                heapq.heappush(on_the_way, (time.monotonic() + delay_s, number, other[ready], frame))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            *_, where, frame = heapq.heappop(on_the_way)
            os.write(where, frame)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1000, float(sys.argv[4]))
