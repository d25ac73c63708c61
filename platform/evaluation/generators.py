"""What makes the clips of an evaluation: our own pipeline, or diffusers' WanVACEPipeline as a baseline.

Both are asked with the same cases, seeds and sizes, and the time of their parts is measured in the same way.
"""

import hashlib
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
import transformers
from diffusers import WanVACEPipeline
from PIL import Image

from domainshuttle.model.encoders import network_dtype
from domainshuttle.model.generation import NEGATIVE_PROMPT, DomainShuttlePipeline, InputError
from domainshuttle.pipelines.errors import DataError, one_line
from domainshuttle.pipelines.media.decode import Pixels, decode_image
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.evaluation.cases import EvaluationCase, ReferencePicture
from domainshuttle.platform.evaluation.config import GenerationSettings
from domainshuttle.platform.generation.assemble import UNREADABLE
from domainshuttle.platform.generation.cases import NotFiniteError, as_pixels
from domainshuttle.platform.generation.export import SETTINGS_NAME
from domainshuttle.platform.generation.generate import Sampling, load_pipeline


@dataclass(frozen=True)
class Settings:
    """How a model's clips are made, resolved: sizes in pixels, `fps` and `crf` those of the MP4."""

    height: int
    width: int
    frames: int
    steps: int
    guidance_high: float
    guidance_low: float
    """Of the expert for low noise; of a model with one network as `guidance_high`."""
    reference_guidance: float | None
    negative_prompt: str
    fps: float
    crf: int

    @classmethod
    def of(cls, model: str, asked: GenerationSettings) -> "Settings":
        """As asked, and where nothing was as the model's folder says; raises ConfigError where that can't be read."""
        told = Sampling.of(
            model, height=asked.height, width=asked.width, frames=asked.frames, steps=asked.steps,
            guidance=asked.guidance_high, reference_guidance=asked.reference_guidance, fps=asked.fps, seed=0,
        )  # fmt: skip
        low = told.guidance if asked.guidance_low is None else asked.guidance_low
        negative = NEGATIVE_PROMPT if asked.negative_prompt == "wan" else asked.negative_prompt
        return cls(
            told.height, told.width, told.frames, told.steps, told.guidance, low, told.reference_guidance, negative,
            told.fps, asked.crf,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class Latency:
    """What a batch of clips cost. Seconds are the accelerator's own: it is waited for at the end of each part."""

    batch: int
    steps: int
    text: float = 0.0
    """Seconds in the text encoder."""
    references: float = 0.0
    """Seconds in the VAE's encoder."""
    denoising: float = 0.0
    """Seconds from the first evaluation of a network to the end of the last step."""
    decoding: float = 0.0
    """Seconds in the VAE's decoder."""
    total: float = 0.0
    """Seconds of the whole call, without what writes the MP4."""
    evaluations: float = 0.0
    """Evaluations of a network a step."""
    allocated: int = 0
    """Peak bytes: of the accelerator's memory in use; on a CPU of the process since its start."""
    reserved: int = 0
    """Peak bytes that torch held of the accelerator; on a CPU as `allocated`."""
    device: str = ""
    dtype: str = ""
    attention: str = ""
    warm: bool = True
    """Whether another call of the same shape came before, so that nothing of the first one's costs is in it."""
    references_count: float = 0.0
    """Reference pictures a case."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class CaseError(ValueError):
    """A case that a model can't make: what is wrong, for the row of the failure."""


class Generator(Protocol):
    """A pipeline that makes clips of cases."""

    def check(self, settings: Settings) -> None:
        """Raises ConfigError for settings that no case can be made with."""
        ...

    def generate(
        self, cases: Sequence[EvaluationCase], seeds: Sequence[int], settings: Settings
    ) -> tuple[list[Pixels], Latency]:
        """A clip [F,h,w,3] uint8 for each case. Raises CaseError for one that it can't make."""
        ...


def load_generator(model: str) -> Generator:
    """The pipeline of a folder or hub id; raises ConfigError for what is none of the kinds that are known."""
    kind = pipeline_class(model)
    return _WanVACE(model) if kind == WanVACEPipeline.__name__ else _DomainShuttle(model)


def pipeline_class(model: str) -> str:
    """The class of a diffusers folder; of what is no folder here, our own."""
    path = Path(model) / "model_index.json"
    if not path.is_file():
        return DomainShuttlePipeline.__name__
    try:
        return str(json.loads(path.read_text()).get("_class_name"))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} can't be read ({error}): export the model again") from error


