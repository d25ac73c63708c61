"""A diffusers pipeline of folders of weights and a run's encoders."""

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
from domainshuttle.platform.config.schema import ConfigError, RunConfig

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What diffusers, transformers and safetensors raise for a folder that is missing, damaged or of something else."""


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
