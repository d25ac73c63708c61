"""The recipe: how a segment is trained, read from top to bottom.

`train` runs a schedule on the driver; for each segment Ray Train starts workers that run `train_segment`. Where a
worker begins is decided once per start of the worker group, in `PlannedData.configure`: the newest whole checkpoint
gives the weights and, because the data order is a pure function of the step, the data.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import ray
import ray.data
import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointConfig, DataConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from domainshuttle.model.flow import FlowConfig
from domainshuttle.model.objective import training_loss
from domainshuttle.pipelines.index import Index
from domainshuttle.pipelines.loader import Feed, Loader, plan_dataset
from domainshuttle.pipelines.parts import INDEX_NAME
from domainshuttle.platform.account import Account
from domainshuttle.platform.build import build_model
from domainshuttle.platform.checkpoint import Checkpoint, CheckpointStore, TrainingState, read_checkpoint
from domainshuttle.platform.config import RunConfig
from domainshuttle.platform.engine import Engine, frozen_copy, select_trained
from domainshuttle.platform.ledger import Ledger
from domainshuttle.platform.schedule import DIGEST_NAME, Run, Segment, folder_digest, weights_identity
from domainshuttle.platform.tracking import RunIds, Tracker

Outcome = Literal["finished", "stopped"]


@dataclass(frozen=True)
class Shard:
    """What a rank is given at a start of the worker group: its micro-batches, and where they begin."""

    iterator: ray.data.DataIterator | None
    """None when all steps are done and only the weights are missing."""
    first_step: int
    checkpoint: str | None


def train_segment(job: dict[str, Any]) -> None:
    """The worker: trains one segment from where its shard says to its end, or until a stop is requested."""
    began = time.time()
    config = RunConfig.model_validate(job["config"])
    run = Run(config)
    segment = run.segment(job["segment"])
    stage = segment.stage
    shard: Shard = ray.train.get_dataset_shard("plan")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    account = Account(run, segment, job["mlflow"], shard.first_step, began)
    step = shard.first_step
    try:
        # Build
        model = build_model(config.model, segment.origin, segment.seed)
        select_trained(model, stage.trained)
        feed = make_feed(config, segment)
        loader = Loader(shard.iterator, feed, rank, world_size, run.quarantine_path(segment.name, rank))
        snapshot = None
        if stage.loss.cross_pair_weight and stage.loss.cross_pair_target == "snapshot":
            snapshot = frozen_copy(build_model(config.model, segment.origin, segment.seed), config.engine)
        engine = Engine(model, stage, config.engine, loader.accumulation)
        flow = FlowConfig(**stage.flow.model_dump())
        store = CheckpointStore(run.checkpoints)
        base = weights_identity(segment.origin, segment.seed)

        # Restore
        if shard.checkpoint:
            saved = read_checkpoint(Path(shard.checkpoint), checksums=False)
            check_compatible(saved, segment, base, feed, world_size)
            engine.load(saved.folder)

        def save(step: int) -> None:
            with account.measure("checkpointing"):
                state = TrainingState(
                    segment=segment.name,
                    step=step,
                    seed=segment.seed,
                    world_size=world_size,
                    config_digest=config.digest(),
                    plan=feed.plan().state(),
                    ledger=account.ledger_snapshot(),
                    mlflow=run.read_ids() or {},
                    base=base,
                )
                store.save(state, engine.save, config.checkpoint.keep)
            account.checkpointed(step)

        # Train
        account.begin()
        micro_batches = account.waited(iter(loader))
        for step, parts in groupby(micro_batches, key=lambda micro: micro.step):
            for micro in parts:
                loss = training_loss(
                    engine,
                    micro.batch.to(engine.device, engine.dtype),
                    run_seed=segment.seed,
                    step=step,
                    flow=flow,
                    cross_pair_weight=stage.loss.cross_pair_weight,
                    cross_pair_target=stage.loss.cross_pair_target,
                    snapshot_model=snapshot,
                )
                engine.backward(loss.loss)
                account.micro_batch(micro, loss)
            result = engine.step(step)
            account.step(step, result)

            done = step + 1
            stopping = account.stop_requested()
            if stopping or done % config.checkpoint.every == 0 or done == stage.steps:
                save(done)
            if stopping and done < stage.steps:
                account.close(done, "stopped")
                return

        # Hand over to the next segment
        with account.measure("checkpointing"):
            export_weights(engine, segment)
        account.close(stage.steps, "finished")
    except BaseException as error:
        account.close(step, f"{type(error).__name__}: {error}")
        raise


def make_feed(config: RunConfig, segment: Segment) -> Feed:
    """The data of a segment."""
    stage = segment.stage
    return Feed(
        indexes=tuple(str(config.corpus_folder(name, "encoded") / INDEX_NAME) for name in sorted(stage.mixture)),
        mixture=tuple(sorted(stage.mixture.items())),
        seed=segment.seed,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        text_len=config.encoders.text_len,
        references=stage.references,
        reference_dropout=stage.reference_dropout,
        text_dropout=stage.text_dropout,
        paired=stage.loss.cross_pair_weight > 0,
    )


def check_compatible(saved: Checkpoint, segment: Segment, base: str, feed: Feed, world_size: int) -> None:
    """Raises an error that says why a checkpoint does not fit what is about to be trained on it."""
    state = saved.state
    if state.base != base:
        raise RuntimeError(
            f"checkpoint {saved.name} was trained on the weights {state.base}, but segment {segment.name} now begins "
            f"with {base}: restore model.base, or start anew with --fresh"
        )
    if state.world_size != world_size:
        raise RuntimeError(
            f"checkpoint {saved.name} was written by {state.world_size} workers and can't be read by {world_size}: "
            f"set cluster.workers={state.world_size}"
        )
    feed.plan().check(state.plan)


def export_weights(engine: Engine, segment: Segment) -> None:
    """Writes the segment's weights as a diffusers folder; its digest, written last, says that it is whole."""
    engine.export(segment.weights)
    if dist.get_rank() == 0:
        (segment.weights / DIGEST_NAME).write_text(folder_digest(segment.weights))
    dist.barrier()


