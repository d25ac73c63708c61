"""`domainshuttle generate`: cases to clips on disk."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from domainshuttle.model.cases import GenerationCase
from domainshuttle.model.domains import domain_id
from domainshuttle.model.encoders import network_dtype
from domainshuttle.model.generation import DomainShuttlePipeline, InputError
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.pipelines.errors import DataError, counted, one_line
from domainshuttle.pipelines.media.decode import decode_image, encode_mp4
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import console, progress
from domainshuttle.platform.generation.assemble import UNREADABLE
from domainshuttle.platform.generation.cases import as_pixels, case_seed, read_cases
from domainshuttle.platform.generation.export import SETTINGS_NAME
from domainshuttle.platform.report.text import Prose


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled; sizes in pixels."""

    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    reference_guidance: float | None
    fps: float
    seed: int

    @classmethod
    def of(cls, model: str, **asked: Any) -> "Sampling":
        """As asked, and where nothing was (None) as the exported folder says; else as Wan's own model.

        Raises ConfigError where the folder says what can't be read.
        """
        path = Path(model) / SETTINGS_NAME
        told: dict[str, Any] = {}
        if path.is_file():
            try:
                told = {name: value for name, value in json.loads(path.read_text()).items() if name in _WAN}
            except (ValueError, AttributeError) as error:
                raise ConfigError(f"{path} can't be read ({error}): export the model again") from error
        return cls(**_WAN | told | {name: value for name, value in asked.items() if value is not None})

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}, {counted(self.frames, 'frame')}"
        steps = counted(self.steps, "step")
        return f"{size} at {self.fps:g} a second, {steps}, guidance {self.guidance:g}, seed {self.seed}"

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise ConfigError(f"--fps {self.fps:g}: expected frames a second above 0, such as 16")


_WAN = {
    "height": 480, "width": 832, "frames": 81, "steps": 40, "guidance": 5.0, "reference_guidance": None, "fps": 16.0,
}  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_pipeline(model: str | Path) -> DomainShuttlePipeline:
    """The exported pipeline, on a GPU if there is one, else on the CPU. Raises ConfigError where there is none."""
    if not Path(model).is_dir() and not _HUB_ID.fullmatch(str(model)):
        raise ConfigError(f"no exported model in {model}: make one with domainshuttle export")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = {"default": network_dtype(device), "vae": torch.float32}
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline: Any = DomainShuttlePipeline.from_pretrained(model, dtype=dtype)
    except UNREADABLE as error:
        raise ConfigError(_why_not(str(model), error)) from error
    if not isinstance(pipeline.transformer, DomainShuttleTransformer3DModel):
        kind = type(pipeline.transformer).__name__
        raise ConfigError(f"{model} holds a {kind}, and no model of ours: make one with domainshuttle export")
    pipeline.set_progress_bar_config(disable=True)
    placed: DomainShuttlePipeline = pipeline.to(device)
    return placed


def _why_not(model: str, error: BaseException) -> str:
    """What to say of a model that can't be loaded."""
    folder = Path(model)
    if not folder.is_dir():
        return (
            f"{model} is no folder here, and the hub does not give it ({one_line(error)}): check the name and the "
            f"connection, or fetch it where there is one (hf download {model} --local-dir FOLDER) and give its folder"
        )
    why = one_line(error)
    if not (folder / "model_index.json").is_file():
        alone = "one network, not a pipeline" if (folder / "config.json").is_file() else "no pipeline"
        why = f"it contains {alone}: there is no model_index.json"
    return f"no exported model in {model}: make one with domainshuttle export RUN FOLDER ({why})"


