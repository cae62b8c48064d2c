"""The viewer's real server on a free port of this machine, with a network of random weights."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import torch

from ptxdist import Predictor
from ptxdist.cache.render import TRANSFORM
from ptxdist.predict import server
from ptxdist.predict.bundle import ModelCard
from ptxdist.predict.gate import DEFAULT, Limits
from ptxdist.predict.viewer import page_files
from ptxdist.predict.worker import About, Reply, Wanted, Worker, reply_to
from ptxdist.records import EvaluationResult, OperatingPoint
from ptxdist.resolve import load_settings
from ptxdist.train.unet import build_unet

DICOM = {"Content-Type": "application/dicom"}


def make_predictor(point: OperatingPoint, size_px: int = 64) -> Predictor:
    """A predictor of an untrained network, always the same; its card has what predicting reads."""
    torch.manual_seed(3)
    small = ["model.encoder=small", "model.decoder_channels=[32, 16, 16, 8, 8]"]
    pipeline = load_settings("smoke", assignments=small).pipeline
    card = ModelCard.model_construct(
        name="<b>untrained</b>", size_px=size_px, preprocessing=TRANSFORM, precision="fp32", flip_averaging=True,
        operating_point=point, operating_point_from="", pipeline=pipeline, fingerprint="", weights_sha256="0" * 64,
        evaluation=EvaluationResult.model_construct(),
    )  # fmt: skip
    return Predictor([card], [build_unet(pipeline.model)], torch.device("cpu"))


class Here(Worker):
    """Answers as the worker does, in this process, so that no process has to import torch for a test."""

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.about = About(("untrained",), page_files(predictor, limits.max_bytes))
        self._predictor = predictor

    def predict(self, content: bytes, wanted: Wanted) -> Reply:
        return reply_to(content, wanted, self._predictor)


@contextmanager
def serving(predictor: Predictor | Worker, limits: Limits = DEFAULT) -> Iterator[tuple[str, list[str]]]:
    """The URL of a server that ends with the block, and the defects that it reported."""
    defects: list[str] = []
    worker = predictor if isinstance(predictor, Worker) else Here(predictor, limits)
    with server.listen("127.0.0.1", 0) as listening:
        running = server.make_server(
            server.make_app(worker, limits=limits, on_defect=defects.append), limits, defects.append
        )
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        try:
            yield server.url_of(listening), defects
        finally:
            running.should_exit = True
            thread.join()


def ask(
    url: str, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = DICOM
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def parts_of(headers: http.client.HTTPMessage, content: bytes) -> dict[str, bytes]:
    """The parts of a multipart answer by name."""
    boundary = headers["content-type"].partition("boundary=")[2].encode()
    first, *parts, last = content.split(b"--" + boundary)
    assert (first, last) == (b"", b"--\r\n")
    found = {}
    for part in parts:
        head, _, body = part.partition(b"\r\n\r\n")
        found[head.partition(b'name="')[2].partition(b'"')[0].decode()] = body.removesuffix(b"\r\n")
    return found


def error_of(answer: tuple[int, http.client.HTTPMessage, bytes]) -> tuple[int, str]:
    """Status and sentence of a refusal, which is JSON with nothing else in it."""
    status, _, content = answer
    plain: dict[str, Any] = json.loads(content)
    assert list(plain) == ["error"]
    return status, plain["error"]


def connected(url: str, buffer: int | None = None) -> socket.socket:
    """A connection; `buffer` bytes of an answer that are not read are received, None for as many as usual."""
    connection, parts = socket.socket(), urlsplit(url)
    connection.settimeout(60)
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect((parts.hostname or "", parts.port or 0))
    return connection


def raw(url: str, sent: bytes) -> bytes:
    """What a server answers to these bytes, until it closes the connection."""
    with connected(url) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def head_of(name: str, size: int) -> bytes:
    """The head of a request with a file of so many bytes."""
    head = f"POST /api/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/dicom\r\nContent-Length: {size}"
    return f"{head}\r\n\r\n".encode()


def half_a_file() -> bytes:
    """A request of which two thirds of the file are missing."""
    return head_of("predict", 900) + bytes(300)


def rest(connection: socket.socket, answer: bytes) -> bytes:
    """An answer that is one JSON object, of which a part has been received."""
    while b"}" not in answer:
        part = connection.recv(4096)
        assert part, answer
        answer += part
    return answer


def until(call: Callable[[], tuple], good: Callable[[tuple], bool]) -> tuple:  # type: ignore[type-arg]
    """The first good result; AssertionError after a minute."""
    end = time.monotonic() + 60
    while not good(found := call()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found
