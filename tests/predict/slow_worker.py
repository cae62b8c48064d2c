"""A worker of the viewer that imports nothing large: what it does with a file is written in the file."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

from ptxdist.errors import RunError
from ptxdist.predict.worker import About


def work(connection: Connection, broken: str = "") -> None:
    """`sleep` and `crash` do so; other content is sent back. `broken` fails at the start, `deaf` receives no file."""
    if broken == "error":
        connection.send(RunError("no model at nowhere"))
        return
    if broken == "crash":
        os._exit(7)
    connection.send(About(("none",), {}))
    if broken == "deaf":
        time.sleep(60)
    while True:
        connection.recv()
        content = connection.recv_bytes()
        connection.send(None)
        if content == b"sleep":
            time.sleep(60)
        if content == b"crash":
            os._exit(9)
        connection.send((200, "text/plain", ""))
        connection.send_bytes(content)