def generate_clips(
    model: str, prompt: str | None, references: list[str], cases: Path | None, out: Path, sampling: Sampling
) -> list[Path]:
    """Generates a clip a case into `out`; returns their paths.

    Raises ConfigError for a case that can't be generated, before anything is.
    """
    if (prompt is None) == (cases is None):
        raise ConfigError("give either --prompt (and --reference for each picture) or --cases FILE.jsonl")
    if cases:
        todo = [(one.name, one.case, case_seed(sampling.seed, one.id)) for one in read_cases(cases)]
    else:
        todo = [("clip", _case(prompt or "", references), sampling.seed)]
    if not todo:
        raise ConfigError(f"{cases} has no cases: expected one a line")
    for _, case, _ in todo:
        _references(case)
    out.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(model)
    for name, case, seed in todo:
        try:
            pipeline.check_inputs(
                [case.prompt], None, sampling.height, sampling.width, sampling.frames, sampling.steps,
                [scale for scale in (sampling.guidance, sampling.reference_guidance) if scale is not None],
                seed, [case.references] if case.references else None,
                [case.subjects] if case.references else None, [case.domains] if case.references else None,
            )  # fmt: skip
        except InputError as error:
            raise ConfigError(f"{cases}, case {name}: {error}" if cases else str(error)) from error
    _tell_cut_prompts(pipeline, {name: case.prompt for name, case, _ in todo})
    written = []
    console.print(f"{counted(len(todo), 'clip')} of {sampling}")
    with progress("Generating", "steps") as show:
        total = len(todo) * sampling.steps
        show(0, total)
        for number, (name, case, seed) in enumerate(todo):

            def stepped(_: Any, step: int, *__: Any, done: int = number * sampling.steps) -> dict[str, Any]:
                show(done + step + 1, total)
                return {}

            with _memory_explained(sampling):
                result: Any = pipeline(
                    prompt=case.prompt,
                    negative_prompt="",
                    references=_references(case) or None,
                    reference_subjects=list(case.subjects) or None,
                    reference_domains=list(case.domains) or None,
                    height=sampling.height,
                    width=sampling.width,
                    num_frames=sampling.frames,
                    num_inference_steps=sampling.steps,
                    guidance_scale=sampling.guidance,
                    reference_guidance_scale=sampling.reference_guidance,
                    seed=seed,
                    output_type="np",
                    callback_on_step_end=stepped,
                )
            path = out / f"{name}.{'mp4' if sampling.frames > 1 else 'png'}"
            save_clip(result.frames[0], path, sampling.fps)
            written.append(path)
            per_step = sum(result.seconds_per_step) / len(result.seconds_per_step)
            show((number + 1) * sampling.steps, total, f"clip {number + 1} of {len(todo)}, {per_step:.2f} s a step")
    console.print(
        Prose(
            f"Wrote {counted(len(written), 'clip' if sampling.frames > 1 else 'picture')} to {out}; {per_step:.2f} s a "
            f"step, peak memory {result.peak_memory_bytes / 2**30:.2f} GiB"
        )
    )
    return written


def _tell_cut_prompts(pipeline: Any, prompts: dict[str, str]) -> None:
    """Says which prompts are longer than what the model reads of them."""
    most = pipeline.transformer.config.text_len
    tokens = {name: pipeline.count_tokens(prompt) for name, prompt in prompts.items()}
    if cut := {name: count for name, count in tokens.items() if count > most}:
        longest = max(cut, key=lambda name: cut[name])
        console.print(
            f"{len(cut)} of {len(prompts)} prompts are cut to the {most} tokens that the model reads: that of "
            f"{longest} has {cut[longest]}"
        )


@contextlib.contextmanager
def _memory_explained(sampling: Sampling) -> Iterator[None]:
    """Turns what torch raises where memory is not enough into a ConfigError."""
    try:
        yield
    except RuntimeError as error:  # torch's error of a GPU is one
        if not re.search(r"out of memory|allocate memory", str(error)):
            raise
        raise ConfigError(
            f"{sampling}: the memory is not enough ({one_line(error)}): give fewer --frames, or a smaller --height and "
            "--width"
        ) from error


def _references(case: GenerationCase) -> list[Image.Image]:
    """A case's pictures, decoded as those that training sees; raises ConfigError for one that can't be."""
    try:
        return [Image.fromarray(decode_image(path.read_bytes(), str(path))) for path in case.references]
    except DataError as error:
        raise ConfigError(f"a reference picture can't be used: {error}") from error


def save_clip(frames: np.ndarray, path: Path, fps: float) -> None:
    """Writes frames [f,h,w,3], floats in 0..1, as MP4, or the first as PNG. Raises NotFiniteError."""
    pixels = as_pixels(frames)
    if path.suffix == ".png":
        Image.fromarray(pixels[0]).save(path)
    else:
        path.write_bytes(encode_mp4(pixels, fps))


def _case(prompt: str, references: list[str]) -> GenerationCase:
    """The case of command-line arguments; each reference is PICTURE[:SUBJECT[:DOMAIN]]."""
    pictures, subjects, domains = [], [], []
    for number, text in enumerate(references):
        picture, *rest = text.rsplit(":", 2) if not Path(text).exists() else [text]
        if not Path(picture).is_file():
            raise ConfigError(f"--reference {text!r}: no picture {picture}; expected PICTURE[:SUBJECT[:DOMAIN]]")
        try:
            subjects.append(int(rest[0]) if rest else number)
            domains.append(domain_id(rest[1]) if len(rest) > 1 else -1)
        except ValueError as error:
            raise ConfigError(f"--reference {text!r}: {error}") from error
        pictures.append(Path(picture))
    return GenerationCase(prompt, tuple(pictures), tuple(subjects), tuple(domains))
