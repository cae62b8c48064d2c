"""An S3 API server on loopback (moto's), and a proxy of ours before it that makes what networks and stores make.

moto cannot live in the interpreter that is tested, since botocore wants an older python-dateutil than constraints.txt
has: `make test` gives it a virtual environment of its own. Without it, and without `moto_server` on the path, tests
that need it are skipped.
"""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BUCKET = "bucket"
KEY, SECRET = "AKIATESTPTXDIST", "never-to-be-shown-secret"


@contextmanager
def running_server() -> Iterator[int]:
    """Port of an S3 server that holds one bucket, until the block ends."""
    own = Path(__file__).resolve().parents[1] / ".venv-s3" / "bin" / "moto_server"
    command = str(own) if own.is_file() else shutil.which("moto_server")
    if command is None:
        pytest.skip("no S3 server: `make .venv-s3/.installed` makes one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [command, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while True:
            with suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("PUT", f"/{BUCKET}")
                assert connection.getresponse().status == 200
                break
            assert server.poll() is None, "the S3 server ended"
            assert time.monotonic() < end, "the S3 server does not answer"
            time.sleep(0.01)
        yield port
    finally:
        server.terminate()
        server.wait()


class Proxy:
    """Passes requests on and remembers them; `fail` says which of the next ones shall go wrong, and how.

    "500" and "503" are answered instead; "cut" breaks off in the middle of the answer's body, "cut upload" in the
    middle of the request's; "lost" does what is asked and never says so; "hang" says nothing at all; "flip" alters a
    byte of the answer's body; "slow" sends it in pieces.
    """

    def __init__(self, port: int) -> None:
        self._port, self._lock = port, threading.Lock()
        self._plans: list[list[object]] = []
        self.requests: list[tuple[str, str]] = []
        self.ended = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: object) -> None:
                pass

            def handle_one_request(self) -> None:
                with suppress(OSError):
                    super().handle_one_request()
                self.close_connection = True

            def _pass(self) -> None:
                proxy._pass(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def fail(self, kind: str, count: int = 1, *, method: str = "", name: str = "") -> None:
        """Let the next `count` requests of a method whose path holds `name` go wrong."""
        with self._lock:
            self._plans.append([kind, count, method, name])

    def heal(self) -> None:
        with self._lock:
            self._plans.clear()

    def written(self) -> list[str]:
        """Paths of all PUT requests since the last `requests.clear()`."""
        return [path.partition("?")[0] for method, path in self.requests if method == "PUT"]

    def stop(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _fault(self, method: str, path: str) -> str:
        with self._lock:
            self.requests.append((method, path))
            for plan in self._plans:
                kind, count, of, name = plan
                if count and of in ("", method) and str(name) in path:
                    plan[1] = int(str(count)) - 1
                    return str(kind)
        return ""

    def _pass(self, client: BaseHTTPRequestHandler) -> None:
        fault, length = self._fault(client.command, client.path), int(client.headers.get("Content-Length") or 0)
        if fault == "hang":
            self.ended.wait(60)
            return
        if fault == "cut upload":
            client.rfile.read(length // 2)
            return
        body = client.rfile.read(length)
        if fault.isdigit():
            text = b"<Error><Code>InternalError</Code><Message>" + KEY.encode() + b"</Message></Error>"
            client.send_response(int(fault))
            client.send_header("Content-Length", str(len(text)))
            client.end_headers()
            client.wfile.write(text)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.request(client.command, client.path, body, dict(client.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lost":
            return
        client.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                client.send_header(name, value)
        length = len(content) if client.command != "HEAD" else int(answer.getheader("Content-Length") or 0)
        client.send_header("Content-Length", str(length))
        client.send_header("Connection", "close")
        client.end_headers()
        if fault == "flip" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "slow":
            for start in range(0, len(content), max(1, len(content) // 5)):
                client.wfile.write(content[start : start + max(1, len(content) // 5)])
                time.sleep(0.1)
            return
        client.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
