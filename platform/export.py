"""Export: a run's weights and its encoders as one diffusers pipeline folder."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import transformers

from domainshuttle.model.encoders import WanVideoEncoder, load_text_encoder, load_video_encoder
from domainshuttle.model.generation import DomainShuttlePipeline
from domainshuttle.model.sampling import make_scheduler
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.platform.config import ConfigError
from domainshuttle.platform.schedule import Run


def export_run(run: Run, folder: Path, stage: str | None = None) -> str:
    """Writes the pipeline of a finished stage (the last one unless named) and returns the stage's name.

    The folder appears whole or not at all; one that is there is replaced if it is a pipeline. Raises ConfigError when
    no stage is finished, or for a folder that holds something else.
    """
    finished = [segment for segment in run.segments() if segment.finished]
    if stage is not None:
        finished = [segment for segment in finished if segment.name == stage]
    if not finished:
        which = f"stage {stage!r}" if stage else "any stage"
        raise ConfigError(f"run {run.config.name!r} has not finished {which}; see domainshuttle status {run.folder}")
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise ConfigError(f"{folder} is not empty and no pipeline: choose another folder")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    encoders = run.config.encoders
    video = load_video_encoder(encoders.video)
    text = load_text_encoder(encoders.text, encoders.text_len)
    pipeline: Any = DomainShuttlePipeline(
        transformer=DomainShuttleTransformer3DModel.from_pretrained(finished[-1].weights),
        scheduler=make_scheduler("euler", run.config.generation.shift),
        vae=video.vae if isinstance(video, WanVideoEncoder) else video,  # type: ignore[arg-type]
        text_encoder=text.model,
        tokenizer=text.tokenizer,
    )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
    return finished[-1].name
