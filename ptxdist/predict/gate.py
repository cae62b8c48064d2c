"""Which requests the viewer's server accepts: from whom, how large, how fast, how many.

Owns: limits, security headers, and the check of host and origin. Refuses: pages of other origins, unknown host names,
files that are too large or too slow, too many requests, and large files for which there is no memory beside those in
work, each with a status and a sentence.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from ptxdist.dicom.tags import MAX_INFLATED

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Connection": "close",  # each connection carries one request, so that its times can be limited
}


_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d+)?", re.ASCII)  # address in brackets, or name; port


@dataclass(frozen=True)
class Limits:
    """Size and times of a request, and how many there may be, in all and from one address.

    A head has to arrive within `head_s`. A file has `patience_s`, and a second more for each `least_rate` bytes that
    have arrived, up to `upload_s`. `send_s` is how long an answer may take to be received. Files in work may have
    `held_bytes` together; those of up to `small_bytes` are accepted beside them too.
    """

    max_bytes: int = MAX_INFLATED
    held_bytes: int = 2 * MAX_INFLATED
    small_bytes: int = 32 * 2**20
    head_s: float = 10
    patience_s: float = 5
    least_rate: int = 100_000
    upload_s: float = 60
    compute_s: float = 60
    send_s: float = 60
    at_once: int = 8
    at_once_each: int = 4
    a_minute: int = 60
    connections: int = 64
    connections_each: int = 32

    @property
    def longest_s(self) -> float:
        """Longest time that a connection may be open."""
        return self.head_s + self.upload_s + (self.at_once + 1) * self.compute_s + self.send_s


DEFAULT = Limits()


class Gate:
    """Counts requests, and rejects those above the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._inside, self._held = limits, Counter[str](), 0
        self._times: dict[str, deque[float]] = {}

    @contextmanager
    def enter(self, address: str, size: int) -> Iterator[None]:
        """Count a request with a file of `size` bytes while the block runs; HTTPException 413, 429 or 503."""
        if size > self._limits.max_bytes:
            raise HTTPException(413, f"This file has more than the {self._limits.max_bytes:,} bytes that are accepted.")
        now = time.monotonic()
        self._times = {key: times for key, times in self._times.items() if times[-1] > now - 60}
        times = self._times.get(address, deque())
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= self._limits.a_minute:
            wait = math.ceil(times[0] + 60 - now)
            words = f"More than {self._limits.a_minute} files in a minute; try again in {wait} s."
            raise HTTPException(429, words, {"Retry-After": str(wait)})
        here, all_ = self._inside[address], self._inside.total()
        if here >= self._limits.at_once_each or all_ >= self._limits.at_once:
            words = f"{all_} files are in work, and no more can wait; try again in a few seconds."
            raise HTTPException(503, words, {"Retry-After": "5"})
        if size > self._limits.small_bytes and self._held + size > self._limits.held_bytes:
            words = "There is no room for this file beside the large ones in work; try again in a few seconds."
            raise HTTPException(503, words, {"Retry-After": "5"})
        self._times.setdefault(address, times).append(now)
        self._inside[address] += 1
        self._held += size
        try:
            yield
        finally:
            self._held -= size
            self._inside[address] -= 1
            self._inside += Counter()  # drops the addresses without a request


def sender_of(address: str) -> str:
    """Who is counted as one: an IPv4 address, or a network of IPv6, since a machine may have all addresses of one."""
    with suppress(ValueError):
        return str(ipaddress.IPv6Network((address.partition("%")[0], 64), strict=False))
    return address


async def read_body(request: Request, limits: Limits) -> bytearray:
    """The body of a request; HTTPException 400 or 408 when it does not arrive."""
    content, stream = bytearray(), request.stream()
    begin = asyncio.get_running_loop().time()
    try:
        while True:
            granted = min(limits.patience_s + len(content) / limits.least_rate, limits.upload_s)
            async with asyncio.timeout_at(begin + granted):
                part = await anext(stream, None)
            if part is None:
                break
            content += part
    except TimeoutError:
        raise HTTPException(408, f"Of the file, only {len(content):,} bytes arrived within {granted:.3g} s.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The file did not arrive.") from None
    return content


def refusal(request: Request, known: frozenset[str]) -> tuple[int, str] | None:
    """Status and sentence for a request that another web page may have made, by DNS rebinding or across origins."""
    host = request.headers.get("host", "")
    if not _is_known(host, known):
        return 421, "This server does not answer to that host name; use its address, or start it with --host NAME."
    foreign = any(_host_of(origin) != host for origin in request.headers.getlist("origin"))
    foreign |= not {"same-origin", "none"}.issuperset(request.headers.getlist("sec-fetch-site"))
    if foreign and request.method not in ("GET", "HEAD"):
        return 403, "Only the viewer's own page may send files here."
    return None


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _is_known(host: str, known: frozenset[str]) -> bool:
    # An address is safe from DNS rebinding; only a name can be made to point to this server.
    found = _HOST.fullmatch(host.lower())
    if found is None:
        return False
    with suppress(ValueError):
        return bool(ipaddress.ip_address(found[1] or found[2]))
    return found[2] in known
