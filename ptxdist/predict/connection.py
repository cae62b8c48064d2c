"""Connections to the viewer's server: one request each, and limits of their number and times.

Owns: what happens to a connection whose request is no HTTP, comes too slowly, or whose answer is not received, and
which one makes room when there are too many. uvicorn itself waits for a head without end, and refuses in its own words.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ptxdist.predict.gate import HEADERS, Limits, sender_of

_MOST_HEAD_BYTES = 64 * 1024
_MOST_HEAD_LINES = 100  # h11 needs 10 µs for each


class _Http(h11.Connection):
    """HTTP without chunked bodies: one of a byte a chunk takes the server a second of computing for 250 kB."""

    chunked = False

    def next_event(self) -> Any:
        """As h11's; RemoteProtocolError for a request with a chunked body, before any of it is read."""
        event = super().next_event()
        if isinstance(event, h11.Request) and any(name == b"transfer-encoding" for name, _ in event.headers):
            self.chunked = True
            raise h11.RemoteProtocolError("chunked", 411)
        return event


class _Transport:
    """The transport of a connection, which after `close` reads on until the other side has closed it too.

    A socket that is closed while a body still comes resets the connection, and the sender never sees the answer.
    """

    def __init__(self, transport: asyncio.Transport, on_close: Callable[[], None]) -> None:
        self._transport, self._on_close, self._closed = transport, on_close, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more is sent, nor used of what arrives."""
        return self._closed or self._transport.is_closing()

    def close(self) -> None:
        """Send the end of the answer."""
        if self.is_closing():
            return
        self._closed = True
        try:
            self._transport.write_eof()
        except OSError:  # the other side has gone
            self._transport.abort()
            return
        self._transport.resume_reading()
        self._on_close()


class Connection(H11Protocol):
    """A connection; `peers` are the open ones of the server, the oldest first."""

    def __init__(self, *args: Any, limits: Limits, peers: dict[Connection, None], **named: Any) -> None:
        super().__init__(*args, **named)
        self.conn = _Http(h11.SERVER, max_incomplete_event_size=_MOST_HEAD_BYTES)
        self._limits, self._peers, self.sender, self._lines = limits, peers, "", 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let the oldest connection without a request, or an answered one, make room, if there are too many."""
        super().connection_made(cast(asyncio.Transport, _Transport(transport, self._limit_sending)))
        self.sender = sender_of(self.client[0] if self.client else "")
        transport.set_write_buffer_limits(high=0)
        self._peers[self] = None
        crowd = [peer for peer in self._peers if peer.sender == self.sender]
        if len(crowd) <= self._limits.connections_each:
            crowd = list(self._peers) if len(self._peers) > self._limits.connections else []
        if crowd:
            idle = [peer for peer in crowd if peer.cycle is None or peer.cycle.response_complete]
            oldest = min(idle, key=lambda peer: (peer is self, peer.cycle is not None))
            if oldest is self:
                self._refuse(503, "Too many connections are open; try again in a few seconds.")
                return
            self._peers.pop(oldest)
            oldest.transport.abort()
        self._after("head", self._limits.head_s, self._head_is_late)
        self._after("all", self._limits.longest_s, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no longer."""
        self._peers.pop(self, None)
        for timer in self._timers.values():
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of the request."""
        if self.transport.is_closing():
            return
        if self.cycle is None:
            self._lines += data.partition(b"\r\n\r\n")[0].count(b"\n")
            if self._lines > _MOST_HEAD_LINES:
                self._refuse(431, f"The head of this request has more than {_MOST_HEAD_LINES} lines.")
                return
        super().data_received(data)
        if self.cycle is not None:
            self._timers["head"].cancel()

    def pause_writing(self) -> None:
        """The answer is longer than what the other side has received of it."""
        self._limit_sending()
        super().pause_writing()

    def shutdown(self) -> None:
        """The server ends: close it, once a request in work has been answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; `msg` is uvicorn's sentence."""
        if isinstance(self.conn, _Http) and self.conn.chunked:
            self._refuse(411, "Send a file in one piece, with its Content-Length, and not chunked.")
        else:
            self._refuse(400, "This is no valid HTTP request.")

    def _head_is_late(self) -> None:
        received, _ = self.conn.trailing_data
        if received:
            self._refuse(408, f"The request did not arrive within {self._limits.head_s:g} s.")
        else:  # such as a browser's, opened in advance
            self.transport.close()

    def _limit_sending(self) -> None:
        self._after("send", self._limits.send_s, self.transport.abort)

    def _refuse(self, status: int, sentence: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started:
            self.transport.abort()
            return
        body = json.dumps({"error": sentence}).encode()
        headers = {**HEADERS, "Content-Type": "application/json", "Content-Length": len(body)}
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {headers[name]}" for name in headers)]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def _after(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, call)
