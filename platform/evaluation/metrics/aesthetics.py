"""AES: how pleasing frames look, by the predictor of LAION on CLIP's image embedding, as OpenS2V-Eval has it.

A frame's L2-normalised embedding of `openai/clip-vit-large-patch14` [768] goes through five linear layers without
activations between them (768-1024-128-64-16-1). The raw score of a video is the mean over its frames, about 1 to 10;
the value is (raw - 4) / 3, cut to 0..1. VBench's AES is another head, all frames, divided by 10: not comparable.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from domainshuttle.pipelines.curation.embedder import Embedder
from domainshuttle.pipelines.errors import DataError
from domainshuttle.platform.evaluation.metrics.choices import AestheticChoices
from domainshuttle.platform.evaluation.metrics.metric import Direction, Metric, Needs, Score, Trial, Work

WIDTHS = (768, 1024, 128, 64, 16, 1)
_LAYERS = (0, 2, 4, 6, 7)
"""Where the linear layers stand in the released head, whose others are dropouts."""


class Aesthetics(Metric[AestheticChoices]):
    """The normalised mean; the raw one stands beside it."""

    name = "aes"
    title = "AES"
    source = "OpenS2V-Eval 1.1; improved-aesthetic-predictor"
    code_version = 1
    uses = ("aesthetic_clip", "aesthetic_head")
    expects: ClassVar[Mapping[Trial, Direction]] = {
        "blurred": "falls", "noisy": "falls", "shuffled": "same", "recompressed": "same",
    }  # fmt: skip

    def needs(self) -> Needs:
        return Needs(gpus=0.1)

    def check(self) -> None:
        super().check()
        read_head(self.model_folder("aesthetic_head"))

    def measure(self, work: Work) -> Score:
        folder, file = map(self.model_folder, self.uses)
        device = self.models.device
        clip = self.models.once(("clip", folder, "crop"), lambda: Embedder(folder, "clip", device, "crop"))
        head = self.models.once(("aesthetic_head", file), lambda: read_head(file).to(device))
        vectors = work.once(
            ("clip", folder, "crop", self.config.frames), lambda: clip.vectors(work.frames(self.config.frames))
        )
        with torch.inference_mode():
            raw = head(torch.from_numpy(vectors).to(device))[:, 0].cpu().numpy()
        mean, config = float(raw.mean()), self.config
        value = (np.clip(mean, config.low, config.high) - config.low) / (config.high - config.low)
        return Score("measured", float(value), beside={"raw": mean}, details={"frames": raw.tolist()})


def read_head(path: str) -> nn.Sequential:
    """The head, from safetensors or a file of `torch.save` that is read without running anything of it.

    Raises DataError for a file that is not one.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"models.aesthetic_head = {path}: there is no such file; download it: "
            "hf download BestWishYsh/OpenS2V-Weight aesthetic-model.pth --local-dir FOLDER"
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors: dict[str, Tensor] = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        layers = [nn.Linear(*sides) for sides in pairwise(WIDTHS)]
        for layer, number in zip(layers, _LAYERS, strict=True):
            layer.load_state_dict({name: tensors[f"layers.{number}.{name}"].float() for name in ("weight", "bias")})
    except Exception as error:  # of torch, pickle and safetensors, each with types of its own
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"models.aesthetic_head = {path} is not AES's head, five linear layers 768-1024-128-64-16-1 "
            f"({type(error).__name__}: {text}); download it again"
        ) from error
    return nn.Sequential(*layers).eval().requires_grad_(False)
