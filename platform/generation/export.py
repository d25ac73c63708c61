"""The export of a run: its weights and encoders as one diffusers pipeline folder."""

import contextlib
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from domainshuttle.model.lora import LORA_FOLDER
from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.pipelines.errors import DataError, StorageError, one_line
from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.pipelines.storage.retry import patience
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.console import say
from domainshuttle.platform.generation.adapters import EXPERT_FOLDERS, adapters_since_base
from domainshuttle.platform.generation.assemble import assemble_pipeline
from domainshuttle.platform.generation.networks import checkpoint_networks, chosen_segments, finished_networks
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import Segment

CORPORA_SECONDS = 20.0
"""How long a store is asked for the corpora: an export is whole without them."""
SETTINGS_NAME = "generation.json"
"""In an exported folder: how clips are sampled unless asked otherwise."""


def export_run(
    run: Run,
    folder: Path,
    stage: str | None = None,
    averaged: bool = True,
    checkpoint: str | None = None,
    overwrite: bool = False,
) -> str:
    """Writes the pipeline of a finished stage (the last one unless named), or of a checkpoint; returns its name.

    With experts it holds all of them. Where a moving average of the weights was kept it is taken, unless `averaged` is
    False. The folder appears whole or not at all; a pipeline that is there is replaced with `overwrite`. Raises
    ConfigError when no stage is finished, for a folder that holds something and for a checkpoint whose frozen weights
    are not there, CheckpointError for one that is not whole, ChangedError for weights that were changed since they were
    made.
    """
    name, segments = chosen_segments(run, stage, checkpoint)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise ConfigError(f"{folder} is not empty and no pipeline: choose another folder")
    if (folder / "model_index.json").exists() and not overwrite:
        raise ConfigError(f"{folder} holds a pipeline already: choose another folder, or replace it with --overwrite")
    folder.parent.mkdir(parents=True, exist_ok=True)  # where it can't be made, that is said at once
    with contextlib.ExitStack() as stack:
        if checkpoint:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.")))
            networks, segment = checkpoint_networks(run, checkpoint, work, averaged)
        else:
            networks, segment = finished_networks(run, segments, averaged), segments[-1]
        settings = _trained_settings(run, segment)
        pipeline: Any = assemble_pipeline(run.config, networks.folders, networks.boundary)
        adapters = [adapters_since_base(run, one) for one in networks.networks]
        with atomic_folder(folder) as aside:
            pipeline.save_pretrained(aside)
            for expert, found in zip(EXPERT_FOLDERS, adapters, strict=False):
                if found is not None:
                    found.save(aside / LORA_FOLDER / expert)
            (aside / SETTINGS_NAME).write_text(json.dumps(settings, indent=2))
    return name


def _trained_settings(run: Run, segment: Segment) -> dict[str, Any]:
    """Size and length that a segment was trained on most, and how the configuration samples."""
    bucket, settings = _main_bucket(run.config, segment), run.config.generation
    return {
        "height": bucket.height,
        "width": bucket.width,
        "frames": bucket.frames,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "fps": settings.fps,
    }


def _main_bucket(config: RunConfig, segment: Segment) -> Bucket:
    """The bucket of most steps; where the corpora's indexes can't be read, the largest of the corpora and a word."""
    shares: defaultdict[Bucket, float] = defaultdict(float)
    try:
        with patience(CORPORA_SECONDS):
            groups = make_feed(config, segment).plan().groups()
        for bucket, share, _ in groups:
            shares[bucket] += share
    except (DataError, StorageError) as error:
        named = [one for name in segment.stage.mixture for one in config.corpus(name).buckets]
        largest = max(named, key=lambda one: (one.frames * one.height * one.width, one))
        say(
            f"The corpora of stage {segment.name} can't be read, so clips are made in its largest bucket, {largest}, "
            f"unless size and length are given: {one_line(error)}"
        )
        return largest
    return max(shares, key=lambda one: (shares[one], one))