class _DomainShuttle:
    """Our own pipeline."""

    def __init__(self, model: str) -> None:
        self.pipeline: Any = load_pipeline(model)
        self.clock = _PartClock(self.pipeline)

    def check(self, settings: Settings) -> None:
        scales = [settings.guidance_high, settings.guidance_low]
        if settings.reference_guidance is not None:
            scales.append(settings.reference_guidance)
        try:
            self.pipeline.check_inputs(
                ["a prompt"], None, settings.height, settings.width, settings.frames, settings.steps, scales
            )
        except InputError as error:
            raise ConfigError(f"generation: {error}") from error

    def generate(
        self, cases: Sequence[EvaluationCase], seeds: Sequence[int], settings: Settings
    ) -> tuple[list[Pixels], Latency]:
        pictures = [opened(case.references) for case in cases]
        subjects = [[_renumbered(case)[one.subject] for one in case.references] for case in cases]
        domains = [[one.domain for one in case.references] for case in cases]
        given: dict[str, Any] = {}
        if any(pictures):
            given = {"references": pictures, "reference_subjects": subjects, "reference_domains": domains}
        with self.clock.running(len(cases), settings.steps) as latency:
            try:
                result: Any = self.pipeline(
                    prompt=[case.prompt for case in cases],
                    negative_prompt=settings.negative_prompt,
                    **given,
                    height=settings.height,
                    width=settings.width,
                    num_frames=settings.frames,
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance_high,
                    guidance_scale_2=settings.guidance_low,
                    reference_guidance_scale=settings.reference_guidance if given else None,
                    seed=list(seeds),
                    output_type="np",
                    callback_on_step_end=self.clock.step_ended,
                )
            except InputError as error:
                raise CaseError(str(error)) from error
        latency.references_count = sum(map(len, pictures)) / len(cases)
        return [_pixels(frames) for frames in result.frames], latency


class _WanVACE:
    """Diffusers' VACE: references are further frames of the video. Its guidance by references is its own."""

    def __init__(self, model: str) -> None:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype: Any = {"default": network_dtype(device), "vae": torch.float32}
        try:
            pipeline: Any = WanVACEPipeline.from_pretrained(model, torch_dtype=dtype)
        except UNREADABLE as error:
            raise ConfigError(f"{model} can't be loaded as a WanVACEPipeline: {one_line(error)}") from error
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.to(device)
        self.clock = _PartClock(self.pipeline)

    def check(self, settings: Settings) -> None:
        pipeline = self.pipeline
        stride = pipeline.vae_scale_factor_temporal
        if (settings.frames - 1) % stride:  # it would round with a warning
            nearest = (settings.frames - 1) // stride * stride + 1
            raise ConfigError(f"generation: num_frames {settings.frames} must be {stride} n + 1: use {nearest}")
        try:
            pipeline.check_inputs("a prompt", "", settings.height, settings.width)
        except ValueError as error:
            raise ConfigError(f"generation: {one_line(error)}") from error

    def generate(
        self, cases: Sequence[EvaluationCase], seeds: Sequence[int], settings: Settings
    ) -> tuple[list[Pixels], Latency]:
        clips = []
        two = self.pipeline.config.boundary_ratio is not None
        with self.clock.running(len(cases), settings.steps) as latency:
            for case, seed in zip(cases, seeds, strict=True):  # it takes one at a time
                try:
                    result = self.pipeline(
                        prompt=case.prompt,
                        negative_prompt=settings.negative_prompt,
                        reference_images=opened(case.references) or None,
                        height=settings.height,
                        width=settings.width,
                        num_frames=settings.frames,
                        num_inference_steps=settings.steps,
                        guidance_scale=settings.guidance_high,
                        guidance_scale_2=settings.guidance_low if two else None,
                        generator=torch.Generator().manual_seed(seed),
                        output_type="np",
                        callback_on_step_end=self.clock.step_ended,
                    )
                except ValueError as error:
                    raise CaseError(one_line(error)) from error
                clips.append(_pixels(result.frames[0]))
        latency.references_count = sum(len(case.references) for case in cases) / len(cases)
        return clips, latency


