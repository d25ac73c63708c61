"""The ranks' process group of torch, set up by Ray Train with no torch in the driver and in Ray Train's controller.

Ray's `TorchConfig` imports torch wherever it is unpickled: seconds of each start, before a worker exists.
"""

import os
import socket
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.backend import Backend, BackendConfig
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group


class _Backend(Backend):
    share_cuda_visible_devices = True
    """A rank sees the devices of all ranks of its node, which NCCL's copies between them need."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Joins the ranks. Ray Train calls it in its controller once all workers are there."""
        assert isinstance(backend_config, ProcessGroup)
        ranks = range(len(worker_group))
        Path(backend_config.room).write_text(_room(worker_group).id.hex())
        address = worker_group.execute_single(0, _free_address)
        ray.get([worker_group.execute_single_async(rank, _join, address, backend_config) for rank in ranks])


def _room(worker_group: Any) -> PlacementGroup:
    """What Ray reserved for the workers: each of them knows, also where another has just died."""
    for rank in range(len(worker_group)):
        try:
            room: PlacementGroup = worker_group.execute_single(rank, get_current_placement_group)
            return room
        except RayActorError:
            if rank == len(worker_group) - 1:
                raise
    raise AssertionError


def free_room(room: Path) -> None:
    """Gives back what Ray reserved for workers that have ended; nothing where it is not known, or given back already.

    Ray Train does so itself, but not where its controller failed after it had made the workers and before they began:
    the room would stay taken as long as the driver lives.
    """
    if room.exists() and ray.is_initialized():
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(room.read_text()))))
        room.unlink()


@dataclass
class ProcessGroup(BackendConfig):
    """`backend` is nccl or gloo, `timeout_seconds` that of a collective, `room` the file, on the driver's machine, that
    gets the id of what Ray reserved for the workers (`free_room`)."""

    backend: str
    timeout_seconds: int
    room: str

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
