"""Export: a run's weights and its encoders as one diffusers pipeline folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import transformers
from safetensors import SafetensorError

from domainshuttle.model.encoders import WanVideoEncoder, load_text_encoder, load_video_encoder, network_dtype
from domainshuttle.model.generation import DomainShuttlePipeline
from domainshuttle.model.sampling import make_scheduler
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.pipelines.errors import one_line
from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.weights_digest import verified_digest

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What diffusers, transformers and safetensors raise for a folder that is missing, damaged or of something else."""


def export_run(run: Run, folder: Path, stage: str | None = None, averaged: bool = True) -> str:
    """Writes the pipeline of a finished stage (the last one unless named) and returns the stage's name.

    With experts it holds all of them. Where a moving average of the weights was kept it is taken, unless `averaged` is
    False. The folder appears whole or not at all; one that is there is replaced if it is a pipeline. Raises ConfigError
    when no stage is finished, or for a folder that holds something else, ChangedError for a stage whose weights were
    changed since they were trained.
    """
    name, segments = _finished_stage(run, stage)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise ConfigError(f"{folder} is not empty and no pipeline: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)  # where it can't be made, that is said at once
    folders, boundary = _networks(segments, averaged)
    for one in folders:
        verified_digest(one, run.fingerprints)
    pipeline: Any = assemble_pipeline(run.config, folders, boundary)
    with atomic_folder(folder) as aside:
        pipeline.save_pretrained(aside)
    return name


def _finished_stage(run: Run, stage: str | None) -> tuple[str, list[Segment]]:
    """The last stage, or the named one, of which every segment is finished."""
    for section in reversed(run.config.stages):
        segments = [segment for segment in run.segments() if segment.stage.name == section.name]
        if stage in (None, section.name) and all(segment.finished for segment in segments):
            return section.name, segments
    which = f"stage {stage!r}" if stage else "any stage"
    raise ConfigError(f"run {run.config.name!r} has not finished {which}; see domainshuttle status {run.folder}")


def _networks(segments: list[Segment], averaged: bool) -> tuple[list[Path], float | None]:
    """The folders of the stage's networks, the one for high noise first, and the time that divides two."""
    if len(segments) > 2:
        raise ConfigError(f"{len(segments)} experts: a pipeline holds two at most")
    ordered = sorted(segments, key=lambda segment: -segment.flow.low)
    averages = [segment.averaged_weights for segment in ordered]
    folders = [
        average if averaged and average.exists() else segment.weights
        for average, segment in zip(averages, ordered, strict=True)
    ]
    return folders, ordered[0].flow.low if len(ordered) == 2 else None


def assemble_pipeline(
    config: RunConfig, weights: list[Path], boundary: float | None = None, device: str = "cpu"
) -> DomainShuttlePipeline:
    """The pipeline of transformers' folders and the run's encoders.

    Of two, the first is in charge of the times from `boundary` on.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    encoders = config.encoders
    dtype = network_dtype(device)
    with _explained(f"the encoders {encoders.video} and {encoders.text} can't be loaded"):
        video = load_video_encoder(encoders.video)
        text = load_text_encoder(encoders.text, encoders.text_len, dtype=dtype)
    with _explained(f"the weights in {' and '.join(map(str, weights))} can't be loaded"):
        first, *others = [DomainShuttleTransformer3DModel.from_pretrained(one, torch_dtype=dtype) for one in weights]
    pipeline: Any = DomainShuttlePipeline(
        transformer=first,
        transformer_2=others[0] if others else None,
        boundary_ratio=boundary,
        scheduler=make_scheduler("euler", config.generation.shift),
        vae=video.vae if isinstance(video, WanVideoEncoder) else video,  # type: ignore[arg-type]
        text_encoder=text.model,
        tokenizer=text.tokenizer,
    )
    placed: DomainShuttlePipeline = pipeline.to(device)
    return placed


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what the libraries raise of weights that are missing or damaged into a ConfigError."""
    try:
        yield
    except UNREADABLE as error:
        raise ConfigError(f"{what}: {one_line(error)}") from error