def opened(references: Sequence[ReferencePicture]) -> list[Image.Image]:
    """The pictures, decoded as those that training sees. Raises CaseError for one that can't be."""
    try:
        return [Image.fromarray(decode_image(one.path.read_bytes(), one.path.name)) for one in references]
    except DataError as error:
        raise CaseError(f"a reference picture can't be used: {one_line(error)}") from error


def _pixels(frames: np.ndarray) -> Pixels:
    """[F,h,w,3] floats in 0..1 to uint8. Raises CaseError for a clip whose values are not all finite."""
    try:
        return as_pixels(frames)
    except NotFiniteError as error:
        raise CaseError(str(error)) from error


def _renumbered(case: EvaluationCase) -> dict[int, int]:
    """The subjects of a case as 0 to n - 1, which is what a model takes."""
    return {subject: number for number, subject in enumerate(case.subjects)}


def model_digest(model: str) -> str:
    """What tells one model from another: of a folder its files, of a hub id the id alone.

    Of a file of weights it takes the size, the beginning and evenly spread pieces: reading tens of GB takes minutes,
    and training changes all of them. How clips are made by default (generation.json) is no part of it.
    """
    folder = Path(model)
    digest = hashlib.sha256(b"" if folder.is_dir() else model.encode())
    for path in sorted(one for one in folder.rglob("*") if one.is_file() and not one.name.startswith(".")):
        name, size = str(path.relative_to(folder)), path.stat().st_size
        if name == SETTINGS_NAME:
            continue
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            for number in range(_PIECES if size > _PIECES * _PIECE else 1):
                file.seek(number * (size // _PIECES))
                digest.update(file.read(_PIECE if size > _PIECES * _PIECE else size))
    return digest.hexdigest()[:32]


_PIECES, _PIECE = 16, 1 << 20


@dataclass
class _PartClock:
    """Measures the parts of a pipeline's call, by hooks on its models."""

    pipeline: Any
    _latency: Latency = field(default_factory=lambda: Latency(0, 0))
    _shapes: set[int] = field(default_factory=set)
    _began: float = 0.0
    _ended: float = 0.0

    def __post_init__(self) -> None:
        pipeline = self.pipeline
        self.device = torch.device(pipeline.device)
        for network in (pipeline.transformer, pipeline.transformer_2):
            if network is not None:
                network.register_forward_pre_hook(self._network_begins)
        if pipeline.text_encoder is not None:
            self._wrap(pipeline.text_encoder, "forward", "text")
        if pipeline.vae is not None:
            self._wrap(pipeline.vae, "encode", "references")
            self._wrap(pipeline.vae, "decode", "decoding")

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*arguments: Any, **given: Any) -> Any:
            self._wait()
            began = time.perf_counter()
            result = inner(*arguments, **given)
            self._wait()
            setattr(self._latency, part, getattr(self._latency, part) + time.perf_counter() - began)
            return result

        setattr(owner, name, timed)

    def _network_begins(self, *_: Any) -> None:
        if self._began == 0.0:
            self._wait()
            self._began = time.perf_counter()
        self._latency.evaluations += 1

    def step_ended(self, _: object, step: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline calls after each step."""
        self._wait()
        self._ended = time.perf_counter()
        if step + 1 == self._latency.steps:
            self._latency.denoising += self._ended - self._began
            self._began = 0.0
        return tensors

    @contextmanager
    def running(self, batch: int, steps: int) -> Iterator[Latency]:
        """Around a call: its latency is whole when the block ends."""
        self._latency = latency = Latency(batch, steps)
        self._began = 0.0
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._wait()
        began = time.perf_counter()
        yield latency
        self._wait()
        latency.total = time.perf_counter() - began
        latency.evaluations /= max(1, steps)
        if self.pipeline.__class__.__name__ == WanVACEPipeline.__name__:
            latency.evaluations /= max(1, batch)
        latency.warm = batch in self._shapes
        self._shapes.add(batch)
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        latency.allocated = torch.cuda.max_memory_allocated(self.device) if cuda else process
        latency.reserved = torch.cuda.max_memory_reserved(self.device) if cuda else process
        latency.device = torch.cuda.get_device_name(self.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
        latency.dtype = str(next(self.pipeline.transformer.parameters()).dtype).removeprefix("torch.")
        latency.attention = os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
