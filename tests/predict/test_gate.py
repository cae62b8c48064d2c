"""Limits of the viewer's server: sizes, times, numbers, memory; whoever exceeds one does not harm others."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian
from serving import (
    DICOM,
    Here,
    ask,
    connected,
    error_of,
    half_a_file,
    head_of,
    make_predictor,
    raw,
    rest,
    serving,
    until,
)
from slow_worker import work

from ptxdist import Predictor
from ptxdist.predict import server
from ptxdist.predict.connection import Connection
from ptxdist.predict.gate import Limits, sender_of
from ptxdist.predict.worker import Reply, Wanted, Worker, refused
from ptxdist.records import OperatingPoint


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return make_predictor(OperatingPoint(top=0.5, min_area_px=0, bottom=0.5))


def test_a_file_that_is_too_large_is_refused_before_it_has_arrived(predictor: Predictor) -> None:
    with serving(predictor, Limits(max_bytes=1000)) as (url, _):
        with connected(url) as connection:
            connection.sendall(head_of("predict", 1001))
            answer = connection.recv(4096)
            assert b" 413 " in answer.split(b"\r\n")[0]
            assert b"more than the 1,000 bytes" in rest(connection, answer)
        assert error_of(ask(url, "POST", "/api/predict", bytes(1001)))[0] == 413
        assert error_of(ask(url, "POST", "/api/predict", bytes(1000)))[0] == 422


def test_a_file_that_does_not_come_is_not_waited_for(predictor: Predictor) -> None:
    with serving(predictor, Limits(upload_s=0.3)) as (url, _), connected(url) as connection:
        connection.sendall(half_a_file())
        answer = rest(connection, b"")
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert b"Of the file, only 300 bytes arrived within 0.3 s." in answer


def test_a_refusal_arrives_while_the_file_is_still_being_sent(predictor: Predictor) -> None:
    with serving(predictor, Limits(max_bytes=30_000_000, a_minute=1)) as (url, _):
        assert ask(url, "POST", "/api/predict", b"no")[0] == 422
        for path, more, headers, status in (
            ("/api/predict", 0, {}, 429),
            ("/api/predict", 1, {}, 413),
            ("/api/predict", 0, {"Content-Type": "text/plain"}, 415),
            ("/api/predict", 0, {"Origin": "http://evil.example"}, 403),
            ("/api/predict", 0, {"Host": "evil.example"}, 421),
            ("/", 0, {}, 405),
        ):
            assert error_of(ask(url, "POST", path, bytes(30_000_000 + more), {**DICOM, **headers}))[0] == status


def test_places_are_counted_and_given_back(predictor: Predictor) -> None:
    with serving(predictor, Limits(at_once=1, a_minute=10**6)) as (url, _):
        with connected(url) as connection:
            connection.sendall(half_a_file())
            answer = until(lambda: ask(url, "POST", "/api/predict", b"no"), lambda found: found[0] == 503)
            assert answer[1]["retry-after"] == "5"
            assert "no more can wait" in error_of(answer)[1]
        until(lambda: ask(url, "POST", "/api/predict", b"no"), lambda found: found[0] == 422)


def test_a_large_file_needs_room_beside_others_and_a_small_one_does_not(predictor: Predictor) -> None:
    limits = Limits(max_bytes=1000, held_bytes=1500, small_bytes=100, a_minute=10**6)
    with serving(predictor, limits) as (url, defects):
        with connected(url) as connection:
            connection.sendall(half_a_file())
            answer = until(lambda: ask(url, "POST", "/api/predict", bytes(900)), lambda found: found[0] == 503)
            assert answer[1]["retry-after"] == "5"
            assert "no room for this file" in error_of(answer)[1]
            with connected(url) as other:
                other.sendall(head_of("predict", 600))
                until(lambda: ask(url, "POST", "/api/predict", bytes(600)), lambda found: found[0] == 503)
                assert ask(url, "POST", "/api/predict", bytes(100))[0] == 422
        until(lambda: ask(url, "POST", "/api/predict", bytes(900)), lambda found: found[0] == 422)
        assert defects == []


def test_an_address_may_send_so_many_in_a_minute(predictor: Predictor) -> None:
    with serving(predictor, Limits(a_minute=2)) as (url, _):
        assert [ask(url, "POST", "/api/predict", b"no")[0] for _ in range(2)] == [422, 422]
        answer = ask(url, "POST", "/api/predict", b"no")
        assert error_of(answer)[0] == 429
        assert 0 < int(answer[1]["retry-after"]) <= 60
        assert ask(url, "GET", "/")[0] == 200


def test_a_network_of_ipv6_is_one_sender() -> None:
    assert sender_of("2001:db8:1:2:3::4") == sender_of("2001:db8:1:2::") != sender_of("2001:db8:1:3::")
    assert sender_of("fe80::1%eth0") == sender_of("fe80::2%eth0")
    assert (sender_of("192.0.2.1"), sender_of("")) == ("192.0.2.1", "")


def test_idle_connections_keep_nobody_out_and_are_closed(predictor: Predictor) -> None:
    with serving(predictor, Limits(connections=6, connections_each=4, head_s=0.4)) as (url, _):
        idle = [connected(url) for _ in range(9)]
        slow = connected(url)
        slow.sendall(b"GET / HTTP/1.1\r\nHost: local")
        assert ask(url, "GET", "/viewer.svg")[0] == 200
        assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]
        for connection in [*idle, slow]:
            with connection, suppress(ConnectionResetError):
                assert connection.recv(4096) == b""


def test_when_all_connections_are_in_use_another_one_is_refused(predictor: Predictor) -> None:
    with serving(predictor, Limits(connections_each=2, head_s=0.2)) as (url, _), ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connected(url)).sendall(half_a_file())
            time.sleep(0.1)
        head, _, body = raw(url, b"").partition(b"\r\n\r\n")
        assert b" 503 " in head.split(b"\r\n")[0]
        assert b"Too many connections" in body


def test_answered_connections_keep_nobody_out_and_end_with_the_server(predictor: Predictor) -> None:
    with ExitStack() as stack:
        with serving(predictor, Limits(connections=4, connections_each=3)) as (url, _):
            for _ in range(6):
                connection = stack.enter_context(connected(url))
                connection.sendall(b"GET /viewer.svg HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert ask(url, "GET", "/")[0] == 200
            begin = time.monotonic()
        assert time.monotonic() - begin < 3, "it does not wait for those that do not close their connection"


def test_a_burst_of_connections_is_accepted_in_parts(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have a limited number of open files; asyncio accepts all that wait before it begins with one."""
    most, real = 0, Connection.connection_made

    def made(self: Connection, transport: asyncio.Transport) -> None:
        nonlocal most
        if not most:
            time.sleep(0.3)
        most = max(most, len(os.listdir("/proc/self/fd")))
        real(self, transport)

    monkeypatch.setattr(Connection, "connection_made", made)
    with ExitStack() as stack, serving(predictor, Limits(connections=10)) as (url, defects):
        parts = urlsplit(url)
        others = [stack.enter_context(socket.socket()) for _ in range(100)]
        before = len(os.listdir("/proc/self/fd"))
        stack.enter_context(connected(url))
        for other in others:
            other.setblocking(False)
            other.connect_ex((parts.hostname or "", parts.port or 0))
        time.sleep(0.6)
        assert before < most < before + 50
        assert defects == []