class PlannedData(DataConfig):
    """Builds the workers' data at every start of the worker group, beginning at the newest whole checkpoint."""

    def __init__(self, run: Run, segment: Segment, feed: Feed) -> None:
        super().__init__()
        self.run, self.segment, self.feed = run, segment, feed

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """One decision for data and weights alike, made here and carried to every rank."""
        newest = CheckpointStore(self.run.checkpoints).newest(self.segment.name)
        first = newest.state.step if newest else 0
        last = self.segment.stage.steps
        iterators = plan_dataset(self.feed, first, last, world_size) if first < last else [None] * world_size
        folder = str(newest.folder) if newest else None
        return [{"plan": Shard(iterator, first, folder)} for iterator in iterators]


def train(run: Run, tracker: Tracker, watch: Callable[[], None], say: Callable[[str], None]) -> Outcome:
    """Trains what is left of a run's schedule; `watch` is called about twice a second while workers run.

    Returns `stopped` when a stop was requested. Raises what ended the workers for good.
    """
    ledger = Ledger(run.ledger_path)
    for segment in run.segments():
        if segment.finished:
            say(f"Stage {segment.name} is finished; its weights are in {segment.weights}")
            continue
        newest = CheckpointStore(run.checkpoints).newest(segment.name, say)
        say(f"Stage {segment.name}: " + (f"goes on after step {newest.state.step}" if newest else "begins"))
        tracker.open_segment(segment.name, params=dataclasses.asdict(SegmentParams.of(segment)))
        feed = make_feed(run.config, segment)
        for corpus, samples in feed.index().summary()["source"].items():
            digest = Index.load(run.config.corpus_folder(corpus, "encoded") / INDEX_NAME).digest
            folder = str(run.config.corpus_folder(corpus, "encoded"))
            tracker.log_dataset(corpus, digest, folder, samples, segment.name)
        run.write_ids(tracker.ids.to_dict())
        _fit(run, segment, feed, tracker.ids, watch)
        ledger.end_open("the workers ended without a last line")
        if not segment.finished:
            return "stopped"
    return "finished"


@dataclass(frozen=True)
class SegmentParams:
    """What MLflow shows as the params of a segment's run."""

    stage: str
    number: int
    steps: int
    global_batch: int
    learning_rate: float
    trained: str
    mixture: str
    cross_pair_weight: float

    @classmethod
    def of(cls, segment: Segment) -> "SegmentParams":
        stage = segment.stage
        return cls(
            stage=stage.name,
            number=segment.number,
            steps=stage.steps,
            global_batch=stage.global_batch,
            learning_rate=stage.learning_rate,
            trained=", ".join(stage.trained),
            mixture=", ".join(f"{name}: {weight:g}" for name, weight in stage.mixture.items()),
            cross_pair_weight=stage.loss.cross_pair_weight,
        )


def _fit(run: Run, segment: Segment, feed: Feed, ids: RunIds, watch: Callable[[], None]) -> None:
    """Starts the workers and waits for their end. Ray restarts them up to `max_failures` times."""
    cluster = run.config.cluster
    trainer = TorchTrainer(
        train_segment,
        train_loop_config={
            "config": run.config.model_dump(mode="json"),
            "segment": segment.name,
            "mlflow": ids.to_dict(),
        },
        datasets={"plan": ray.data.range(1)},
        dataset_config=PlannedData(run, segment, feed),
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker}
            | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        ),
        run_config=RayRunConfig(
            # Ray's own bookkeeping of this start; ours is the run's folder
            name=f"{run.config.name}-{segment.name}-{time.time_ns()}",
            storage_path=str(run.folder / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    # In a thread, so that a signal reaches the driver, which asks the workers for a checkpoint, and not Ray's handler,
    # which would abort them.
    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        watch()
    if failure:
        raise failure[0]
