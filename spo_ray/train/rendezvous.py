"""The meeting point of a training's workers, which listens on the node's own address only.

PyTorch's store has no credential, and by default listens on all interfaces: whoever reaches it could write to it. Here
rank 0 opens the socket itself: on the loopback interface if all workers are on one node, else on the address by which
Ray knows the node. The sockets of Gloo and NCCL follow.
"""

import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

LOOPBACK = "127.0.0.1"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables of the interface of collectives."""
_socket: socket.socket | None = None
"""Listening socket of rank 0 until the store takes it."""


@dataclass
class BoundTorchConfig(TorchConfig):
    """Ray Train's configuration of PyTorch, with a store that is bound to one address."""

    @property
    def backend_cls(self) -> type["BoundBackend"]:
        """Class that sets up the process group."""
        return BoundBackend


class BoundBackend(_TorchBackend):
    """Sets up the process group of the workers; runs in Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Let rank 0 listen, and all ranks join."""
        one_node = len(set(worker_group.execute(ray.util.get_node_ip_address))) == 1
        address, port = worker_group.execute_single(0, listen, one_node)
        worker_group.execute(_set_torch_distributed_env_vars)
        size, settings = len(worker_group), (backend_config.backend, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(i, join, i, size, address, port, *settings) for i in range(size)])


def listen(one_node: bool) -> tuple[str, int]:
    """Open rank 0's socket; return its address and port."""
    global _socket
    address = LOOPBACK if one_node else ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _socket = socket.create_server((address, 0), family=family)
    return address, _socket.getsockname()[1]


def join(rank: int, size: int, address: str, port: int, backend: str, timeout_s: float) -> None:
    """Join the process group in a worker's process."""
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if address == LOOPBACK and sys.platform == "linux":
        for name in INTERFACES:
            os.environ.setdefault(name, "lo")
    limit = timedelta(seconds=timeout_s)
    taken: dict[str, Any] = {"master_listen_fd": _socket.detach()} if _socket is not None else {}
    store = dist.TCPStore(address, port, size, rank == 0, limit, wait_for_workers=False, multi_tenant=True, **taken)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
