"""The adapters (LoRA) that a run trained: all of an expert since its base, and their export alone."""

from pathlib import Path

from domainshuttle.model.lora import LORA_FILE, LORA_FOLDER, LoraWeights
from domainshuttle.model.spec import lora_layer
from domainshuttle.pipelines.errors import counted, one_line
from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.platform.checkpoint.resume import read_named
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore
from domainshuttle.platform.config.schema import AdapterTraining, ConfigError
from domainshuttle.platform.engine.sharded_state import saved_parameters
from domainshuttle.platform.generation.networks import Network, chosen_segments, finished_networks, stage_segments
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import Segment

EXPERT_FOLDERS = ("", "transformer_2")
"""Where the adapters of a pipeline's networks lie: as diffusers names the networks, the one for high noise first."""


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
    name, segments = chosen_segments(run, stage, checkpoint)
    replaced = overwrite and any((folder / expert / LORA_FILE).exists() for expert in EXPERT_FOLDERS)
    if folder.exists() and any(folder.iterdir()) and not replaced:
        raise ConfigError(f"{folder} is not empty: choose another folder, or replace a LoRA with --overwrite")
    if checkpoint:
        newest = [_of_checkpoint(run, checkpoint, averaged)]
    else:
        networks = finished_networks(run, segments, averaged).networks
        newest = [
            (segment, stored)
            for segment, one in zip(segments, networks, strict=True)
            if (stored := _stored(one.folder)) is not None
        ]
    if not newest:
        trains = ", ".join(one.name for one in run.segments() if one.stage.lora is not None) or "no stage"
        raise ConfigError(f"{name} of run {run.config.name!r} has no adapters (trained.lora); {trains} trains them")
    told = []
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as aside:
        for segment, stored in newest:
            adapters, base, beside = _since_base(run, segment, stored)
            number = stage_segments(run, segment.stage.name).index(segment)
            adapters.save(aside / EXPERT_FOLDERS[number])
            told.append(
                f"{segment.name}, a LoRA of rank {adapters.rank} of {counted(len(adapters.layers), 'layer')}, of "
                f"weights {base}"
                + (f"; what was trained beside it ({', '.join(beside)}) is in a pipeline alone" if beside else "")
            )
    return "; ".join(told)


def adapters_since_base(run: Run, network: Network) -> LoraWeights | None:
    """All that was trained as adapters of a network since its base; None: its newest segment trained none."""
    stored = _stored(network.folder)
    return None if stored is None or network.segment is None else _since_base(run, network.segment, stored)[0]


def _stored(weights: Path) -> LoraWeights | None:
    """The adapters of a segment, beside its weights."""
    return LoraWeights.load(weights / LORA_FOLDER) if (weights / LORA_FOLDER / LORA_FILE).exists() else None


def _since_base(run: Run, segment: Segment, adapters: LoraWeights) -> tuple[LoraWeights, str, list[str]]:
    """A segment's adapters with those of the segments before it that trained adapters too, the weights that lie below
    them, and the patterns of what was trained beside them."""
    parts, base, beside = [adapters], segment.origin, _beside(segment)
    for earlier in reversed([one for one in run.segments()[: segment.number] if one.expert == segment.expert]):
        stored = _stored(earlier.weights)
        if stored is None:
            break
        parts.insert(0, stored)
        base, beside = earlier.origin, [*_beside(earlier), *beside]
    return LoraWeights.joined(parts), base or "of a new model", list(dict.fromkeys(beside))


def _beside(segment: Segment) -> list[str]:
    trained = segment.stage.trained
    return trained.parameters if isinstance(trained, AdapterTraining) else []


def _of_checkpoint(run: Run, name: str, averaged: bool) -> tuple[Segment, LoraWeights]:
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
