"""One image through the viewer's server against `Predictor.predict`: what the page and the API cost.

    python tests/benchmarks/bench_serve.py [--size 256] [--rounds 5] [--cpu] [--save NAME]

Random weights, one phantom of 1024 px, flip averaging. The server runs in this process, on loopback, and each request
has a connection of its own, as curl's has. In turn; the first round is dropped. `--cpu` measures the processor time of
this process, client and server, and of the worker, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import http.client
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

from bench_predict import make_predictor
from measuring import header, in_turn, publish, table

from ptxdist.phantoms.dataset import write_phantoms
from ptxdist.predict import server
from ptxdist.predict.gate import Limits
from ptxdist.predict.worker import Worker, answer_files


def work(connection: Connection, size_px: int, max_bytes: int) -> None:
    """The worker of this benchmark."""
    answer_files(connection, make_predictor(size_px), max_bytes)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--save", help="name of the files in tests/benchmarks/results, without date and ending")
    options = parser.parse_args()
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
