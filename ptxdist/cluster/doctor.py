"""Checks before a run: every node is measured, and what nodes do together is tried on a small scale.

Owns: what counts as right, and the advice where something is wrong. Refuses: runs that are certain to fail
(`refuse_unfit`, ClusterError), which a training checks before it starts.
"""

from __future__ import annotations

import multiprocessing
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ptxdist.cluster import network, probe
from ptxdist.cluster.connection import LOOPBACK, connection
from ptxdist.cluster.nodes import THIS_MACHINE, Nodes, ThisMachine, ray_nodes
from ptxdist.errors import ClusterError, remedy
from ptxdist.executor import start_worker, starting

_GIB = 1024**3
_CHECKPOINT = 2 * _GIB  # three resumable checkpoints of 400 MB, the best weights, and a reserve
_SKEW_S = 5.0
_ANSWERS_NOT = "check it, or remove it"
_COLLECTIVE_S = 25.0  # a node that is cut off does not end its own clock of 20 s

State = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check: where, its state, what was found, and what to do about it ("" where it is ok)."""

    check: str
    where: str
    state: State
    found: str
    advice: str = ""


def diagnose(
    address: str | None, *, cache: Path | str | None = None, run: Path | str | None = None, full: bool = False
) -> list[Finding]:
    """Check every node of the cluster at `address` (as for `connection.connection`), or this machine with None.

    `cache` is opened on every node; with `full`, every byte of it is read. In `run`, or in the nearest folder above it
    that exists, the nodes write small files for each other, which are removed afterwards. Raises ClusterError when no
    cluster can be reached.
    """
    folder = None if run is None else _existing(run)
    if address is None:
        findings = _examine(ThisMachine(), cache, folder, full)
        if folder is not None:
            findings += _storage(ThisMachine(), folder)
        return findings + _collective_here()
    with connection(address), ray_nodes() as nodes:
        findings = _examine(nodes, cache, folder, full) + _clocks(nodes)
        if folder is not None:
            findings += _storage(nodes, folder)
        return findings + _collective(nodes)


def refuse_unfit(run: Path | str, cache: Path | str | None = None, nodes: Nodes | None = None) -> None:
    """Raise ClusterError when a training into `run` is certain to fail: the quick part of `diagnose`.

    With `nodes`, also when they do not share the storage or have other versions. A node that has just died is ignored,
    since the others train, or wait for a new node.
    """
    folder = _existing(run)
    findings = _storage(nodes or ThisMachine(), folder)
    if nodes:
        findings += [item for item in _examine(nodes, cache, folder, False) if item.check in ("versions", "cache")]
    free = None if isinstance(folder, str) else probe.free_bytes(str(folder))
    if free is not None and free < _CHECKPOINT // 4:
        findings.append(_disk("runs", THIS_MACHINE, free))
    gone = nodes.gone() if nodes else set[str]()
    for item in findings:
        if item.state == "wrong" and item.where not in gone:
            raise ClusterError(
                f"{item.check} of {item.where}: {item.found}; {item.advice} (`ptxdist doctor` runs all checks)"
            )


def _existing(folder: Path | str) -> Path | str:
    """The folder, or the nearest one above it that exists; an address as it is."""
    if isinstance(folder, str):
        return folder
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _examine(nodes: Nodes, cache: Path | str | None, folder: Path | str | None, full: bool) -> list[Finding]:
    mine = probe.examine(None, None)
    words = (
        str(cache.absolute()) if isinstance(cache, Path) else cache,
        str(folder) if isinstance(folder, Path) else None,
        full,
    )
    findings, digests = [], dict[str, str]()
    for where, found in nodes.ask(probe.examine, *words).items():
        if isinstance(found, ClusterError):
            findings.append(_judged("node", where, found, "", ""))
            continue
        findings += [_versions(where, found["versions"], mine["versions"]), _gpus(where, found["gpus"])]
        findings += [
            _amount("memory", where, found["memory"], 1, 4, "close other programs, or use a machine with more"),
            _amount("/dev/shm", where, found["shm"], 0.05, 1, "in a container: --shm-size=8g, or an emptyDir volume"),
            *(_disk(name, where, free) for name, free in found["disks"].items()),
        ]
        if "cache" in found:
            digests[where] = found["cache"]["digest"]
            findings.append(_cache(where, found["cache"], full))
    if len(set(digests.values()) - {""}) > 1:
        advice = "use a path on storage that all nodes share, or copy the same cache to all of them"
        findings.append(Finding("cache", "all nodes", "wrong", "nodes hold different caches at this path", advice))
    return findings


def _judged(check: str, where: str, wrong: object, fine: str, advice: str) -> Finding:
    """The result of a check that has found what is `wrong`, or with "" that all is `fine`."""
    text = str(wrong)
    if isinstance(wrong, ClusterError):
        text, advice = f"does not answer: {text}", _ANSWERS_NOT
    return Finding(check, where, "wrong" if text else "ok", text or fine, remedy(text, advice) if text else "")


def _versions(where: str, found: Mapping[str, str], mine: Mapping[str, str]) -> Finding:
    differing = [f"{name} {value}, locally {mine[name]}" for name, value in found.items() if value != mine[name]]
    text = ", ".join(f"{name} {value}" for name, value in found.items())
    advice = "install the same versions there, in the same checkout: pip install --constraint constraints.txt ."
    return _judged("versions", where, "; ".join(differing), text, advice)


def _gpus(where: str, found: Mapping[str, Any]) -> Finding:
    names = found["names"]
    text = f"{len(names)} {names[0]}, driver {found['driver']}" if names else "none"
    wrong = f"{text}; torch can use {found['torch']}" if found["torch"] < len(names) else ""
    advice = "install a torch for CUDA and this driver there, and check CUDA_VISIBLE_DEVICES"
    return _judged("GPU", where, wrong, text, advice)


def _amount(check: str, where: str, size: int | None, least: float, good: float, advice: str) -> Finding:
    """`least` and `good` in GiB."""
    if size is None:
        return Finding(check, where, "ok", "unknown on this system")
    state: State = "ok" if size >= good * _GIB else "warning" if size >= least * _GIB else "wrong"
    return Finding(check, where, state, f"{size / _GIB:,.1f} GiB free", "" if state == "ok" else advice)


def _disk(name: str, where: str, free: int | None) -> Finding:
    least = _CHECKPOINT / 4 / _GIB if name == "runs" else 0.5
    return _amount(f"disk of {name}", where, free, least, 5 * least, "free some space, or use another disk")


def _cache(where: str, found: Mapping[str, str], full: bool) -> Finding:
    missing = "use a cache that `ptxdist preprocess` wrote, on storage that this node can reach"
    advice = "run `ptxdist verify` on it" if found["digest"] else missing
    fine = "every byte verified" if full else "manifest and sizes verified"
    return _judged("cache", where, found["wrong"], fine, advice)


def _clocks(nodes: Nodes) -> list[Finding]:
    findings = []
    for where in nodes.actors:
        before = time.time()
        answer = nodes.ask_each(probe.clock, {where: ()})[where]
        after = time.time()
        if isinstance(answer, float):
            skew = max(0.0, before - answer, answer - after)  # what the time of the call does not explain
            text = f"{skew:.1f} s off"
            findings.append(_judged("clock", where, text * (skew >= _SKEW_S), text, "synchronise it with NTP"))
    return findings


def _storage(nodes: Nodes, folder: Path | str) -> list[Finding]:
    """Every node writes a file and reads those of all others; in an object store, it writes and reads an object."""
    if isinstance(folder, str):
        advice = "give this node credentials with write permission, and a network route to the store"
        answers = nodes.ask(probe.try_store, folder)
        return [_judged("storage", where, answer, "written and read", advice) for where, answer in answers.items()]
    draw = secrets.token_hex(8)
    tokens = {
        name: (f".ptxdist-doctor-{draw}-{number}", secrets.token_hex(8)) for number, name in enumerate(nodes.actors)
    }
    place = str(folder)
    advice = f"mount the same storage at {folder} on all nodes, writable for this user, or use another --run"
    try:
        written = nodes.ask_each(
            probe.write_token, {name: (place, file, text) for name, (file, text) in tokens.items()}
        )
        there = {file: text for name, (file, text) in tokens.items() if written[name] == ""}
        seen = nodes.ask(probe.read_tokens, place, there)
    finally:
        paths = [str(folder / file) for file, _ in tokens.values()]
        _remove(paths)
        nodes.ask(_remove, paths)
    fine = "written and read" if len(tokens) == 1 else f"written, and the files of {len(there)} nodes read"
    return [_judged("storage", where, written[where] or seen[where], fine, advice) for where in nodes.actors]


def _remove(paths: Sequence[str]) -> None:
    for path in paths:
        with suppress(OSError):
            Path(path).unlink(missing_ok=True)


def _collective(nodes: Nodes) -> list[Finding]:
    """An all-reduce over gloo among all nodes, and over NCCL among those with a GPU."""
    loaded = nodes.ask(network.load_torch)
    findings = _all_reduce(nodes, "gloo", [name for name, answer in loaded.items() if answer == ""])
    missing = {name: answer for name, answer in loaded.items() if answer}
    found = nodes.ask(probe.gpus)
    usable = [name for name, gpus in found.items() if isinstance(gpus, dict) and gpus["torch"]]
    return _sums("gloo", missing) + findings + _all_reduce(nodes, "NCCL", usable)


def _all_reduce(nodes: Nodes, backend: str, names: Sequence[str]) -> list[Finding]:
    if not names:
        return []
    host = nodes.ask_each(network.free_port, {names[0]: ()})[names[0]]
    if isinstance(host, ClusterError):
        return _sums(backend, {names[0]: host})
    words = {name: (backend.lower(), *host, rank, len(names)) for rank, name in enumerate(names)}
    return _sums(backend, nodes.ask_each(network.all_reduce, words, within_s=_COLLECTIVE_S))


def _collective_here() -> list[Finding]:
    """The same between two processes on this machine."""
    host, port = network.free_port(LOOPBACK)
    with starting():
        made = multiprocessing.get_context("spawn").Pool(2, start_worker)
    with made as pool:
        pool.starmap(network.load_torch, [(), ()], chunksize=1)
        answers = pool.starmap(network.all_reduce, [("gloo", host, port, rank, 2) for rank in range(2)], chunksize=1)
        findings = _sums("gloo", {THIS_MACHINE: next((text for text in answers if text), "")})
        if probe.gpus()["torch"]:
            host, port = network.free_port(LOOPBACK)
            findings += _sums("NCCL", {THIS_MACHINE: pool.apply(network.all_reduce, ("nccl", host, port, 0, 1))})
    return findings


def _sums(backend: str, answers: Mapping[str, Any]) -> list[Finding]:
    advice = (
        "let all nodes reach each other on all ports; where a node has several networks, "
        f"name the right one in {backend.upper()}_SOCKET_IFNAME"
    )
    return [
        _judged(f"all-reduce, {backend}", where, answer, "sum is right", advice) for where, answer in answers.items()
    ]
