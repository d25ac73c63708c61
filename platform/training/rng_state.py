"""The global random states of a rank, kept in a checkpoint.

Nothing of ours draws from them: noise, timesteps, pairing and dropout of conditions are functions of seed, sample and
step. A library's layer might (a dropout of a model of one's own), and such a run must resume to the same bits too.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from domainshuttle.model.file_mode import save_tensors


def random_snapshot(rank: int) -> Callable[[Path], None]:
    """Copies torch's states of this rank, on the CPU and on its GPU; the result writes them into a checkpoint."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()

    def write(folder: Path) -> None:
        path = _path(folder, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(states, path)

    return write


def restore_random(folder: Path, rank: int) -> bool:
    """Sets the states that this rank had; False where the checkpoint has none for it (another world size)."""
    path = _path(folder, rank)
    if not path.exists():
        return False
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    return True


def _path(folder: Path, rank: int) -> Path:
    return folder / "random" / f"rank-{rank:05d}.safetensors"
