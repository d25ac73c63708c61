"""Export: a run's weights and its encoders as one diffusers pipeline folder."""

import contextlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from domainshuttle.model.convert import MAX_SHARD_BYTES
from domainshuttle.model.encoders import WanVideoEncoder, load_text_encoder, load_video_encoder, network_dtype
from domainshuttle.model.generation import DomainShuttlePipeline
from domainshuttle.model.lora import LORA_FILE, LORA_FOLDER, LoraWeights
from domainshuttle.model.sampling import make_scheduler
from domainshuttle.model.spec import lora_layer
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.model.weight_files import write_shards
from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.pipelines.errors import DataError, StorageError, one_line
from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.platform.checkpoint.resume import read_named
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore
from domainshuttle.platform.config.schema import AdapterTraining, ConfigError, RunConfig
from domainshuttle.platform.engine.hub import resolve_all
from domainshuttle.platform.engine.initialization import blueprint
from domainshuttle.platform.engine.sharded_state import saved_parameters
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.weights_digest import verified_digest
from domainshuttle.platform.run.weights_origin import WeightsOrigin

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What diffusers, transformers and safetensors raise for a folder that is missing, damaged or of something else."""


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
    name, segments = _chosen(run, stage, checkpoint)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise ConfigError(f"{folder} is not empty and no pipeline: choose another folder")
    if (folder / "model_index.json").exists() and not overwrite:
        raise ConfigError(f"{folder} holds a pipeline already: choose another folder, or replace it with --overwrite")
    folder.parent.mkdir(parents=True, exist_ok=True)  # where it can't be made, that is said at once
    with contextlib.ExitStack() as stack:
        if checkpoint:
            network = Path(
                stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}."))
            )
            folders, boundary, segment = _networks_of(run, checkpoint, network, averaged)
        else:
            folders, boundary = _networks(segments, averaged)
            segment = segments[-1]
            for one in folders:
                verified_digest(one, run.fingerprints)
        settings = _trained_settings(run, segment)
        pipeline: Any = assemble_pipeline(run.config, folders, boundary)
        adapters = [_all_adapters(run, one) for one in folders]
        with atomic_folder(folder) as aside:
            pipeline.save_pretrained(aside)
            for number, found in enumerate(adapters):
                if found is not None:
                    found.save(aside / LORA_FOLDER / _EXPERT_FOLDERS[number])
            (aside / SETTINGS_NAME).write_text(json.dumps(settings, indent=2))
    return name


def export_lora(
    run: Run,
    folder: Path,
    stage: str | None = None,
    averaged: bool = True,
    checkpoint: str | None = None,
    overwrite: bool = False,
) -> str:
    """Writes the adapters alone, of a finished stage or of a checkpoint, as diffusers' `load_lora_weights` takes them;
    returns what they are and of which weights.

    They are all that was trained as adapters since the base, so that they go on the base itself. With experts those for
    low noise lie in `transformer_2`. Neither encoders nor frozen weights are read. Arguments and errors are those of
    `export_run`, and ConfigError for a stage that trains no adapters.
    """
    name, segments = _chosen(run, stage, checkpoint)
    if folder.exists() and any(folder.iterdir()) and not ((folder / LORA_FILE).exists() and overwrite):
        raise ConfigError(f"{folder} is not empty: choose another folder, or replace a LoRA with --overwrite")
    if checkpoint:
        newest = [_checkpoint_adapters(run, checkpoint, averaged)]
    else:
        newest = []
        for segment, one in zip(_by_noise(segments), _networks(segments, averaged)[0], strict=True):
            verified_digest(one, run.fingerprints)
            if (stored := _stored_adapters(one)) is not None:
                newest.append((segment, stored))
    if not newest:
        trains = ", ".join(one.name for one in run.segments() if one.stage.lora is not None) or "no stage"
        raise ConfigError(f"{name} of run {run.config.name!r} has no adapters (trained.lora); {trains} trains them")
    told = []
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as aside:
        for segment, stored in newest:
            adapters, base, beside = _since_base(run, segment, stored)
            adapters.save(aside / _EXPERT_FOLDERS[_by_noise(_stage_segments(run, segment)).index(segment)])
            told.append(
                f"{segment.name}, a LoRA of rank {adapters.rank} of {len(adapters.layers)} layers, of weights {base}"
                + (f"; what was trained beside it ({', '.join(beside)}) is in a pipeline alone" if beside else "")
            )
    return "; ".join(told)


def _by_noise(segments: list[Segment]) -> list[Segment]:
    """A stage's segments as a pipeline has their networks: the one for high noise first."""
    return sorted(segments, key=lambda segment: -segment.flow.low)


def _stage_segments(run: Run, segment: Segment) -> list[Segment]:
    return [one for one in run.segments() if one.stage.name == segment.stage.name]


_EXPERT_FOLDERS = ("", "transformer_2")
"""Where the adapters of a pipeline's networks lie."""


def _chosen(run: Run, stage: str | None, checkpoint: str | None) -> tuple[str, list[Segment]]:
    if stage and checkpoint:
        raise ConfigError("--stage and --checkpoint: a checkpoint is of one stage, so give one of the two")
    return (checkpoint, []) if checkpoint else _finished_stage(run, stage)


def _stored_adapters(weights: Path) -> LoraWeights | None:
    """The adapters of a segment, beside its weights."""
    return LoraWeights.load(weights / LORA_FOLDER) if (weights / LORA_FOLDER / LORA_FILE).exists() else None


