"""What is done when workers fail, and what is said: Ray's errors in the words and settings of ptxdist.

Ray's own texts name its environment variables, which a training sets itself; RUN/ray.log keeps them.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
from collections.abc import Sequence

from ptxdist.errors import PtxdistError, TrainingError, lost_rank, remedy

_log = logging.getLogger(__name__)
_VARIABLE = re.compile(r"\bRAY_\w+")
_PLACE = re.compile(r"\b(?:node_ip=|ip: )['\"]?([\w.:%]+)")
_SENTENCE = re.compile(r"(?<=[.;])\s+")


class LostError(Exception):
    """Workers died, hung or were cut off, which a restart may repair; `preempted` if their node was."""

    def __init__(self, message: str, *, preempted: bool = False) -> None:
        super().__init__(message)
        self.preempted = preempted


def cause_of(error: BaseException) -> BaseException:
    """The exception that user code raised, or the loss of its process, without Ray's wrappers."""
    inner = getattr(error, "cause", None) or getattr(error, "health_check_failure", None)
    return cause_of(inner) if isinstance(inner, BaseException) and inner is not error else error


def verdict(causes: Sequence[BaseException], what: str) -> Exception:
    """The exception to raise when workers have failed: LostError, after which they are restarted, or a final one.

    A PtxdistError is final. So is an exception of Python code (a missing key, no memory on the GPU), which would occur
    again, unless a process was lost too: ranks that are cut off from another one fail in many ways. Errors of
    torch.distributed and of CUDA are RuntimeErrors, those of networks and storage OSErrors; both may be transient. A
    full disk is not.
    """
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError

    refusals = [cause for cause in causes if isinstance(cause, PtxdistError)]
    if refusals:
        return refusals[0]
    lost = [cause for cause in causes if isinstance(cause, (RayError, RayTrainError))]
    transient = [
        cause
        for cause in causes
        if (isinstance(cause, RuntimeError) and not _is_gpu_memory(cause))
        or (isinstance(cause, OSError) and cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
    ]
    if lost or len(transient) == len(causes):
        preempted = any(getattr(cause, "preempted", False) for cause in lost)
        return LostError(loss_of((lost or transient)[0]), preempted=preempted)
    cause = next(cause for cause in causes if cause not in transient)
    advice = f"; {found}" if (found := remedy(cause)) else ""
    if _is_gpu_memory(cause):
        advice = '; use a smaller train.micro_batch, or, with dice = "batch", more workers or a smaller batch_size'
    return TrainingError(f"{what} stopped: a worker failed with {brief(cause)}{advice}")


def _is_gpu_memory(cause: BaseException) -> bool:
    """Whether a GPU has no memory left; torch, whose error it is, is loaded then and need not be for others."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(cause, torch.OutOfMemoryError)


def loss_of(error: BaseException, who: str = "a worker") -> str:
    """How a worker, or another process, was lost, and on which node if that is known."""
    from ray import exceptions
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    text, place = str(error), place_of(error)
    where = f" on {place}" if place else ""
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return f"{who}{where} did not answer within train.worker_timeout_s"
    if isinstance(error, exceptions.OutOfMemoryError) or "running low on memory" in text:
        return f"{who}{where} was ended because its node ran out of memory; use fewer workers a node, or larger nodes"
    if isinstance(error, exceptions.NodeDiedError) or "node has died" in text or "node was terminated" in text:
        return f"{who}{where} was lost with its node, which died or was cut off"
    if isinstance(error, (exceptions.ActorDiedError, exceptions.WorkerCrashedError)):
        return f"{who}{where} died"
    if isinstance(error, exceptions.ActorUnavailableError):
        return f"{who}{where} cannot be reached"
    return lost_rank(error, who) or f"{who} failed with {brief(error)}"


def place_of(error: BaseException) -> str:
    """The address of the node on which a process was lost; "" if it is not known."""
    if found := _PLACE.search(str(error)):
        return found[1]
    import ray
    from ray._private.state import actors

    actor = getattr(error, "actor_id", None)
    if actor is None or not ray.is_initialized():
        return ""
    try:
        return str(actors(actor_id=actor)["Address"]["IPAddress"])
    except Exception:  # Ray forgets actors in time; when its head is gone, it ends this process within a minute
        _log.exception("where %s was cannot be found out", actor)
        return ""


def brief(error: BaseException) -> str:
    """The kind of an error and the last line of its text, at most 300 characters, without Ray's variables."""
    lines = [
        " ".join(part for part in _SENTENCE.split(line.strip()) if not _VARIABLE.search(part))
        for line in str(error).splitlines()
    ]
    last = next((line for line in reversed(lines) if line), "")
    return f"{type(error).__name__}: {last[:300]}" if last else type(error).__name__
