"""Waiting for nodes and for workers: what a training says meanwhile, and when it gives up.

Ray Train waits without a word and without a limit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptxdist.cluster.failures import LostError
from ptxdist.config import TrainSettings
from ptxdist.errors import ClusterError

_QUIET_S = 2.0  # without a word from the workers, before the cluster is looked at; between two looks
_SAY_EVERY_S = 30.0
_LIMIT_S = 600.0
_SILENT_S = 60.0  # that workers may be silent before it is said
_STARTS, _SAY_FROM = 10, 3  # processes that may end as they start, since the workers were last heard


@dataclass(frozen=True)
class Room:
    """Workers that the cluster has room for now, and would have if nothing else ran on it."""

    free: int
    total: int


@dataclass(eq=False)
class Waiting:
    """Looks at the cluster while nothing is heard from the workers; `look` is called some times a second.

    `say` receives what is waited for, at once and every half minute. After `train.capacity_timeout_s` the actor
    `controller`, Ray Train's, is killed, which ends its trainer; then `refuse` raises the reason. So it is when workers
    have room and their processes end as they start, which Ray tries again without a limit: on a full disk, for example.
    Workers that are silent for `silence_s` are lost: each tells of its work, and the others wait for one that hangs.
    """

    train: TrainSettings
    use_gpu: bool
    say: Callable[[str], None]
    silence_s: float | None = None
    controller: Any = None
    _heard: float = 0.0
    _looked: float = 0.0
    _said: float = 0.0
    _began: float | None = None
    _limit_s: float | None = None
    _reason: Exception | None = None
    _silent: float | None = None  # since when the workers have had a place and were not heard
    _ended: frozenset[str] | None = None  # processes that had ended when the workers were last heard
    _told: float = 0.0

    def look(self, heard: bool) -> None:
        """Note whether the workers were `heard` since the last call; if not for some seconds, look at the cluster."""
        now = time.monotonic()
        if heard:
            self._heard, self._began, self._silent, self._ended = now, None, None, None
        if now - self._heard < _QUIET_S or now - self._looked < _QUIET_S or self._reason:
            return
        if now - self._looked > _SILENT_S:  # this process was stopped, as with Ctrl-Z, and perhaps the workers too
            self._silent = None
        self._looked = now
        placed = has_place()
        self._compare(now, None if placed else room(self.use_gpu))
        self._listen(now, placed)
        self._count_starts(now, ended_processes())

    def refuse(self) -> None:
        """If this has given up, raise ClusterError, or LostError when a restart may help."""
        if self._reason:
            raise self._reason

    def _compare(self, now: float, found: Room | None) -> None:
        needed = self.train.min_workers or self.train.workers
        if found is None or found.free >= needed:
            self._began = None
            return
        if self._began is None:
            self._began, self._said = now, 0.0
            self._limit_s = self.train.capacity_timeout_s or (None if autoscales() else _LIMIT_S)
        waited, limit = now - self._began, self._limit_s
        if not waited:  # a trainer that ends has just given its resources back
            return
        have = f"{found.free} of {needed} workers {'has' if found.free == 1 else 'have'} room"
        missing = found.total < needed
        fewer = ""
        if missing and found.total and needed > 1:
            fewer = f"; `--set train.min_workers={found.total}` goes on with fewer"
        if limit is not None and waited >= limit:
            end = "no node came" if missing else "neither other work ended nor a silent node answered"
            again = "start Ray again on nodes that were cut off" if missing else "rerun the command later"
            text = f"{have}, and {end} within {limit:.0f} s (train.capacity_timeout_s); {again}{fewer}"
            self._give_up(ClusterError(text))
        elif not self._said or now - self._said >= _SAY_EVERY_S:
            self._said = now
            busy = "other work on the cluster, or a node that does not answer"
            what = "a node; one that was cut off has to start Ray again" if missing else busy
            until = f"{waited:.0f} s of {limit:.0f} s" if limit is not None else f"{waited:.0f} s, without limit"
            self.say(f"{have}; waiting for {what} ({until}){fewer}")

    def _listen(self, now: float, placed: bool) -> None:
        if not placed or self._silent is None:
            self._silent = now if placed else None
            return
        silent, limit = now - self._silent, self.silence_s
        if limit is not None and not self._heard:
            limit = max(limit, _LIMIT_S)  # a start may take minutes
        if limit is not None and silent >= limit:
            self._give_up(LostError(f"the workers were silent for {silent:.0f} s"))
        elif silent >= _SILENT_S and now - self._said >= _SAY_EVERY_S:
            self._said = now
            until = f" of {limit:.0f} s, twice train.collective_timeout_s, after which new ones start" if limit else ""
            self.say(f"the workers have been silent for {silent:.0f} s{until}; does a disk or a file system hang?")

    def _count_starts(self, now: float, ended: dict[str, str]) -> None:
        if self._ended is None:
            self._ended, self._told = frozenset(ended), 0.0
        hosts = [host for name, host in ended.items() if name not in self._ended]
        said = (
            f"{len(hosts)} of {_STARTS} times a worker's process ended as it started, on "
            f"{' and '.join(sorted(set(hosts)))}; is the disk or the memory there full? Ray's logs there say more"
        )
        if len(hosts) >= _STARTS:
            self._give_up(ClusterError(said))
        elif len(hosts) >= _SAY_FROM and (not self._told or now - self._told >= _SAY_EVERY_S):
            self._told = now
            self.say(said)

    def _give_up(self, reason: Exception) -> None:
        self._reason = reason
        if self.controller is not None:
            import ray

            ray.kill(self.controller)


def has_place() -> bool:
    """Whether a trainer of this job has its resources."""
    return any(entry["state"] == "CREATED" for entry in placement_groups().values())


def placement_groups() -> dict[str, dict[str, Any]]:
    """The placement groups of this job, by their ids; trainers have one each."""
    import ray
    from ray.util.placement_group import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # with which their ids end
    return {name: entry for name, entry in placement_group_table().items() if name.endswith(job)}


def ended_processes() -> dict[str, str]:
    """The address of each worker of this job whose process has ended by itself on a living node, by the worker's id."""
    import ray
    from ray._private.state import actors

    job = ray.get_runtime_context().get_job_id()
    return {
        name: str(entry["Address"]["IPAddress"])
        for name, entry in actors().items()
        if (entry["JobID"], entry["ActorClassName"], entry["State"]) == (job, "RayTrainWorker", "DEAD")
        and "WORKER_DIED" in str(entry["DeathCause"])
    }


