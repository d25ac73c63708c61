"""The networks that a run generates with, as folders of weights: of a finished stage, of a checkpoint, of a snapshot.

Of two experts both belong to a pipeline: while a stage of one is trained, the other takes part as it is.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from domainshuttle.model.convert import MAX_SHARD_BYTES
from domainshuttle.model.lora import LORA_FOLDER, LoraWeights
from domainshuttle.model.spec import lora_layer
from domainshuttle.model.weight_files import write_shards
from domainshuttle.pipelines.errors import one_line
from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.platform.checkpoint.resume import read_named
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.engine.hub import resolve_all
from domainshuttle.platform.engine.initialization import blueprint
from domainshuttle.platform.engine.sharded_state import saved_parameters
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.weights_digest import verified_digest
from domainshuttle.platform.run.weights_origin import WeightsOrigin


@dataclass(frozen=True)
class Network:
    """A network's folder of weights, and the segment that trained them; None: as its expert begins."""

    folder: Path
    segment: Segment | None


@dataclass(frozen=True)
class Networks:
    """The networks of a pipeline, the one for high noise first, and the time that divides two of them."""

    networks: tuple[Network, ...]
    boundary: float | None = None

    @property
    def folders(self) -> list[Path]:
        return [one.folder for one in self.networks]


def chosen_segments(run: Run, stage: str | None, checkpoint: str | None) -> tuple[str, list[Segment]]:
    """The name of what is asked for, and the segments whose weights it has, the one for high noise first: of the last
    stage, or of the named one, of which every segment is finished; of a checkpoint none, as it has a network of its
    own. Raises ConfigError where no such stage is finished or there is none, and for both at once."""
    if stage and checkpoint:
        raise ConfigError("--stage and --checkpoint: a checkpoint is of one stage, so give one of the two")
    if checkpoint:
        return checkpoint, []
    run.choose(stage)
    for section in reversed(run.config.stages):
        segments = stage_segments(run, section.name)
        if stage in (None, section.name) and all(segment.finished for segment in segments):
            return section.name, segments
    which = f"stage {stage!r}" if stage else "any stage"
    raise ConfigError(
        f"run {run.config.name!r} has not finished {which}; see domainshuttle status {shlex.quote(str(run.folder))}"
    )


def stage_segments(run: Run, stage: str) -> list[Segment]:
    """A stage's segments as a pipeline has their networks: the one for high noise first."""
    return sorted((one for one in run.segments() if one.stage.name == stage), key=lambda one: -one.flow.low)


def finished_networks(run: Run, segments: list[Segment], averaged: bool) -> Networks:
    """Those of a finished stage's segments; of the moving averages where they were kept, and `averaged` asks for them.

    Raises ConfigError for more than two, and ChangedError for weights that were changed since they were made.
    """
    if len(segments) > 2:
        raise ConfigError(f"{len(segments)} experts: a pipeline holds two at most")
    found = []
    for segment in segments:
        average = segment.averaged_weights
        folder = average if averaged and average.exists() else segment.weights
        verified_digest(folder, run.fingerprints)
        found.append(Network(folder, segment))
    return Networks(tuple(found), segments[0].flow.low if len(segments) == 2 else None)


def checkpoint_networks(run: Run, name: str, work: Path, averaged: bool) -> tuple[Networks, Segment]:
    """Those of a checkpoint, whose own network is put together in the folder `work`; and its segment.

    Raises CheckpointError for a checkpoint that is not whole, and ConfigError where its frozen weights are not there.
    """
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

            write_shards(work, order, value, MAX_SHARD_BYTES)
            if own:
                adapters.save(work / LORA_FOLDER)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {name} can't be exported: {one_line(error)}") from error
    finally:
        store.release(checkpoint)
    design.outline.save_config(work)
    return networks_beside(run, segment, work, resolve_all(run) if run.config.experts else {}), segment


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


def networks_beside(run: Run, segment: Segment, weights: Path, origins: Mapping[str, WeightsOrigin]) -> Networks:
    """A segment's network with the folder `weights`, and the other expert's where there are two.

    `origins` is what each segment of the run begins with. The other expert takes part as it is: with its newest
    finished stage's weights or, before it has one, with those that it begins with, which are written beside the samples
    once. Raises ChangedError where they are not those that were trained.
    """
    others = [other for other in run.segments() if other.expert not in (None, segment.expert)]
    if len({other.expert for other in others}) != 1:
        return Networks((Network(weights, segment),))
    partner = next((other for other in reversed(others) if other.finished), None)
    if partner is None:
        folder = _begun_with(run, others[0], origins[others[0].name])
    else:
        folder = partner.averaged_weights if partner.averaged_weights.exists() else partner.weights
        verified_digest(folder, run.fingerprints)
    by_low = {segment.flow.low: Network(weights, segment), others[0].flow.low: Network(folder, partner)}
    return Networks(tuple(by_low[low] for low in sorted(by_low, reverse=True)), max(by_low))


def _begun_with(run: Run, segment: Segment, origin: WeightsOrigin) -> Path:
    """The weights that a segment begins with, as a folder of ours; it appears whole or not at all, and is made anew
    where it has those of another origin."""
    folder = run.folder / "samples" / f"begins-{segment.name}"
    identity = origin.identified(run.fingerprints).identity
    noted = folder / _ORIGIN_NAME
    if not noted.exists() or noted.read_text() != identity:
        design = blueprint(run.config.model_of(segment.expert), origin)
        dtype = torch.bfloat16 if run.config.engine.precision == "bf16" else torch.float32
        order = [(name, tuple(p.shape), dtype) for name, p in design.outline.named_parameters()]
        stream = design.weights()
        with atomic_folder(folder) as aside:
            write_shards(aside, order, lambda _: next(stream)[1].to(dtype), MAX_SHARD_BYTES)
            design.outline.save_config(aside)
            (aside / _ORIGIN_NAME).write_text(identity)
    return folder


_ORIGIN_NAME = "origin.txt"
"""The identity of the weights that a copy of them was made of."""
