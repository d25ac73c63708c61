"""one-align (q-future/one-align) in an environment of its own: it needs transformers 4.36 and the code of its folder.

What is here runs in an actor with what it is pinned to (`isolated`): it imports torch, NumPy and Pillow alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PACKAGES = ("transformers==4.36.1", "tokenizers>=0.14,<0.19", "icecream", "sentencepiece")
"""What its code needs. Its authors pin pydantic<2 too, for their web page: the model's files don't import it, and Ray
runs in no environment that has it."""
LICENCE = (
    "q-future/one-align is made from LLaMA 2: the LLaMA 2 Community License binds its use (its acceptable-use policy; "
    "no training of other language models with what it gives; above 700 million users a month a licence of one's own)"
)
WORDS = ("excellent", "good", "fair", "poor", "bad")
WEIGHTS = (1.0, 0.75, 0.5, 0.25, 0.0)
PROMPT = "USER: How would you rate the quality of this video?\n<|image|>\nASSISTANT: The quality of the video is"
_IMAGE_TOKEN = -200
"""What its code puts in place of the picture."""


class OneAlign:
    """The model, loaded from a local folder with its own code."""

    def __init__(self, folder: str, at_once: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.float16 if self.device == "cuda" else torch.float32
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False, local_files_only=True)
        self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, torch_dtype=self.dtype, local_files_only=True
        )
        self.model = model.to(self.device).eval()
        self.at_once = at_once
        self.words = [ids[1] for ids in tokenizer(list(WORDS))["input_ids"]]
        before, after = (tokenizer(part).input_ids for part in PROMPT.split("<|image|>"))
        self.ids = torch.tensor([[*before, _IMAGE_TOKEN, *after[1:]]], device=self.device)  # one BOS

    def scores(self, frames: NDArray[np.uint8], windows: Sequence[Sequence[int]]) -> list[float]:
        """A score of 0 to 1 for each window of frames [f,h,w,3]."""
        import torch

        mean = tuple(int(level * 255) for level in self.processor.image_mean)
        found: list[float] = []
        prepared = [self._prepared(on_square(Image.fromarray(frame), mean)) for frame in frames]
        weights = torch.tensor(WEIGHTS, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            for start in range(0, len(windows), self.at_once):
                batch = [torch.stack([prepared[n] for n in one]) for one in windows[start : start + self.at_once]]
                logits = self.model(self.ids.repeat(len(batch), 1), images=batch)["logits"][:, -1, self.words]
                found += (torch.softmax(logits, -1) @ weights).float().cpu().tolist()
        return found

    def _prepared(self, picture: Image.Image) -> Any:
        return self.processor.preprocess([picture], return_tensors="pt")["pixel_values"][0].to(self.device, self.dtype)


def on_square(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """A picture in the middle of a square of a colour."""
    width, height = picture.size
    side = max(width, height)
    square = Image.new(picture.mode, (side, side), colour)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square
