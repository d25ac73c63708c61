"""A checkpoint of two ranks as training leaves it, written by hand: its values are known."""

import json

import torch
from safetensors.torch import load_file, save_file

from domainshuttle.platform.checkpoint.backend import describe
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.engine.initialization import blueprint
from domainshuttle.platform.engine.trained_parameters import select_trained
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.weights_origin import WeightsOrigin

NAME = "stage2-step00000003"
Tensors = dict[str, torch.Tensor]


def begun_with(run: Run) -> Tensors:
    return load_file(run.segment("stage1").weights / "diffusion_pytorch_model.safetensors")


def save_checkpoint(run: Run, kinds: tuple[str, ...] = ("master",), base: str | None = None) -> dict[str, Tensors]:
    """A checkpoint of stage2 of two ranks, written by hand; returns its values of each kind."""
    segment, store = run.segment("stage2"), CheckpointStore.of(run.config)
    outline = blueprint(run.config.model, WeightsOrigin(None, 0)).outline
    shapes = {n: tuple(outline.get_parameter(n).shape) for n in select_trained(outline, segment.stage.trained).trained}
    generator = torch.Generator().manual_seed(5)
    values = {kind: {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for kind in kinds}
    folder, files = store.place.local(NAME) / "zero", {}
    folder.mkdir(parents=True)
    header = {"layout": 1, "ranks": 2, "steps": 3, "kinds": sorted(kinds), "shapes": shapes}
    for rank in range(2):
        parts = {}
        for kind, tensors in values.items():
            for name, tensor in tensors.items():
                halves = torch.chunk(tensor.flatten(), 2)
                if rank < len(halves):
                    parts[f"{kind}/{name}"] = halves[rank].clone()
        path = folder / f"rank-{rank:05d}-of-00002.safetensors"
        save_file(parts, path, {"state": json.dumps(header)})
        files[f"zero/{path.name}"] = describe(path)
    identity = WeightsOrigin(segment.origin).identified(run.fingerprints).identity
    state = TrainingState(
        "stage2", 3, segment.seed, 2, run.config.digest(), {"seed": 1}, {}, {}, base or identity, origin=segment.origin
    )
    write_manifest(store.place, state, NAME, files)
    return values
