"""GMEScore: does the video show what the prompt says? Cosine of GME's vectors of the prompt and of each frame.

GME (Alibaba-NLP/gme-Qwen2-VL-7B-Instruct) is a Qwen2-VL whose last hidden state at the last token, of length 1, is the
vector. Its own code refuses the transformers that is used here; what it does is few lines, and those are here:
frames of multiples of 28 pixels, its texts, and positions that count on through a picture's tokens, since its code
never asks Qwen2-VL for positions in two dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from domainshuttle.model.pictures import Pixels
from domainshuttle.pipelines.curation.model_folders import check_model_folder, load_model
from domainshuttle.platform.evaluation.metrics.choices import TextMatchChoices
from domainshuttle.platform.evaluation.metrics.metric import Direction, Metric, Needs, Score, Trial, Work

_UNIT = 28
"""Pixels of the side of a picture's token."""
_LEAST_PIXELS, _MOST_PIXELS = 4 * _UNIT**2, 16384 * _UNIT**2
"""Of the first of two resizings that GME's code does, before the processor's own."""


class TextMatch(Metric[TextMatchChoices]):
    """The mean over frames."""

    name = "gme"
    title = "GMEScore"
    source = "OpenS2V-Eval 1.1 (Alibaba-NLP/gme-Qwen2-VL-7B-Instruct)"
    code_version = 1
    uses = ("gme",)
    expects: ClassVar[Mapping[Trial, Direction]] = {
        "other_prompt": "falls", "shuffled": "same", "recompressed": "same",
    }  # fmt: skip

    def needs(self) -> Needs:
        return Needs(gpus=0.5)

    def measure(self, work: Work) -> Score:
        if not work.case.prompt.strip():
            return Score("missing", reason="the case has no prompt")
        folder, device, choices = self.model_folder("gme"), self.models.device, self.config
        key = ("gme", folder, *choices.model_dump().values())
        gme = self.models.once(key, lambda: Gme(folder, choices, device))
        text = self.models.once((*key, work.case.prompt), lambda: gme.text(work.case.prompt))
        frames = work.once(key, lambda: gme.pictures(work.frames(choices.frames)))
        values = frames.astype(np.float64) @ text.astype(np.float64)
        return Score("measured", float(values.mean()), details={"frames": values.tolist()})


class Gme:
    """GME from a local folder, without code of the folder."""

    def __init__(self, folder: str, choices: TextMatchChoices, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        path = check_model_folder(folder, "gme")
        size = {"shortest_edge": choices.least_tokens * _UNIT**2, "longest_edge": choices.most_tokens * _UNIT**2}
        self.processor: Any = Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True, size=size)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model: Any = load_model(folder, "gme", device, choices.dtype)
        self.model, self.device, self.choices = model.model, device, choices
        self.picture_token = int(model.config.image_token_id)

    def text(self, prompt: str) -> NDArray[np.float32]:
        """The vector [d] of a prompt that asks for a picture."""
        ids = self._tokens(self.choices.instruction, prompt)
        return self._vectors(torch.tensor([ids]), {})[0]

    def pictures(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        """The vectors [n,d] of pictures [h,w,3] of one size."""
        found = [
            self._pictures(pictures[start : start + self.choices.at_once])
            for start in range(0, len(pictures), self.choices.at_once)
        ]
        return np.concatenate(found)

    def _pictures(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        resized = [_resized(picture) for picture in pictures]
        inputs = self.processor(images=resized, return_tensors="pt")
        grid: Tensor = inputs["image_grid_thw"]
        tokens = int(grid[0].prod()) // self.processor.merge_size**2
        ids = self._tokens(self.choices.system, f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>")
        kept = {"pixel_values": inputs["pixel_values"].to(self.model.dtype), "image_grid_thw": grid}
        return self._vectors(torch.tensor([ids] * len(pictures)), kept)

    def _tokens(self, system: str, content: str) -> list[int]:
        text = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n"
            "<|im_start|>assistant\n<|endoftext|>"
        )
        return cast(list[int], self.tokenizer(text)["input_ids"][: self.choices.most_length])

    @torch.inference_mode()
    def _vectors(self, ids: Tensor, pictures: Mapping[str, Tensor]) -> NDArray[np.float32]:
        options: dict[str, Any] = {name: value.to(self.device) for name, value in pictures.items()}
        if self.choices.positions == "sequential":
            options["position_ids"] = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)
        elif pictures:
            options["mm_token_type_ids"] = (ids == self.picture_token).int().to(self.device)
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=torch.ones_like(ids).to(self.device),
            use_cache=False,
            **options,
        )
        last = output.last_hidden_state[:, -1].float()
        vectors: NDArray[np.float32] = torch.nn.functional.normalize(last, dim=-1).cpu().numpy()
        return vectors


def gme_size(height: int, width: int) -> tuple[int, int]:
    """The (height, width) of the first resizing: multiples of 28, with about the same shape."""
    high, wide = (max(_UNIT, round(side / _UNIT) * _UNIT) for side in (height, width))
    if high * wide > _MOST_PIXELS:
        scale = math.sqrt(height * width / _MOST_PIXELS)
        return tuple(math.floor(side / scale / _UNIT) * _UNIT for side in (height, width))  # type: ignore[return-value]
    if high * wide < _LEAST_PIXELS:
        scale = math.sqrt(_LEAST_PIXELS / (height * width))
        return tuple(math.ceil(side * scale / _UNIT) * _UNIT for side in (height, width))  # type: ignore[return-value]
    return high, wide


def _resized(picture: Pixels) -> Image.Image:
    height, width = gme_size(picture.shape[0], picture.shape[1])
    return Image.fromarray(picture).resize((width, height))  # Pillow's default, bicubic
