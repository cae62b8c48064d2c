"""JPEG-LS (ITU-T T.87 annex A, one component), written as described there: imagecodecs writes 8 and 16 bits only."""

from __future__ import annotations

import struct
from collections.abc import Sequence

_RUNS = (*[0] * 4, *[1] * 4, *[2] * 4, *[3] * 4, 4, 4, 5, 5, 6, 6, 7, 7, *range(8, 16))  # J of T.87 A.2.1
_RESET = 64
_INTERRUPTED = 365  # the two contexts of a run's end; those below are of single values


class _Encoder:
    def __init__(self, bits: int, near: int) -> None:
        self.largest, self.near, self.step = 2**bits - 1, near, 2 * near + 1
        self.range = (self.largest + 2 * near) // self.step + 1
        self.range_bits = (self.range - 1).bit_length()
        self.limit = 2 * (bits + max(8, bits))
        factor = (min(self.largest, 4095) + 128) // 256
        self.thresholds = (factor + 2 + 3 * near, 4 * factor + 3 + 5 * near, 17 * factor + 4 + 7 * near)
        start = max(2, (self.range + 32) // 64)
        self.a, self.b, self.c, self.n = [start] * 367, [0] * 365, [0] * 365, [1] * 367
        self.negative, self.run = [0, 0], 0
        self.text: list[str] = []

    def line(self, values: Sequence[int], above: Sequence[int], corner: int) -> list[int]:
        """Encode a row; return it as a decoder has it. `corner` is the value above and left of its first one."""
        found: list[int] = []
        while (x := len(found)) < len(values):
            left = found[-1] if found else above[0]
            over, before = above[x], above[x - 1] if x else corner
            after = above[min(x + 1, len(above) - 1)]
            steps = [self._level(step) for step in (after - over, over - before, before - left)]
            if any(steps):
                found.append(self._single(values[x], left, over, before, steps))
                continue
            end = x
            while end < len(values) and abs(values[end] - left) <= self.near:
                end += 1
            found += [left] * (end - x)
            self._count(end - x, is_last=end == len(values))
            if end < len(values):
                found.append(self._end_of_run(values[end], left, above[end]))
        return found

    def _level(self, step: int) -> int:
        size = sum(abs(step) >= threshold for threshold in self.thresholds) + (abs(step) > self.near)
        return size if step > 0 else -size

    def _single(self, value: int, left: int, over: int, before: int, steps: list[int]) -> int:
        q = (steps[0] * 9 + steps[1]) * 9 + steps[2]
        sign, q = (-1, -q) if q < 0 else (1, q)
        low, high = min(left, over), max(left, over)
        expected = low if before >= high else high if before <= low else left + over - before
        expected = min(max(expected + sign * self.c[q], 0), self.largest)
        error, found = self._error(value, expected, sign)
        k = self._bits(self.a[q], self.n[q])
        if self.near == 0 and k == 0 and 2 * self.b[q] <= -self.n[q]:
            mapped = 2 * error + 1 if error >= 0 else -2 * (error + 1)
        else:
            mapped = 2 * error if error >= 0 else -2 * error - 1
        self._golomb(mapped, k, self.limit)
        self.b[q] += error * self.step
        self.a[q] += abs(error)
        if self.n[q] == _RESET:
            self.a[q], self.b[q], self.n[q] = self.a[q] >> 1, self.b[q] >> 1, self.n[q] >> 1
        self.n[q] += 1
        if self.b[q] <= -self.n[q]:
            self.b[q] = max(self.b[q] + self.n[q], 1 - self.n[q])
            self.c[q] = max(self.c[q] - 1, -128)
        elif self.b[q] > 0:
            self.b[q] = min(self.b[q] - self.n[q], 0)
            self.c[q] = min(self.c[q] + 1, 127)
        return found

    def _error(self, value: int, expected: int, sign: int) -> tuple[int, int]:
        """The error as it is coded, and the value that a decoder has."""
        error = sign * (value - expected)
        error = (abs(error) + self.near) // self.step * (1 if error > 0 else -1)
        found = min(max(expected + sign * error * self.step, 0), self.largest)
        error %= self.range
        return error - self.range if error >= (self.range + 1) // 2 else error, found

    @staticmethod
    def _bits(a: int, n: int) -> int:
        return next(k for k in range(40) if n << k >= a)

    def _golomb(self, mapped: int, k: int, limit: int) -> None:
        zeros = mapped >> k
        if zeros < limit - self.range_bits - 1:
            self.text.append("0" * zeros + "1" + (f"{mapped & (1 << k) - 1:0{k}b}" if k else ""))
        else:
            self.text.append("0" * (limit - self.range_bits - 1) + f"1{mapped - 1:0{self.range_bits}b}")

    def _count(self, length: int, *, is_last: bool) -> None:
        while length >= 1 << _RUNS[self.run]:
            self.text.append("1")
            length -= 1 << _RUNS[self.run]
            self.run = min(self.run + 1, 31)
        if is_last:
            self.text.append("1" * (length > 0))
        else:
            self.text.append("0" + (f"{length:0{_RUNS[self.run]}b}" if _RUNS[self.run] else ""))

    def _end_of_run(self, value: int, left: int, over: int) -> int:
        kind = int(abs(left - over) <= self.near)
        q, sign = _INTERRUPTED + kind, -1 if not kind and left > over else 1
        error, found = self._error(value, left if kind else over, sign)
        k = self._bits(self.a[q] + (self.n[q] >> 1) * kind, self.n[q])
        often = 2 * self.negative[kind] >= self.n[q]
        flip = (k == 0 and error > 0 and not often) or (error < 0 and (often or k != 0))
        mapped = 2 * abs(error) - kind - flip
        self._golomb(mapped, k, self.limit - _RUNS[self.run] - 1)
        self.negative[kind] += error < 0
        self.a[q] += (mapped + 1 - kind) >> 1
        if self.n[q] == _RESET:
            self.a[q], self.n[q], self.negative[kind] = self.a[q] >> 1, self.n[q] >> 1, self.negative[kind] >> 1
        self.n[q] += 1
        self.run = max(self.run - 1, 0)
        return found


def encode_jpeg_ls(rows: list[list[int]], bits: int, near: int = 0) -> bytes:
    """The stream of an image of unsigned values of 8 bits or more; `near` is the largest error."""
    encoder, columns = _Encoder(bits, near), len(rows[0])
    corner, above = 0, [0] * columns
    for values in rows:
        corner, above = above[0], encoder.line(values, above, corner)
    text, scan = "".join(encoder.text), bytearray()
    position = 0
    while position < len(text):
        size = 7 if scan[-1:] == b"\xff" else 8  # a zero bit follows 255
        scan.append(int(text[position : position + size].ljust(size, "0"), 2))
        position += size
    scan += bytes(scan[-1:] == b"\xff")
    size = b"\xff\xf7\0\x0b" + struct.pack(">BHHB", bits, len(rows), columns, 1) + b"\1\x11\0"
    return b"\xff\xd8" + size + b"\xff\xda\0\x08\1\1\0" + bytes([near, 0, 0]) + bytes(scan) + b"\xff\xd9"
