"""One image through the viewer's server against `Predictor.predict`: what the page and the API cost.

    python tests/benchmarks/bench_serve.py [--size 256] [--rounds 5] [--cpu] [--requests 300] [--save NAME]

Random weights, one phantom of 1024 px, flip averaging. The server runs in this process, on loopback, and each request
has a connection of its own, as curl's has. In turn; the first round is dropped. `--cpu` measures the processor time of
this process, client and server, and of the worker, for a machine that others use too. With `--requests` something else
is measured: what the server, in a process of its own, and its worker keep after so many requests of all kinds, the
last of which are eight files of the largest size at once.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
from measuring import header, in_turn, publish, table

from ptxdist.phantoms.dataset import draw_file, write_phantoms
from ptxdist.predict import server
from ptxdist.predict.gate import Limits
from ptxdist.predict.worker import Worker, answer_files

STATUS = ("VmRSS", "VmHWM", "Threads")


def work(connection: Connection, size_px: int, max_bytes: int) -> None:
    """The worker of this benchmark."""
    from bench_predict import make_predictor  # late: the server itself does not import torch

    answer_files(connection, make_predictor(size_px), max_bytes)


def serve_apart(connection: Connection, size_px: int) -> None:
    """The server alone in a process; sends its port and the id of its worker."""
    limits = Limits(a_minute=10**6, at_once_each=8)
    with (
        server.listen("127.0.0.1", 0) as listening,
        Worker(work, size_px, limits.max_bytes, compute_s=limits.compute_s) as worker,
    ):
        connection.send((listening.getsockname()[1], worker._process.pid))
        with suppress(KeyboardInterrupt):
            server.make_server(server.make_app(worker, limits=limits), limits).run(sockets=[listening])


def kept(pid: int) -> dict[str, int]:
    """Memory (MiB), now and at most, open files and threads of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines) if name in STATUS}
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"MiB": found["VmRSS"] // 1024, "peak": found["VmHWM"] // 1024, "files": files, "threads": found["Threads"]}


def send(port: int, name: str, content: bytes, sent: int | None = None, read: int = 0) -> int:
    """The status of the answer; 0 if only `sent` bytes of the file are sent, or `read` of the answer are read."""
    head = f"POST /api/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/dicom\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[:sent])
        if sent is not None or read:
            connection.recv(read) if read else None
            return 0
        answer = b"".join(iter(lambda: connection.recv(2**20), b""))
        return int(answer.split(b" ", 2)[1])


def measure_kept(size_px: int, requests: int, save: str | None) -> None:
    """What is kept after 20, 100 and all requests: answered, refused, given up while they are sent or answered."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve_apart, args=(there, size_px))
    process.start()
    port, worker = here.recv()
    random = np.random.default_rng(0)
    small = draw_file(0)
    noise = random.integers(0, 256, (3000, 2500), dtype=np.uint8)
    large = cv2.imencode(".png", cv2.GaussianBlur(noise, (31, 31), 0))[1].tobytes()
    ways = (
        lambda: send(port, "maps", small),
        lambda: send(port, "predict", small),
        lambda: send(port, "maps", large),
        lambda: send(port, "seg", small),
        lambda: send(port, "predict", random.bytes(2_000_000)),
        lambda: send(port, "predict", small[:-1000]),
        lambda: send(port, "maps", large, sent=1_000_000),
        lambda: send(port, "maps", large, read=1000),
    )
    rows: dict[str, dict[str, int]] = {}
    answers: Counter[int] = Counter()
    for number in range(1, requests + 1):
        answers[ways[number % len(ways)]()] += 1
        if number in (20, 100, requests):
            rows |= {f"server, after {number}": kept(process.pid or 0), f"worker, after {number}": kept(worker)}
    with ThreadPoolExecutor(8) as pool:
        answers.update(pool.map(lambda _: send(port, "predict", bytes(Limits.max_bytes)), range(8)))
    rows |= {"server, after eight of 160 MiB": kept(process.pid or 0), "worker, after eight of 160 MiB": kept(worker)}
    os.kill(process.pid or 0, signal.SIGINT)
    process.join()
    lines = ["| after requests | MiB | MiB at most | open files | threads |", "|---|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(map(str, row.values())) + " |" for name, row in rows.items()]
    statuses = ", ".join(f"{count} times {status or 'given up'}" for status, count in sorted(answers.items()))
    about = header("What the viewer's server keeps", ("torch", "fastapi", "uvicorn"), size_px=size_px, answers=statuses)
    publish({**about, "kept": rows}, "\n".join(lines), save)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--save", help="name of the files in tests/benchmarks/results, without date and ending")
    parser.add_argument("--requests", type=int, help="measure what is kept after so many requests instead")
    options = parser.parse_args()
    if options.requests:
        measure_kept(options.size, options.requests, options.save)
        return
    from bench_predict import make_predictor

    predictor = make_predictor(options.size)
    limits = Limits(a_minute=10**6)
    with (
        tempfile.TemporaryDirectory() as folder,
        server.listen("127.0.0.1", 0) as listening,
        Worker(work, options.size, limits.max_bytes, compute_s=limits.compute_s) as worker,
    ):
        write_phantoms(Path(folder), cases=1, seed=0)
        path = next(Path(folder).rglob("*.dcm"))
        content = path.read_bytes()
        running = server.make_server(server.make_app(worker, limits=limits), limits)
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()

        def post(name: str) -> None:
            connection = http.client.HTTPConnection(urlsplit(server.url_of(listening)).netloc)
            connection.request("POST", name, content, {"Content-Type": "application/dicom"})
            response = connection.getresponse()
            body = response.read()
            connection.close()
            if response.status != 200:
                raise SystemExit(f"{name}: {response.status} {body[:200]!r}")

        ways: dict[str, Callable[[], object]] = {
            "Predictor.predict": lambda: predictor.predict(path),
            "POST /api/predict": lambda: post("/api/predict"),
            "POST /api/maps": lambda: post("/api/maps"),
        }

        def processor_s() -> float:
            fields = Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()
            return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        clock = processor_s if options.cpu else time.perf_counter

        def timed(call: Callable[[], object]) -> float:
            started = clock()
            call()
            return 1000 * (clock() - started)

        rows = in_turn({name: partial(timed, call) for name, call in ways.items()}, options.rounds)
        running.should_exit = True
        thread.join()
    about = header(
        "One image through the viewer's server", ("torch", "fastapi", "uvicorn"), size_px=options.size,
        rounds=options.rounds, clock="CPU" if options.cpu else "wall",
    )  # fmt: skip
    publish({**about, "ms": rows}, table("ms an image", rows, digits=1), options.save)


if __name__ == "__main__":
    main()