def room(use_gpu: bool) -> Room:
    """The room for workers, which need a CPU each and maybe a GPU."""
    import ray
    from ray._private.state import available_resources_per_node

    kinds = ("CPU", "GPU") if use_gpu else ("CPU",)

    def count(resources: dict[str, float]) -> int:
        return int(min(resources.get(kind, 0) for kind in kinds))

    free, nodes = available_resources_per_node(), [node for node in ray.nodes() if node["Alive"]]
    return Room(
        free=sum(count(free.get(node["NodeID"], {})) for node in nodes),
        total=sum(count(node["Resources"]) for node in nodes),
    )


def autoscales() -> bool:
    """Whether something starts nodes for this cluster when they are needed: `ray up`, or KubeRay's autoscaler."""
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    gcs = global_worker.gcs_client
    if is_autoscaler_v2(fetch_from_server=True, gcs_client=gcs):
        return True
    return has_node_types(gcs.internal_kv_get(b"__autoscaling_status", None))


def has_node_types(status: bytes | None) -> bool:
    """Whether the status that Ray's monitor writes is that of an autoscaler; without one each node is its own type."""
    report = json.loads(status or b"{}").get("autoscaler_report") or {}
    types: dict[str, str] = report.get("node_type_mapping") or {}
    return any(kind != f"node_{node}" for node, kind in types.items())