def _since_base(run: Run, segment: Segment, adapters: LoraWeights) -> tuple[LoraWeights, str, list[str]]:
    """A segment's adapters with those of the segments before it that trained adapters too, the weights that lie below
    them, and the patterns of what was trained beside them."""
    parts, base, beside = [adapters], segment.origin, _beside(segment)
    for earlier in reversed([one for one in run.segments()[: segment.number] if one.expert == segment.expert]):
        stored = _stored_adapters(earlier.weights)
        if stored is None:
            break
        parts.insert(0, stored)
        base, beside = earlier.origin, [*_beside(earlier), *beside]
    return LoraWeights.joined(parts), base or "of a new model", list(dict.fromkeys(beside))


def _beside(segment: Segment) -> list[str]:
    trained = segment.stage.trained
    return trained.parameters if isinstance(trained, AdapterTraining) else []


def _all_adapters(run: Run, weights: Path) -> LoraWeights | None:
    """The adapters since the base of a network that is exported."""
    stored = _stored_adapters(weights)
    if stored is None:
        return None
    noted = weights / _SEGMENT_NAME
    name = noted.read_text() if noted.exists() else weights.name.removesuffix("-ema")
    return _since_base(run, run.segment(name), stored)[0]


_SEGMENT_NAME = "segment.txt"
"""In a network that was put together from a checkpoint: its segment."""


def _checkpoint_adapters(run: Run, name: str, averaged: bool) -> tuple[Segment, LoraWeights]:
    """The adapters in a checkpoint. Raises ConfigError where its stage trains none."""
    store = CheckpointStore.of(run.config, run.folder)
    checkpoint = read_named(store, name, "--checkpoint")
    segment = run.segment(checkpoint.state.segment)
    if segment.stage.lora is None:
        raise ConfigError(f"checkpoint {name} holds no adapters: stage {segment.stage.name} does not train any")
    try:
        with saved_parameters(store.fetch(checkpoint), averaged) as (trained, read):
            return segment, LoraWeights.of(
                {one: read(one) for one in trained if lora_layer(one)}, segment.stage.lora.scale
            )
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {name} can't be exported: {one_line(error)}") from error
    finally:
        store.release(checkpoint)


SETTINGS_NAME = "generation.json"
"""In an exported folder: how clips are sampled unless asked otherwise."""


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
    """The bucket of most steps; where the corpora's indexes can't be read, the largest of the corpora."""
    shares: defaultdict[Bucket, float] = defaultdict(float)
    try:
        for bucket, share, _ in make_feed(config, segment).plan().groups():
            shares[bucket] += share
    except (DataError, StorageError):
        named = [one for name in segment.stage.mixture for one in config.corpus(name).buckets]
        return max(named, key=lambda one: (one.frames * one.height * one.width, one))
    return max(shares, key=lambda one: (shares[one], one))


def _networks_of(run: Run, name: str, network: Path, averaged: bool) -> tuple[list[Path], float | None, Segment]:
    """The same as `_networks`, of a checkpoint, whose own network is put together in the folder `network`; and its
    segment."""
    from domainshuttle.platform.generation.training_samples import networks_beside  # which imports this module

    store = CheckpointStore.of(run.config, run.folder)
    checkpoint = read_named(store, name, "--checkpoint")
    segment = run.segment(checkpoint.state.segment)
    design = blueprint(run.config.model_of(segment.expert), _origin_of(run, segment, checkpoint))
    order = [(name, tuple(one.shape), torch.float32) for name, one in design.outline.named_parameters()]
    frozen = design.weights()
    try:
        with saved_parameters(store.fetch(checkpoint), averaged) as (trained, read):
            own = {name for name in trained if lora_layer(name)}
            if strangers := trained.keys() - own - {name for name, _, _ in order}:
                raise CheckpointError(
                    f"checkpoint {name} contains parameters that the model does not have: {min(strangers)}"
                )
            scale = segment.stage.lora.scale if segment.stage.lora is not None else 1.0
            adapters = LoraWeights.of({name: read(name) for name in own}, scale)

            def value(name: str) -> Tensor:
                _, begun_with = next(frozen)
                return adapters.merged(name, read(name) if name in trained else begun_with.float())

            write_shards(network, order, value, MAX_SHARD_BYTES)
            if own:
                adapters.save(network / LORA_FOLDER)
                (network / _SEGMENT_NAME).write_text(segment.name)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {name} can't be exported: {one_line(error)}") from error
    finally:
        store.release(checkpoint)
    design.outline.save_config(network)
    return *networks_beside(run, segment, network, resolve_all(run) if run.config.experts else {}), segment


def _origin_of(run: Run, segment: Segment, checkpoint: Checkpoint) -> WeightsOrigin:
    """The weights that a checkpoint's frozen parameters come from. Raises ConfigError where they are not there."""
    state = checkpoint.state
    if state.base.startswith("hub:"):
        return WeightsOrigin(state.origin, segment.seed, state.base.rpartition("@")[2], state.base)
    for place in dict.fromkeys((segment.origin, state.origin)):  # where they are now, and where they were
        if place is None or Path(place).is_dir():
            origin = WeightsOrigin(place, segment.seed).identified(run.fingerprints)
            if origin.identity == state.base:
                return origin
    raise ConfigError(
        f"checkpoint {checkpoint.name} holds what is trained, and the rest comes from the weights {state.base}"
        + (f" (of {state.origin})" if state.origin else "")
        + f", which are not in {segment.origin or 'a new model of this seed'}: bring them back"
    )


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
    ordered = _by_noise(segments)
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
