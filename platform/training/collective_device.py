"""Where tensors lie that all ranks reduce or gather: gloo works on the CPU, NCCL on each rank's GPU."""

import torch
import torch.distributed as dist


def collective_device() -> torch.device:
    """The device for the tensors of this rank's collectives."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
