"""Encoding: raw shards become encoded shards (latents and text features) on a pool of Ray Data actors.

The plan of the work, not the pictures, goes through Ray: an actor holds the encoders, takes the rows of a unit
(`units`), reads those samples from their shards itself, and writes the encoded shards itself, on a disk or in a store.
So nothing large passes the object store. What was encoded before and is still right is copied. Samples that can't be
decoded or fitted go to the quarantine table with their reason.
"""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import ray
import ray.data
from ray import cloudpickle
from ray.exceptions import RayTaskError
from torch import Tensor

from domainshuttle.model.encoder_sources import encoder_files, files_digest, tiling_rule
from domainshuttle.pipelines.encoding.actor import EncodingActor, Task
from domainshuttle.pipelines.encoding.sample_encoder import SampleEncoder, load_encoders
from domainshuttle.pipelines.encoding.target import Encoded, EncodingJob, Target
from domainshuttle.pipelines.encoding.throughput import Throughput
from domainshuttle.pipelines.encoding.units import Recipe
from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.selection import CAPTIONED, uncaptioned
from domainshuttle.pipelines.index.table import read_metadata
from domainshuttle.pipelines.media.decode import TRANSFORM
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.pipelines.quarantine import MOST_BAD_IN_CORPUS
from domainshuttle.pipelines.values import ActorPool


def encode(
    jobs: Sequence[EncodingJob],
    sources: EncoderSources,
    progress: Callable[..., None],
    pool: ActorPool | None = None,
    samples_per_part: int = 64,
    shard_bytes: int = 1 << 30,
    overwrite: bool = False,
    most_bad: float = MOST_BAD_IN_CORPUS,
    grows: bool = False,
) -> list[Encoded]:
    """Encodes what is missing of some corpora on the Ray cluster that is connected, with one pool of actors.

    `progress` is told of samples done, of all, and a note on the throughput. `grows`: the pool takes more actors than
    `pool` says where the cluster gets room for them. Raises DataError for samples without a caption, for encoders that
    can't be loaded, where a whole corpus, or much of it, would be removed unless it is to be (`overwrite`), and, when
    all others have their indexes, for those of which more than `most_bad` of the samples are bad. Raises StorageError
    where a store or a node fails.
    """
    for job in jobs:
        _require_captions(job)
    pool = pool or ActorPool(actors=2)
    device, threads = "cuda" if pool.gpus else "cpu", max(1, int(pool.cpus))
    describe = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus)(_describe_encoders)
    try:
        encoders, empty_caption = ray.get(describe.remote(sources, device))
    except RayTaskError as error:
        if isinstance(error.cause, OSError | ValueError):  # not there, or no encoder
            raise DataError(f"the encoders can't be loaded: {error.cause}") from error
        raise
    identity = encoders | {"transform": TRANSFORM}
    targets = []
    for job in jobs:
        recipe = Recipe(identity, read_metadata(job.raw.index).fps)
        targets.append(Target(job, recipe, samples_per_part, shard_bytes))
    for target in targets:
        if not overwrite:
            target.require_wanted()
    for target in targets:
        target.remove_useless()
    tasks = [task for number, target in enumerate(targets) for task in target.tasks(number, shard_bytes)]
    work = [Counter[str]() for _ in jobs]
    speeds = [Throughput(actors=0, cpus=pool.cpus, gpus=pool.gpus, threads=threads) for _ in jobs]
    if tasks:
        total = sum(len(target.raw) for target in targets)
        actors = min(pool.actors, len(tasks))
        for speed in speeds:
            speed.actors = actors
        try:
            _run(tasks, encoders, sources, pool, actors, len(tasks) if grows else actors, total, work, speeds, progress)
        finally:  # also of a part that was encoded before it was stopped
            for target, speed in zip(targets, speeds, strict=True):
                if speed.samples:
                    speed.save(target.folder)
    finished, faults = [], []
    for target, own, speed in zip(targets, work, speeds, strict=True):
        try:
            finished.append(target.finish(empty_caption, most_bad, own, speed))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("; ".join(faults))
    return finished


def _describe_encoders(sources: EncoderSources, device: str) -> tuple[dict[str, str], Tensor]:
    """What both encoders call themselves, digests of their files, and the empty caption's bf16 states [l,d]. A task
    with an actor's resources, since the driver may have no room for UMT5-XXL."""
    video, text = load_encoders(sources, device)
    named = [(kind, encoder_files(source, kind)) for kind, source in sources.by_kind]
    files = {f"{kind}_files": files_digest(found) for kind, found in named if found}
    tiles = tiling_rule(sources.video, sources.tile_above)
    described = {"video": video.identity, "text": text.identity, **files, **({"tiles": tiles} if tiles else {})}
    return described, SampleEncoder(video, text).caption("")


def _require_captions(job: EncodingJob) -> None:
    """Raises DataError where samples that are to be encoded have no caption, or the filter is a mistake."""
    if not (mute := uncaptioned(job.raw.index, job.where, known=True)):
        return
    where = f"({job.where}) and {CAPTIONED}" if job.where else CAPTIONED
    raise DataError(
        f"corpus {job.raw.name!r}: {mute} of its samples {'has' if mute == 1 else 'have'} no caption, and training "
        "learns from captions. Let a model write them: domainshuttle data label CONFIG with labels.labeller=endpoint "
        "or transformers "
        f"(docs/datasets.md). Or leave them out: domainshuttle data encode CONFIG --where {shlex.quote(where)}"
    )


def _run(
    tasks: Sequence[Task],
    encoders: Mapping[str, str],
    sources: EncoderSources,
    pool: ActorPool,
    actors: int,
    most: int,
    total: int,
    work: list[Counter[str]],
    speeds: list[Throughput],
    progress: Callable[..., None],
) -> None:
    """Hands the tasks to actors and counts what they tell."""
    done, whole = total - sum(len(task.rows) for task in tasks), Throughput(threads=speeds[0].threads)
    # one block a unit, so that any actor can take the next one
    blocks = [pa.table({"task": pa.array([cloudpickle.dumps(task)], pa.binary())}) for task in tasks]
    told = ray.data.from_arrow(blocks).map_batches(
        EncodingActor,
        fn_constructor_args=(dict(encoders), sources, "cuda" if pool.gpus else "cpu", speeds[0].threads),
        batch_size=1,
        # of one that finds no room at once the others do not wait
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=actors, max_size=most),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    told.context.target_max_block_size = 1  # what an actor tells is heard at once
    for batch in told.iter_batches(batch_size=1, batch_format="numpy"):
        said = json.loads(str(batch["told"][0]))
        if fault := said.get("fault"):
            if "of_machine" in said:
                raise StorageError(f"encoding failed {fault}; what is finished stays: run the command again")
            raise DataError(fault)
        done += said["done"]
        if "busy" in said:
            work[said["job"]].update({name: said[name] for name in ("encoded", "captions", "copied")})
            for speed in (whole, speeds[said["job"]]):
                if said["encoded"]:
                    speed.add(said["encoded"], said["bytes"], said["busy"], said["seconds"])
        progress(done, total, whole.note())
