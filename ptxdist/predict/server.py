"""The viewer's server: a page and an API that receive a DICOM or PNG file and answer with the prediction.

    GET  /                 the page, and the files it loads
    POST /api/predict      the bytes of a file -> `viewer.Answer` as JSON
    POST /api/maps         the same, with picture and levels for the page (multipart/form-data)
    POST /api/seg          the bytes of a DICOM file -> the mask as DICOM SEG

Owns: the routes, and the sockets that the server listens on. Refuses: requests that `gate` rejects, and files that are
not chest radiographs, each with a status and a sentence (JSON, `error`). Needs the extra `serve` (FastAPI, uvicorn).

A file is the body of its request and stays in memory; a form would be spooled to disk. Nothing is stored, and nothing
about a request is logged. Predictions are made one after the other in a process of their own (`worker`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptxdist.dicom.guard import place_of
from ptxdist.errors import AddressError
from ptxdist.predict.connection import Connection
from ptxdist.predict.gate import DEFAULT, HEADERS, Gate, Limits, read_body, refusal, sender_of
from ptxdist.predict.worker import Reply, Wanted, Worker

TYPES = ("application/dicom", "image/png", "application/octet-stream")  # no form of another page can send these
_SHUTDOWN_S = 10
_PART_BYTES = 2**20
_PLAIN = {  # instead of the words of HTTP
    404: "There is nothing at this address; the page is at /.",
    405: "This address does not take such requests; the page is at /, and files are sent with POST.",
}


def make_app(
    worker: Worker,
    *,
    names: frozenset[str] = frozenset(),
    limits: Limits = DEFAULT,
    on_defect: Callable[[str], None] = lambda where: None,
) -> ASGIApp:
    """The application. `worker` is running; `names` are the host names it answers to, beside localhost.

    `on_defect` is called with kind and place of an internal error, never with its message, which may contain values.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    gate, turn, known = Gate(limits), asyncio.Lock(), names | {"localhost"}
    pool = ThreadPoolExecutor(1, thread_name_prefix="ptxdist-serve")  # waits for the worker

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Response:
        is_plain = error.detail == HTTPStatus(error.status_code).phrase
        words = _PLAIN.get(error.status_code, error.detail) if is_plain else error.detail
        return JSONResponse({"error": words}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        on_defect(place_of(error))
        return JSONResponse({"error": "This request met a defect in ptxdist."}, 500)

    async def answer(request: Request, wanted: Wanted) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in TYPES:
            raise HTTPException(
                415, f"Send the bytes of one file as the body, with Content-Type: {TYPES[0]}, or {TYPES[1]}."
            )
        size = int(request.headers.get("content-length", 0))
        with ExitStack() as place:
            place.enter_context(gate.enter(sender_of(request.client.host if request.client else ""), size))
            content = await read_body(request, limits)
            async with turn:
                if await request.is_disconnected():
                    raise HTTPException(400, "The sender has gone.")
                reply = await asyncio.get_running_loop().run_in_executor(pool, worker.predict, content, wanted)
            if reply.defect:
                on_defect(reply.defect)
            return _Answer(reply, place.pop_all())

    @app.post("/api/predict")
    async def predict_file(request: Request) -> Response:
        return await answer(request, "answer")

    @app.post("/api/maps")
    async def predict_maps(request: Request) -> Response:
        return await answer(request, "maps")

    @app.post("/api/seg")
    async def predict_seg(request: Request) -> Response:
        return await answer(request, "seg")

    _add_page(app, worker.about.page)
    return _guarding(app, known)


class _Answer(Response):
    """A reply that is sent in parts, of which the connection holds one; `place` is left when all has been received."""

    def __init__(self, reply: Reply, place: ExitStack) -> None:
        super().__init__(reply.body, reply.status, media_type=reply.kind)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), _PART_BYTES):
                part = self.body[start : start + _PART_BYTES]
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body"})


def _guarding(app: ASGIApp, known: frozenset[str]) -> ASGIApp:
    """The application behind `refusal`; every answer gets the security headers."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = refusal(Request(scope), known)
        inner: ASGIApp = JSONResponse({"error": refused[1]}, refused[0]) if refused else app
        await inner(scope, receive, send_with_headers)

    return guard


def _add_page(app: FastAPI, files: Mapping[str, tuple[str, bytes]]) -> None:
    @app.get("/{name}")
    async def send(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, _PLAIN[404])
        kind, content = files[name]
        return Response(content, media_type=kind)

    @app.get("/")
    async def send_page() -> Response:
        return await send("")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, on a free port for port 0; AddressError when that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise AddressError(
            f"cannot listen on {host}, port {port}: {reason}; give another port with --port (0: any free one), "
            "or another address of this machine with --host"
        ) from error


def is_loopback(listening: socket.socket) -> bool:
    """Whether a socket can be reached from this machine only."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def url_of(listening: socket.socket) -> str:
    """URL of the page."""
    address = ipaddress.ip_address(listening.getsockname()[0])
    name = socket.gethostname() if address.is_unspecified else f"[{address}]" if address.version == 6 else str(address)
    return f"http://{name}:{listening.getsockname()[1]}/"


class _Server(uvicorn.Server):
    """A server whose event loop reports an error as a defect; asyncio itself would print a traceback."""

    def __init__(self, config: uvicorn.Config, on_defect: Callable[[str], None]) -> None:
        super().__init__(config)
        self._on_defect = on_defect

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            self._on_defect(place_of(error) if error else context["message"])

        asyncio.get_running_loop().set_exception_handler(report)
        await super().startup(sockets)


def make_server(
    app: ASGIApp, limits: Limits = DEFAULT, on_defect: Callable[[str], None] = lambda where: None
) -> uvicorn.Server:
    """A server without log output; run it on a socket of `listen`. `on_defect` as for `make_app`."""
    connection: Any = partial(Connection, limits=limits, peers={})
    config = uvicorn.Config(
        app, loop="asyncio", http=connection, ws="none", lifespan="off", access_log=False, log_config=None,
        log_level="critical", server_header=False, timeout_graceful_shutdown=_SHUTDOWN_S,
        backlog=limits.connections,  # as many are accepted at a time; more than a process may have files end in errors
    )  # fmt: skip
    return _Server(config, on_defect)


def serve(worker: Worker, listening: socket.socket, host: str, on_defect: Callable[[str], None]) -> None:
    """Serve the viewer until Ctrl-C; `worker` is running, `host` is the name that was given to `listen`."""
    names = frozenset() if is_loopback(listening) else frozenset({host.lower(), socket.gethostname().lower()})
    with suppress(KeyboardInterrupt):
        make_server(make_app(worker, names=names, on_defect=on_defect), on_defect=on_defect).run(sockets=[listening])
