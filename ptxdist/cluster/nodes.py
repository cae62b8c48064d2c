"""Calling functions on every node of a Ray cluster, or on this machine alone, for `doctor`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ptxdist.cluster import network, probe
from ptxdist.cluster.failures import brief
from ptxdist.errors import ClusterError

THIS_MACHINE = "this machine"
_ANSWER_S = 120.0  # time-out of a call


class Nodes:
    """The nodes of a cluster by name, each with an actor that calls functions there."""

    def __init__(self, actors: Mapping[str, Any], ids: Mapping[str, str] | None = None) -> None:
        self.actors, self._ids = actors, ids or {}

    def ask(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Call `function` on all nodes at the same time; results by name, a ClusterError for a node that is lost."""
        return self.ask_each(function, dict.fromkeys(self.actors, arguments))

    def ask_each(
        self, function: Callable[..., Any], arguments: Mapping[str, Sequence[Any]], *, within_s: float = _ANSWER_S
    ) -> dict[str, Any]:
        """As `ask`, on the nodes named, each with its own arguments and so many seconds to answer."""
        import ray

        calls = {name: self.actors[name].call.remote(function, *words) for name, words in arguments.items()}
        end, answers = time.monotonic() + within_s, dict[str, Any]()
        for name, call in calls.items():
            try:
                answers[name] = ray.get(call, timeout=max(0.1, end - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                answers[name] = ClusterError(f"no answer within {within_s:.0f} s")
            except ray.exceptions.RayError as error:
                answers[name] = ClusterError(brief(error))
        return answers

    def gone(self) -> set[str]:
        """Names of the nodes that Ray has found dead by now, which takes it some seconds."""
        import ray

        living = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if self._ids else set()
        return {name for name, node_id in self._ids.items() if node_id not in living}


class ThisMachine(Nodes):
    """This machine as the only node; functions are called in this process."""

    def __init__(self) -> None:
        super().__init__({THIS_MACHINE: None})

    def ask_each(
        self, function: Callable[..., Any], arguments: Mapping[str, Sequence[Any]], *, within_s: float = _ANSWER_S
    ) -> dict[str, Any]:
        """As for the nodes of a cluster, without a limit; exceptions pass unchanged."""
        return {name: function(*words) for name, words in arguments.items()}


@contextmanager
def ray_nodes() -> Iterator[Nodes]:
    """The nodes of the cluster that this process is connected to, with one actor on each until the block ends."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Node:
        def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments)

    for module in (probe, network):
        ray.cloudpickle.register_pickle_by_value(module)  # a node without ptxdist can run it, too
    actor = ray.remote(num_cpus=0, max_restarts=0)(Node)
    actors, ids, seen = {}, dict[str, str](), dict[str, int]()
    for node in ray.nodes():
        if node["Alive"]:
            name = str(node["NodeManagerAddress"])
            seen[name] = seen.get(name, 0) + 1  # several nodes on one machine
            name = name if seen[name] == 1 else f"{name} ({seen[name]})"
            ids[name] = node["NodeID"]
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            actors[name] = actor.options(scheduling_strategy=there).remote()
    try:
        yield Nodes(actors, ids)
    finally:
        for module in (probe, network):
            ray.cloudpickle.unregister_pickle_by_value(module)
        for one in actors.values():
            ray.kill(one)
