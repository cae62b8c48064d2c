"""Which requests the viewer's server accepts: from whom, how large, how many.

Owns: limits, security headers, and the check of host and origin. Refuses: pages of other origins, unknown host names,
files that are too large or too slow, and too many requests, each with a status and a sentence.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections import deque
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
}


@dataclass(frozen=True)
class Limits:
    """Size and time of a request, requests at the same time, and requests a minute from one address."""

    max_bytes: int = MAX_INFLATED
    upload_s: float = 60
    at_once: int = 4
    a_minute: int = 60


DEFAULT = Limits()


class Gate:
    """Counts requests, and rejects those above the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._inside = limits, 0
        self._times: dict[str, deque[float]] = {}

    @contextmanager
    def enter(self, address: str) -> Iterator[None]:
        """Count a request while the block runs; HTTPException 429 or 503 when there are too many."""
        now = time.monotonic()
        self._times = {key: times for key, times in self._times.items() if times[-1] > now - 60}
        times = self._times.get(address, deque())
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= self._limits.a_minute:
            wait = math.ceil(times[0] + 60 - now)
            words = f"More than {self._limits.a_minute} files in a minute; try again in {wait} s."
            raise HTTPException(429, words, {"Retry-After": str(wait)})
        if self._inside >= self._limits.at_once:
            words = f"{self._inside} files are in work, and no more can wait; try again in a few seconds."
            raise HTTPException(503, words, {"Retry-After": "5"})
        self._times.setdefault(address, times).append(now)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request, at most `limits.max_bytes` of it; HTTPException 400, 408 or 413."""
    too_large = HTTPException(413, f"This file has more than the {limits.max_bytes:,} bytes that are accepted.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_bytes:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(limits.upload_s):
            async for part in request.stream():
                if len(content) + len(part) > limits.max_bytes:
                    raise too_large
                content += part
    except TimeoutError:
        raise HTTPException(408, f"The file did not arrive within {limits.upload_s:g} s.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The file did not arrive.") from None
    return bytes(content)


def refusal(request: Request, known: frozenset[str]) -> tuple[int, str] | None:
    """Status and sentence for a request that another web page may have made, by DNS rebinding or across origins."""
    host = request.headers.get("host", "")
    if not _is_known(host, known):
        return 421, "This server does not answer to that host name; use its address, or start it with --host NAME."
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
    foreign = origin is not None and urlsplit(origin).netloc != host
    if request.method not in ("GET", "HEAD") and (foreign or site not in ("same-origin", "none")):
        return 403, "Only the viewer's own page may send files here."
    return None


def _is_known(host: str, known: frozenset[str]) -> bool:
    # An address is safe from DNS rebinding; only a name can be made to point to this server.
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in known
