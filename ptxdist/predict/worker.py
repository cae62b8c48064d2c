"""The process that predicts for the viewer's server.

A decoder cannot be stopped from outside, and a parser in Python holds the lock that the server needs to answer anybody.
Therefore files are predicted in a process of their own. It is killed when a file takes longer than `compute_s`, or dies
with a file that crashes a decoder; the next file gets a new process. Owns: that process, and what is sent to it and
back. torch is imported there only.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from ptxdist.dicom.frontal import refuse_other_than_chest
from ptxdist.dicom.guard import PassingError, place_of
from ptxdist.errors import DicomError, LabelError, PtxdistError, RunError, SettingsError, raise_limit
from ptxdist.executor import start_worker, starting

if TYPE_CHECKING:
    from ptxdist.predict.predictor import Predictor
    from ptxdist.train.device import Device

Wanted = Literal["answer", "maps", "seg"]  # JSON; with all that the page draws; DICOM SEG
_RECEIVE_S = 10.0  # for the process to receive a file; 160 MiB take a tenth of a second
_RELOADS = 3  # a model may take so many times as long to load as at the start


@dataclass(frozen=True)
class Reply:
    """The answer to a file: HTTP status, media type, body; `defect` is kind and place of an internal error, or ""."""

    status: int
    kind: str
    body: bytes
    defect: str = ""


@dataclass(frozen=True)
class About:
    """Names of the models, and the files of the page: media type and content by name."""

    names: tuple[str, ...]
    page: Mapping[str, tuple[str, bytes]]


def refused(status: int, sentence: str, defect: str = "") -> Reply:
    """A reply that says why there is no answer."""
    return Reply(status, "application/json", json.dumps({"error": sentence}).encode(), defect)


def predicting(connection: Connection, models: Sequence[Path], device: Device, at: str | None, max_bytes: int) -> None:
    """What the process does: load the models as `Predictor.load`, and answer files."""
    start_worker()
    if missing := [model for model in models if not model.exists()]:  # before torch is imported
        connection.send(RunError(f"no model at {missing[0]}: give a finished run or a bundle"))
        return
    from ptxdist.predict.predictor import Predictor

    try:
        predictor = Predictor.load(*models, device=device, at=at)
    except PtxdistError as error:
        connection.send(error)
        return
    answer_files(connection, predictor, max_bytes)


def answer_files(connection: Connection, predictor: Predictor, max_bytes: int) -> None:
    """Say that the models are loaded, and answer files until the process is killed."""
    from ptxdist.predict.viewer import page_files

    names = tuple(card.name for card in predictor.cards)
    connection.send(About(names, page_files(predictor, max_bytes)))
    while True:
        wanted = connection.recv()
        content = connection.recv_bytes()
        connection.send(None)  # it is received: from now on, an end of this process is the file's
        reply = reply_to(content, wanted, predictor)
        connection.send((reply.status, reply.kind, reply.defect))
        connection.send_bytes(reply.body)
        del content, reply  # hundreds of MB, which would be kept until the next file


def reply_to(content: bytes, wanted: Wanted, predictor: Predictor) -> Reply:
    """The reply to the bytes of a file: what is wanted of it, or a refusal for all but chest radiographs."""
    from ptxdist.predict.viewer import answer_of, segmentation_of, with_maps

    try:
        prediction = predictor.predict_content(content, name="image.png", check=refuse_other_than_chest)
        if wanted == "seg":
            return Reply(200, "application/dicom", segmentation_of(prediction, predictor))
        answer = answer_of(prediction, predictor)
        if wanted == "maps":
            return Reply(200, *with_maps(prediction, answer))
        return Reply(200, "application/json", answer.model_dump_json().encode())
    except PassingError as error:
        return refused(500, f"This file {error}.", str(error).partition("(")[2].partition(")")[0])
    except SettingsError as error:  # an extra is not installed
        return refused(501, f"{error}.")
    except Exception as error:
        try:
            raise_limit(error)
        except OSError as limit:
            return refused(503, f"The server has reached a limit: {limit.strerror}.", place_of(error))
        if isinstance(error, DicomError | LabelError):
            return refused(422, f"This file {error}.")
        words = "This file could not be predicted because of a defect in ptxdist."
        return refused(500, words, place_of(error))


class Worker:
    """The process, while the block `with Worker(…) as worker` runs; `work(connection, *args)` runs in it.

    Entering the block waits until the models are loaded, sets `about`, and raises what loading them raises there.
    `predict` is called by one thread at a time.
    """

    about: About

    def __init__(self, work: Callable[..., None], *args: object, compute_s: float) -> None:
        self._work, self._args, self._compute_s = work, args, compute_s
        self._loading_s, self._loaded, self._closed = 0.0, False, False

    def __enter__(self) -> Self:
        begin = time.monotonic()
        self._begin()
        try:
            self._wait(None)
        except BaseException:
            self.__exit__()
            raise
        self._loading_s = time.monotonic() - begin
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True  # a file in work gets a reply, and no other process is started
        self._process.kill()
        self._process.join()

    def predict(self, content: bytes | bytearray, wanted: Wanted) -> Reply:
        """The reply to the bytes of a file, at most `compute_s` seconds after the process has received it."""
        late = [False]
        try:
            for _ in range(2):
                if self._is_received(content, wanted):
                    break
                self._renew()
            else:
                words = "The process that predicts receives no files at present; try again in a minute."
                return refused(503, words, "" if self._closed else "the process that predicts received no file twice")
            with self._killed_after(self._compute_s, late):
                status, kind, defect = self._connection.recv()
                return Reply(status, kind, self._connection.recv_bytes(), defect)
        except PtxdistError as error:
            self._renew()
            return refused(503, "The models cannot be loaded at present; start the viewer anew.", type(error).__name__)
        except (EOFError, OSError):
            code = self._renew()
            if late[0]:
                return refused(422, f"This file was given up: it took more than {self._compute_s:g} s to compute.")
            defect = "" if self._closed else f"the process that predicts ended with code {code}"
            return refused(500, "This file ended the process that predicts; no other file is affected.", defect)

    def _is_received(self, content: bytes | bytearray, wanted: Wanted) -> bool:
        """Send a file; whether the process says that it has it. If not, it was killed or stopped, not by this file."""
        self._wait(self._compute_s + _RELOADS * self._loading_s)
        try:
            with self._killed_after(min(_RECEIVE_S, self._compute_s)):
                self._connection.send(wanted)
                self._connection.send_bytes(content)
                self._connection.recv()
        except (EOFError, OSError):
            return False
        return True

    @contextmanager
    def _killed_after(self, seconds: float | None, late: list[bool] | None = None) -> Iterator[None]:
        """Kill the process when the block takes longer, and set `late[0]`: a pipe to a stopped process has no limit."""
        process = self._process

        def kill() -> None:
            if late is not None:
                late[0] = True
            process.kill()

        timer = threading.Timer(seconds or 0, kill)
        timer.daemon = True
        if seconds is not None:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=self._work, args=(other, *self._args), daemon=True)
        with starting():
            self._process.start()
        other.close()
        self._loaded = False

    def _wait(self, timeout_s: float | None) -> None:
        """Wait for a process that is being started; raises what it failed with."""
        if self._loaded:
            return
        late = [False]
        try:
            with self._killed_after(timeout_s, late):
                found = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            if late[0]:
                raise RunError("loading the models took far longer than at the start") from None
            raise RunError(f"the process that loads the models ended with code {self._process.exitcode}") from None
        if isinstance(found, PtxdistError):
            raise found
        self.about, self._loaded = found, True

    def _renew(self) -> int | None:
        """Kill the process and start another one, without waiting for it; the exit code of the former one."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        code = self._process.exitcode
        if not self._closed:
            self._begin()
        return code