def test_an_error_of_the_event_loop_is_a_defect_and_no_traceback(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Connection, data: bytes) -> None:
        raise ValueError("Quagmire")

    with serving(predictor) as (url, defects):
        with monkeypatch.context() as patch, connected(url) as connection:
            patch.setattr(Connection, "data_received", broken)
            connection.sendall(b"GET / HTTP/1.1\r\n")
            assert connection.recv(1) == b""
        assert ask(url, "GET", "/")[0] == 200
    assert [place.split()[0] for place in defects] == ["ValueError"]
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize("is_slow", [False, True])
def test_an_answer_that_nobody_receives_keeps_its_place_for_a_limited_time(
    predictor: Predictor, file_of: Callable[..., bytes], is_slow: bool
) -> None:
    content = file_of(np.full((2500, 2500), 90, np.uint8), ExplicitVRLittleEndian)
    limits = Limits(at_once=1, send_s=0.3, a_minute=10**6)
    with serving(predictor, limits) as (url, _), connected(url, buffer=4096) as stopped:
        stopped.sendall(head_of("maps", len(content)) + content)
        received = len(stopped.recv(1))
        assert ask(url, "POST", "/api/predict", b"no")[0] == 503, "as many answers as places are in memory"
        with suppress(ConnectionResetError):
            end = time.monotonic() + 0.6
            while time.monotonic() < end:
                received += len(stopped.recv(4096)) if is_slow else 0
                time.sleep(0.01)
        assert ask(url, "POST", "/api/predict", b"no")[0] == 422
        with suppress(ConnectionResetError):
            while part := stopped.recv(2**16):
                received += len(part)
        assert received < 2500 * 2500, "the levels alone have a byte for each pixel"


