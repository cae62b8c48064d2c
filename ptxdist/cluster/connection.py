"""The way to Ray: a cluster that runs already, or one of our own on this machine that nobody else can reach.

Owns: addresses, the cluster's token, how long is waited. Refuses: clusters that cannot be reached and more workers than
there is room for (ClusterError). Called by: `run.pipeline`, `executor`, `doctor`.

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

from ptxdist.config import TrainSettings
from ptxdist.errors import ClusterError

LOOPBACK = "127.0.0.1"
_PATIENCE_S = 10.0


@contextmanager
def connection(address: str | None, *, cpus: int | None = None) -> Iterator[None]:
    """Ray, connected, until the block ends.

    `address` is that of a running cluster (`host:6379`, `ray://host:10001`, or `auto` for the one this node is in);
    None starts one on this machine with `cpus` logical CPUs (default: its cores). Raises ClusterError when there is no
    cluster to be reached.
    """
    try:
        if address is None:
            _start_here(cpus)
        else:
            _prepare_for(address)
            import ray

            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ConnectionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "version mismatch" in str(error).lower():
            words = " ".join(str(error).split())
            raise ClusterError(
                f"the cluster at {address} and this machine differ: {words}; install the same versions, or use "
                "`ptxdist submit`, which runs the command there"
            ) from error
        if address is None:
            raise ClusterError(f"Ray could not be started on this machine: {reason}") from error
        raise ClusterError(
            f"no Ray cluster can be reached at {address}: {reason}; if it asks for a token, set "
            "RAY_AUTH_TOKEN to the cluster's own (`ray get-auth-token` prints it on the head node)"
        ) from error
    import ray

    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def ray_for_training(train: TrainSettings) -> Iterator[bool]:
    """Ray for Ray Train: the cluster of RAY_ADDRESS (a job has it set), else one here; yields if workers get a GPU.

    Raises ClusterError when there can never be room for the workers.
    """
    # Without this `report()` waits for the controller's two-second poll (see performance notes in ARCHITECTURE.md).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    # A worker that is stopped or hangs holds up all others; Ray's own patience is ten minutes.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(train.worker_timeout_s))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = on_cluster()
    with connection(address, cpus=max(os.cpu_count() or 1, train.workers)):
        import ray

        room, fewest = ray.cluster_resources(), train.min_workers or train.workers
        gpus, cpus = int(room.get("GPU", 0)), int(room.get("CPU", 0))
        if train.device == "gpu" and gpus < fewest and not address:
            raise ClusterError(
                f"{fewest} workers need a GPU each, and there are {gpus}; use fewer --workers or --set train.device=cpu"
            )
        use_gpu = train.device == "gpu" or (train.device == "auto" and gpus >= fewest)
        if cpus < fewest and address and not use_gpu:
            raise ClusterError(f"{fewest} workers need a CPU each, and the cluster has {cpus}; use fewer --workers")
        yield use_gpu


def on_cluster() -> str | None:
    """The address of the cluster that this process shall use, which Ray itself sets in a job; None for none."""
    return os.environ.get("RAY_ADDRESS") or None


def _start_here(cpus: int | None) -> None:
    """Ray on this machine, on the loopback interface; by default its ports would be open to the whole network."""
    import ray
    from ray._private import ray_constants

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    # Ray turns 127.0.0.1 into the machine's address on Linux, unless it believes there can be no cluster. A test looks
    # at the ports, so that a Ray that has changed here is noticed.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
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


def _prepare_for(address: str) -> None:
    """Look whether anything listens there, and have Ray send the token if it is wanted; before Ray is loaded."""
    place = address
    if address == "auto":
        with suppress(OSError):
            place = (Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster").read_text().strip()
    host, _, port = place.rpartition("://")[2].rpartition(":")
    reachable = bool(host) and port.isdecimal()
    if reachable:  # Ray itself would wait for minutes
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        wanted = _wants_token(host, port) if reachable and "://" not in place else True
        os.environ["RAY_AUTH_MODE"] = "token" if wanted else "disabled"


def _wants_token(host: str, port: str) -> bool:
    """Whether a cluster refuses who has no token.

    One that wants none takes a client's token, but cannot call it back, and all its actors die at once.
    """
    import grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=_PATIENCE_S)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _has_token() -> bool:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN", "").strip()) or path.is_file()
