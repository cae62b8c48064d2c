"""The connection to Ray: to a cluster that is running, or to a Ray on this machine that only this machine can reach.

Owns: addresses, the cluster's token, time-outs. Refuses: clusters that cannot be reached, and more workers than the
cluster has capacity for (ClusterError).

Ray on this machine listens on the loopback interface only and has no dashboard. The token of a cluster comes from the
environment or from Ray's own file and is never printed.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ptxdist import interrupts
from ptxdist.config import TrainSettings
from ptxdist.errors import ClusterError, reason

LOOPBACK = "127.0.0.1"
GIVE_TOKEN = "set RAY_AUTH_TOKEN to that of the cluster (`ray get-auth-token` on the head node prints it)"
_PATIENCE_S = 10.0


@contextmanager
def connection(address: str | None, *, cpus: int | None = None) -> Iterator[None]:
    """Connect to Ray until the block ends.

    `address` is that of a running cluster (`host:6379`, `ray://host:10001`, or `auto` for the cluster of this node).
    None starts Ray on this machine with `cpus` logical CPUs (default: its cores). Raises ClusterError when no cluster
    can be reached.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise ClusterError("this process is connected to Ray already; end that with ray.shutdown()")
    try:
        with interrupts.deferred():
            _connect(address, cpus)
        yield
    finally:
        with interrupts.deferred():
            if "ray" in sys.modules:
                with _signals_stay_ours():
                    sys.modules["ray"].shutdown()


@contextmanager
def ray_for_training(train: TrainSettings) -> Iterator[bool]:
    """Connect to Ray for Ray Train; yields whether each worker gets a GPU.

    The cluster is that of RAY_ADDRESS, which Ray sets in a job, else Ray on this machine. Raises ClusterError when its
    capacity can never be enough for the workers.
    """
    # Otherwise `report()` waits for the controller's two-second poll (docs/decisions.md).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    # All workers wait for one that is stopped or hangs; Ray's own time-out is ten minutes.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(train.worker_timeout_s))
    # After a fault Ray ends the process group in order, then the workers; one that hangs never answers, for 30 s.
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = on_cluster()
    # Nobody sends a notice before this machine is taken away, so no process has to look for one.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1" if address else "0"
    with connection(address, cpus=max(os.cpu_count() or 1, train.workers)):
        import ray

        capacity, fewest = ray.cluster_resources(), train.min_workers or train.workers
        gpus, cpus = int(capacity.get("GPU", 0)), int(capacity.get("CPU", 0))
        if train.device == "gpu" and gpus < fewest and not address:
            raise ClusterError(
                f"{need(fewest, 'GPU')}, and this machine has {gpus or 'none'}; "
                f"{f'use --workers {gpus} or' if gpus else 'use'} --set train.device=cpu"
            )
        use_gpu = train.device == "gpu" or (train.device == "auto" and gpus >= fewest)
        if cpus < fewest and address and not use_gpu:
            raise ClusterError(f"{need(fewest, 'CPU')}, and the cluster has {cpus}; use fewer --workers")
        yield use_gpu


def need(workers: int, what: str) -> str:
    """The start of a sentence about what so many workers need."""
    return f"the worker needs a {what}" if workers == 1 else f"{workers} workers need a {what} each"


def on_cluster() -> str | None:
    """The address of the cluster that this process has to use, which Ray sets in a job; None without a cluster."""
    return os.environ.get("RAY_ADDRESS") or None


def _connect(address: str | None, cpus: int | None) -> None:
    """Connect to Ray, or start it; as `connection`."""
    try:
        if address is None:
            with _signals_stay_ours():
                _start_local(cpus)
        else:
            _prepare_for(address)
            import ray

            with _signals_stay_ours():
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ConnectionError) as error:
        if "version mismatch" in str(error).lower():
            raise ClusterError(
                f"the cluster at {address} and this machine have different versions: {' '.join(str(error).split())}; "
                "install the same ones, or use `ptxdist submit`, which runs the command on the cluster"
            ) from error
        if address is None:
            raise ClusterError(f"Ray could not be started on this machine: {reason(error)}") from error
        raise ClusterError(
            f"no Ray cluster can be reached at {address}: {reason(error)}; if it requires a token, {GIVE_TOKEN}"
        ) from error