def test_the_end_of_an_answer_has_a_limited_time_too(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the server's memory, but less than asyncio waits for."""

    def listen(host: str, port: int) -> socket.socket:
        listening = real(host, port)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listening

    real = server.listen
    monkeypatch.setattr(server, "listen", listen)
    with serving(predictor, Limits(send_s=0.2)) as (url, _), connected(url, buffer=4096) as stopped:
        whole = len(ask(url, "GET", "/viewer.js")[2])
        stopped.sendall(b"GET /viewer.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.5)
        received = 0
        with suppress(ConnectionResetError):
            while part := stopped.recv(2**16):
                received += len(part)
        assert received < whole


def test_a_sender_that_has_gone_costs_no_computing(predictor: Predictor) -> None:
    """Its file is not predicted when its turn comes; the next one is."""
    worker = Here(predictor, Limits())
    calls, begun, go = [], threading.Event(), threading.Event()

    def predict(content: bytes, wanted: Wanted) -> Reply:
        calls.append(len(content))
        begun.set()
        assert go.wait(60)
        return refused(422, "no")

    worker.predict = predict  # type: ignore[method-assign]
    with serving(worker, Limits()) as (url, defects), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, url, "POST", "/api/predict", b"1")
        assert begun.wait(60)
        with connected(url) as gone:
            gone.sendall(head_of("predict", 2) + b"22")
            time.sleep(0.1)
        third = pool.submit(ask, url, "POST", "/api/predict", b"333")
        time.sleep(0.1)
        go.set()
        assert [first.result()[0], third.result()[0]] == [422, 422]
        assert (calls, defects) == ([1, 3], [])


def test_of_many_requests_nothing_is_left() -> None:
    """No file, no thread, no place; whether they were answered, refused, left or ended the process."""

    def several(last: bytes) -> None:
        assert ask(url, "POST", "/api/maps", b"one")[2] == b"one"
        assert ask(url, "POST", "/api/maps", b"one", {"Content-Type": "text/plain"})[0] == 415
        assert raw(url, b"GARBAGE\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        for sent in (b"", b"GET /", half_a_file(), head_of("predict", 10**6), head_of("maps", 3) + b"two"):
            with connected(url) as connection:
                connection.sendall(sent)
        ask(url, "POST", "/api/predict", last)

    def left() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    with Worker(work, compute_s=1) as worker, serving(worker, Limits(at_once=4, a_minute=10**6)) as (url, _):
        several(b"crash")
        several(b"crash")
        before = until(left, lambda found: ask(url, "POST", "/api/maps", b"one")[0] == 200)
        for _ in range(15):
            several(b"three")
        several(b"crash")
        assert ask(url, "POST", "/api/maps", b"one")[0] == 200
        until(left, lambda found: found[0] <= before[0] and found[1] <= before[1])
