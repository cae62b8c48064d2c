"""How the workers of a cluster meet for torch.distributed: their addresses, interfaces and process group.

Training (`backend`) and `doctor` use the same functions. Only the standard library is imported at the start, since
`doctor` sends this module to nodes that may have nothing else installed.
"""

from __future__ import annotations

import array
import ipaddress
import os
import socket
import struct
import sys
import threading
from datetime import timedelta
from typing import Any

_ADDRESSES = 0x8912  # SIOCGIFCONF of Linux
_ENTRY = "16s4x4s16x"  # its entries: a name, and a socket address of IPv4
_COLLECTIVE_S = 20.0


def own_address() -> str:
    """The address of this machine in its Ray cluster; without Ray 127.0.0.1."""
    try:
        from ray.util import get_node_ip_address
    except ImportError:
        return "127.0.0.1"
    return str(get_node_ip_address())


def free_port(address: str | None = None) -> tuple[str, int]:
    """An address of this machine, by default that in its cluster, and a port that is free there."""
    address = address or own_address()
    with socket.socket(_family(address)) as found:
        found.bind((address, 0))
        return address, int(found.getsockname()[1])


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this address; None if none has it or that cannot be found out."""
    if _family(address) == socket.AF_INET6:
        try:
            with open("/proc/net/if_inet6") as lines:
                rows = [line.split() for line in lines]
        except OSError:
            return None
        wanted = ipaddress.ip_address(address.partition("%")[0]).packed.hex()
        return next((row[-1] for row in rows if row[0] == wanted), None)
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    buffer = array.array("B", bytes(struct.calcsize(_ENTRY) * 256))
    place, length = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        answer = fcntl.ioctl(one, _ADDRESSES, struct.pack("iL", length, place))
    used = struct.unpack("iL", answer)[0]
    for name, found in struct.iter_unpack(_ENTRY, buffer.tobytes()[:used]):
        if socket.inet_ntoa(found) == address:
            return str(name.rstrip(b"\0").decode().partition(":")[0])  # without the label of a further address
    return None


def choose_interface(address: str) -> None:
    """Let gloo and NCCL use the interface that has this address of this machine, unless the user has named one.

    By default gloo takes the interface to which the host name resolves, often the loopback one, and NCCL the first one
    that is up. NCCL finds its way by itself inside one machine, so it is not told the loopback interface.
    """
    if (name := interface_of(address)) is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly this one; without = it is a prefix


def join(backend: str, host: str, port: int, rank: int, ranks: int, timeout_s: float) -> None:
    """Join the process group of torch.distributed whose rank 0 has the address `host`; all ranks call it at once.

    The store of rank 0 listens on that address only; left alone, torch listens on all of them. Collectives of the group
    end after `timeout_s`. Raises RuntimeError or OSError when the ranks do not meet within it.
    """
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    listening = None
    if rank == 0:
        with socket.socket(_family(host)) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind((host, port))
            own.listen(4096)
            listening = own.detach()  # the store closes it
    more: dict[str, Any] = {"timeout": limit, "wait_for_workers": False, "master_listen_fd": listening}
    store = dist.TCPStore(host, port, ranks, rank == 0, **more)  # type: ignore[attr-defined]  # of torch's C++ part
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)


def load_torch() -> str:
    """Import torch, which may take long and must not count as a slow network; returns "" or what failed."""
    try:
        import torch.distributed
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    return "" if torch.distributed.is_available() else "this torch has no torch.distributed"


def all_reduce(backend: str, host: str, port: int, rank: int, ranks: int) -> str:
    """Sum one number per rank over torch.distributed; returns "" or what failed, after 20 s at the latest.

    All ranks call it at the same time, in a process that has loaded torch (`load_torch`) and is not needed any more.
    """
    answers: list[str] = []
    words = (backend, host, port, rank, ranks)
    thread = threading.Thread(target=lambda: answers.append(_all_reduce(*words)), daemon=True)
    thread.start()
    thread.join(_COLLECTIVE_S)  # not all waits inside torch heed the time-out of the group
    return answers[0] if answers else f"no sum within {_COLLECTIVE_S:.0f} s"


def _all_reduce(backend: str, host: str, port: int, rank: int, ranks: int) -> str:
    try:
        import torch
        import torch.distributed as dist

        choose_interface(host if ipaddress.ip_address(host).is_loopback else own_address())
        join(backend, host, port, rank, ranks, 0.7 * _COLLECTIVE_S)
        try:
            total = torch.full((1024,), float(rank + 1), device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(total)
            wanted = ranks * (ranks + 1) / 2
            return "" if bool((total == wanted).all()) else f"sum is {float(total[0])}, not {wanted}"
        finally:
            dist.destroy_process_group()
    except Exception as error:  # of torch, a backend or the network: it is the result of the check
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