@contextmanager
def _signals_stay_ours() -> Iterator[None]:
    """Keep Ray from handling SIGTERM during the block, and processes that it starts from the signals to a command.

    Ray's own handlers end a driver with exit code 15, and the one of its C++ core, which `connect` installs, with 134
    and a stack trace. When the core ends, it puts the system's default in its place, which ends a driver without a
    word. When a terminal or a service manager sends a signal to all processes of the command, Ray's would end before
    it, which ends it without a word; so they are a process group of their own.
    """
    if not interrupts.installed():
        yield
        return
    from ray._private import utils, worker
    from ray._private.state import state

    set_handler, connect, bind = utils.set_sigterm_handler, worker.connect, utils.set_kill_on_parent_death_linux
    disconnect = state.disconnect  # what `shutdown` calls after the core has ended

    def connect_without_handler(*args: Any, **extra: Any) -> None:
        with interrupts.held():
            connect(*args, **extra)

    def disconnect_with_handlers() -> None:
        with interrupts.held():
            disconnect()

    def bind_apart() -> None:  # called by each process before it becomes one of Ray's
        os.setpgid(0, 0)
        bind()

    utils.set_sigterm_handler, worker.connect = lambda handler: None, connect_without_handler
    utils.set_kill_on_parent_death_linux, state.disconnect = bind_apart, disconnect_with_handlers
    try:
        yield
    finally:
        utils.set_sigterm_handler, worker.connect = set_handler, connect
        utils.set_kill_on_parent_death_linux, state.disconnect = bind, disconnect


def _start_local(cpus: int | None) -> None:
    """Start Ray on the loopback interface; by default its ports would be open to the whole network."""
    import ray
    from ray._private import ray_constants

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    # By default Ray's workers yield to every other program: on a busy machine a training took many times as long.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # On Linux, Ray replaces 127.0.0.1 by the machine's address unless clusters are switched off. A test checks the
    # ports, so a change in Ray is noticed.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        with _without_idle_processes():
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address=LOOPBACK,
            )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _without_idle_processes() -> Iterator[None]:
    """Let Ray start no processes that have nothing to do on one machine.

    They start nodes, send logs to the driver, and serve the dashboard, of which Ray starts a part whatever it is told.
    """
    from ray._private.node import Node

    names = ("start_monitor", "start_log_monitor", "start_api_server")
    before = {name: getattr(Node, name) for name in names if hasattr(Node, name)}  # another Ray may not have them
    for name in before:
        setattr(Node, name, lambda self, **words: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(Node, name, function)


def _prepare_for(address: str) -> None:
    """Check that something listens at the address, and set whether Ray sends its token; called before Ray is loaded."""
    place = address
    if address == "auto":
        with suppress(OSError):
            place = (Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster").read_text().strip()
    host, _, port = place.rpartition("://")[2].rpartition(":")
    reachable = bool(host) and port.isdecimal()
    if reachable:  # Ray would wait for minutes
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
    if "RAY_AUTH_MODE" not in os.environ and token():
        required = _requires_token(host, port) if reachable and "://" not in place else True
        os.environ["RAY_AUTH_MODE"] = "token" if required else "disabled"


def _requires_token(host: str, port: str) -> bool:
    """Whether a cluster rejects clients without a token.

    A cluster without tokens accepts a client's token but then cannot call the client, and all actors die at once.
    """
    import grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=_PATIENCE_S)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def token() -> str:
    """This machine's token, from where Ray reads it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; or ""."""
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(OSError):
        return path.read_text().strip()
    return ""
