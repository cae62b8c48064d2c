"""The viewer's server: a page and an API that take one DICOM file and answer with what the model sees.

    GET  /                 the page, and the files that it loads
    POST /api/predict      the bytes of a DICOM file -> `viewer.Answer` as JSON
    POST /api/maps         the same, and picture and levels for the page (multipart/form-data)

Owns: who may ask, how much and how often. Refuses: pages of other origins, unknown host names, files that are too
large, too many at a time, and what is no chest radiograph, each with a status and a sentence (JSON, `error`). Called
by: `cli`. Needs the extra `serve` (FastAPI, uvicorn).

A file is the body of its request and stays in memory: forms would be spooled to disk. Nothing is stored, and nothing
about a request is logged. Predictions are made one after the other in one thread.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from ptxdist.dicom.frontal import refuse_other_than_chest
from ptxdist.dicom.tags import MAX_INFLATED
from ptxdist.errors import AddressError, DicomError
from ptxdist.predict.predictor import Predictor
from ptxdist.predict.viewer import answer_of, page_files, with_maps

TYPES = ("application/dicom", "application/octet-stream")  # no form of another page can send these
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
_SHUTDOWN_S = 10


@dataclass(frozen=True)
class Limits:
    """What one request, all of them at a time, and one address may ask for."""

    max_bytes: int = MAX_INFLATED
    upload_s: float = 60
    at_once: int = 4
    a_minute: int = 60


def make_app(
    predictor: Predictor,
    pool: ThreadPoolExecutor,
    *,
    names: frozenset[str] = frozenset(),
    limits: Limits = Limits(),
    on_defect: Callable[[str], None] = lambda where: None,
) -> FastAPI:
    """The application. `pool` has one thread; `names` are host names it may be called by, beside localhost.

    `on_defect` hears the kind and the place of an error that is ptxdist's, never its message, which may hold values.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gate, known = _Gate(limits), names | {"localhost"}

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        refusal = _refusal(request, known)
        response = JSONResponse({"error": refusal[1]}, refusal[0]) if refusal else await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    def predict(content: bytes, maps: bool) -> Response:
        try:
            refuse_other_than_chest(content)
            prediction = predictor.predict_content(content)
            answer = answer_of(prediction, predictor.operating_point)
            if maps:
                kind, body = with_maps(prediction, answer)
                return Response(body, media_type=kind)
            return Response(answer.model_dump_json(), media_type="application/json")
        except DicomError as error:
            return JSONResponse({"error": f"This file {error}."}, 422)
        except Exception as error:
            on_defect(_place(error))
            return JSONResponse({"error": "This file could not be predicted because of a defect of ptxdist."}, 500)

    async def answer(request: Request, maps: bool) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() not in TYPES:
            raise HTTPException(415, f"Send the bytes of one DICOM file as the body, with Content-Type: {TYPES[0]}.")
        with gate.enter(request.client.host if request.client else ""):
            content = await _read_body(request, limits)
            return await asyncio.get_running_loop().run_in_executor(pool, predict, content, maps)

    @app.post("/api/predict")
    async def predict_file(request: Request) -> Response:
        return await answer(request, maps=False)

    @app.post("/api/maps")
    async def predict_maps(request: Request) -> Response:
        return await answer(request, maps=True)

    _add_page(app, page_files(predictor, limits.max_bytes))
    return app


def _add_page(app: FastAPI, files: Mapping[str, tuple[str, bytes]]) -> None:
    @app.get("/{name}")
    async def send(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "There is nothing here; the page is at /.")
        kind, content = files[name]
        return Response(content, media_type=kind)

    @app.get("/")
    async def send_page() -> Response:
        return await send("")


class _Gate:
    """Lets requests in: so many at a time in all, so many a minute from one address."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._inside = limits, 0
        self._times: dict[str, deque[float]] = {}

    @contextmanager
    def enter(self, address: str) -> Iterator[None]:
        """Hold a place while a request is worked on; HTTPException 429 or 503 when there is none."""
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
            words = f"{self._inside} files are being worked on, and no more can wait; try again in a few seconds."
            raise HTTPException(503, words, {"Retry-After": "5"})
        self._times.setdefault(address, times).append(now)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request, never more of it in memory than is allowed; HTTPException 400, 408 or 413."""
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


def _refusal(request: Request, known: frozenset[str]) -> tuple[int, str] | None:
    """Status and sentence for a request that another page may have made, by DNS rebinding or across origins."""
    host = request.headers.get("host", "")
    if not _is_known(host, known):
        return 421, "This server is not known by that host name; use its address, or start it with --host NAME."
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
    foreign = origin is not None and urlsplit(origin).netloc != host
    if request.method not in ("GET", "HEAD") and (foreign or site not in ("same-origin", "none")):
        return 403, "Only the viewer's own page may send files here."
    return None


def _is_known(host: str, known: frozenset[str]) -> bool:
    # An address cannot be rebound: only a name leads from another page's origin to here.
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in known


def _place(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, on a free port for port 0; AddressError when that cannot be."""
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
    """Whether nobody but this machine reaches a socket."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def url_of(listening: socket.socket) -> str:
    """Where the page is."""
    address = ipaddress.ip_address(listening.getsockname()[0])
    name = socket.gethostname() if address.is_unspecified else f"[{address}]" if address.version == 6 else str(address)
    return f"http://{name}:{listening.getsockname()[1]}/"


def make_server(app: FastAPI) -> uvicorn.Server:
    """A server that says nothing, for anybody who runs it on a socket of `listen`."""
    return uvicorn.Server(
        uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="off", access_log=False, log_config=None,
            log_level="critical", server_header=False, timeout_graceful_shutdown=_SHUTDOWN_S, limit_concurrency=64,
        )
    )  # fmt: skip


def serve(predictor: Predictor, listening: socket.socket, host: str, on_defect: Callable[[str], None]) -> None:
    """Serve the viewer until the keyboard interrupts; `host` is the name that it was asked to listen on."""
    names = frozenset() if is_loopback(listening) else frozenset({host.lower(), socket.gethostname().lower()})
    with ThreadPoolExecutor(1, thread_name_prefix="ptxdist-serve") as pool, suppress(KeyboardInterrupt):
        make_server(make_app(predictor, pool, names=names, on_defect=on_defect)).run(sockets=[listening])
