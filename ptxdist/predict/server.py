"""The viewer's server: a page and an API that receive a DICOM file and answer with the prediction.

    GET  /                 the page, and the files it loads
    POST /api/predict      the bytes of a DICOM file -> `viewer.Answer` as JSON
    POST /api/maps         the same, with picture and levels for the page (multipart/form-data)

Owns: the routes, and the sockets that the server listens on. Refuses: requests that `gate` rejects, and files that are
not chest radiographs, each with a status and a sentence (JSON, `error`). Needs the extra `serve` (FastAPI, uvicorn).

A file is the body of its request and stays in memory; a form would be spooled to disk. Nothing is stored, and nothing
about a request is logged. Predictions are made one after the other in one thread.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import traceback
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException

from ptxdist.dicom.frontal import refuse_other_than_chest
from ptxdist.errors import AddressError, DicomError
from ptxdist.predict.gate import DEFAULT, HEADERS, Gate, Limits, read_body, refusal
from ptxdist.predict.predictor import Predictor
from ptxdist.predict.viewer import answer_of, page_files, with_maps

TYPES = ("application/dicom", "application/octet-stream")  # no form of another page can send these
_SHUTDOWN_S = 10


def make_app(
    predictor: Predictor,
    pool: ThreadPoolExecutor,
    *,
    names: frozenset[str] = frozenset(),
    limits: Limits = DEFAULT,
    on_defect: Callable[[str], None] = lambda where: None,
) -> FastAPI:
    """The application. `pool` has one thread; `names` are the host names it answers to, beside localhost.

    `on_defect` is called with kind and place of an internal error, never with its message, which may contain values.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gate, known = Gate(limits), names | {"localhost"}

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = refusal(request, known)
        response = JSONResponse({"error": refused[1]}, refused[0]) if refused else await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    def predict(content: bytes, maps: bool) -> Response:
        try:
            prediction = predictor.predict_content(content, check=refuse_other_than_chest)
            answer = answer_of(prediction, predictor.operating_point)
            if maps:
                kind, body = with_maps(prediction, answer)
                return Response(body, media_type=kind)
            return Response(answer.model_dump_json(), media_type="application/json")
        except DicomError as error:
            return JSONResponse({"error": f"This file {error}."}, 422)
        except Exception as error:
            on_defect(_place(error))
            return JSONResponse({"error": "This file could not be predicted because of a defect in ptxdist."}, 500)

    async def answer(request: Request, maps: bool) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() not in TYPES:
            raise HTTPException(415, f"Send the bytes of one DICOM file as the body, with Content-Type: {TYPES[0]}.")
        with gate.enter(request.client.host if request.client else ""):
            content = await read_body(request, limits)
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
            raise HTTPException(404, "There is nothing at this address; the page is at /.")
        kind, content = files[name]
        return Response(content, media_type=kind)

    @app.get("/")
    async def send_page() -> Response:
        return await send("")


def _place(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"


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


def make_server(app: FastAPI) -> uvicorn.Server:
    """A server without log output; run it on a socket of `listen`."""
    return uvicorn.Server(
        uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="off", access_log=False, log_config=None,
            log_level="critical", server_header=False, timeout_graceful_shutdown=_SHUTDOWN_S, limit_concurrency=64,
        )
    )  # fmt: skip


def serve(predictor: Predictor, listening: socket.socket, host: str, on_defect: Callable[[str], None]) -> None:
    """Serve the viewer until Ctrl-C; `host` is the name that was given to `listen`."""
    names = frozenset() if is_loopback(listening) else frozenset({host.lower(), socket.gethostname().lower()})
    with ThreadPoolExecutor(1, thread_name_prefix="ptxdist-serve") as pool, suppress(KeyboardInterrupt):
        make_server(make_app(predictor, pool, names=names, on_defect=on_defect)).run(sockets=[listening])
