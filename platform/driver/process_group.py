"""The ranks' process group of torch, set up by Ray Train with no torch in the driver and in Ray Train's controller.

Ray's `TorchConfig` imports torch wherever it is unpickled: seconds of each start, before a worker exists.
"""

import os
import socket
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig


class _Backend(Backend):
    share_cuda_visible_devices = True
    """A rank sees the devices of all ranks of its node, which NCCL's copies between them need."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Joins the ranks. Ray Train calls it in its controller once all workers are there."""
        address, ranks = worker_group.execute_single(0, _free_address), range(len(worker_group))
        ray.get([worker_group.execute_single_async(rank, _join, address, backend_config) for rank in ranks])


@dataclass
class ProcessGroup(BackendConfig):
    """`backend` is nccl or gloo, `timeout_seconds` that of a collective."""

    backend: str
    timeout_seconds: int

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend


def _free_address() -> tuple[str, int]:
    """Where the others find rank 0: its node's address, and a port that is free there."""
    host = ray.util.get_node_ip_address()
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)) as free:
        free.bind(("", 0))
        return host, free.getsockname()[1]


def _join(address: tuple[str, int], group: ProcessGroup) -> None:
    # here, on a worker
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    context, device = ray.train.get_context(), get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host, port = address
    # torchrun's variables, by which DeepSpeed finds a rank's device
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    dist.init_process_group(group.backend, timeout=timedelta(seconds=group.timeout_seconds))
