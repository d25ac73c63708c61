"""The recipe: how a segment is trained, read from top to bottom.

`train` runs a schedule on the driver; for each segment Ray Train starts workers that run `train_segment`. Where they
begin is decided once per start of the worker group (planned_data.py).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.flow import FlowConfig
from domainshuttle.model.objective import training_loss
from domainshuttle.pipelines.feed import EncoderSources, Feed
from domainshuttle.pipelines.loader import Loader
from domainshuttle.pipelines.parts import INDEX_NAME
from domainshuttle.pipelines.storage import join
from domainshuttle.platform.account import ROLLED_BACK, UNSAVED, Account, Stop
from domainshuttle.platform.build import blueprint, outline_model
from domainshuttle.platform.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    TrainingState,
    read_checkpoint,
)
from domainshuttle.platform.checkpoint_writer import AsyncCheckpointer, SavesFailedError, gather_objects
from domainshuttle.platform.config import ConfigError, RunConfig, differences
from domainshuttle.platform.engine import Engine, frozen_copy, select_trained
from domainshuttle.platform.fingerprints import sizes_digest, weights_identity
from domainshuttle.platform.fit import Fit
from domainshuttle.platform.guard import LossGuard
from domainshuttle.platform.ledger import ALLOWANCE, Ledger
from domainshuttle.platform.notices import PASSED_OVER, Notices
from domainshuttle.platform.origins import commit_of
from domainshuttle.platform.planned_data import Shard
from domainshuttle.platform.planner import parameter_table
from domainshuttle.platform.randomness import random_snapshot, restore_random
from domainshuttle.platform.resume import AUTO, NONE, adopt_stages, begin, choose_start, require_fit
from domainshuttle.platform.samples import Sampler
from domainshuttle.platform.schedule import Run, Segment
from domainshuttle.platform.tracking import Tracker
from domainshuttle.platform.utilization import Utilization

Outcome = Literal["finished", "stopped", "budget spent"]


class DivergedError(RuntimeError):
    """The loss went wrong again and again, also without the steps that were passed over."""


def train_segment(job: dict[str, Any]) -> None:
    """The worker: trains one segment from where its shard says to its end, or until all ranks agree to stop."""
    config = RunConfig.model_validate(job["config"])
    run = Run(config)
    segment = run.segment(job["segment"])
    stage, base, last_step = segment.stage, job["base"], segment.last_step
    shard: Shard = ray.train.get_dataset_shard("plan")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    account = Account(run, segment, job["mlflow"], shard.first_step, shard.attempt, job["start"], preemption_announced)
    done = shard.first_step
    try:
        # Build
        design = blueprint(config.model_of(segment.expert), segment.origin, segment.seed, job["commit"])
        selected = select_trained(design.outline, stage.trained)
        feed = make_feed(config, segment)
        loader: Loader[TrainingBatch] = Loader(
            shard.blocks,
            feed,
            rank,
            world_size,
            run.quarantine_path(segment.name, rank),
            **config.loader.model_dump(),
            device=get_device(),
        )
        snapshot = None
        if stage.loss.cross_pair_weight and stage.loss.cross_pair_target == "snapshot":
            snapshot = frozen_copy(
                blueprint(config.model_of(segment.expert), segment.origin, segment.seed, job["commit"]), config.engine
            )
        engine = Engine(design, stage, config.engine, loader.accumulation)
        flow = FlowConfig(**segment.flow.model_dump())
        guard = LossGuard(config.guard, passed_over=shard.passed_over)
        store = CheckpointStore.of(config)
        checkpoints = AsyncCheckpointer(
            store,
            config.checkpoint,
            rank,
            world_size,
            gather_objects(config.patience),
            ray.train.get_context().get_local_world_size(),
            estimated_bytes=engine.checkpoint_bytes(selected.trained_count),
        )
        sampler = Sampler(run, segment, account.logger)
        account.built(feed.plan().describe(), Utilization(design.outline.config, stage.trained))

        # Restore
        if shard.checkpoint:
            saved = read_checkpoint(shard.checkpoint, checksums=False)
            require_fit(saved, segment, base, sizes_digest(selected.trained), feed)
            as_before = saved.state.world_size == world_size
            folder = store.fetch(saved, {rank} if as_before else None)
            engine.load(folder, own=as_before)
            restore_random(folder, rank)
            dist.barrier()
            store.release(saved)
            guard = LossGuard(config.guard, saved.state.guard, shard.passed_over)

        def save(step: int) -> None:
            with account.checkpointing():
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
                    loss=guard.usual(),
                    guard=guard.state(),
                    config=config.decisive(),
                    trained=sizes_digest(selected.trained),
                    origin=segment.origin,
                    finished={other.name: other.last_step for other in run.segments() if other.finished},
                    passed_over={other.name: run.passed_over(other.name) for other in run.segments()},
                )
                checkpoints.save(state, engine.snapshot, lambda: random_snapshot(rank))

        # Train
        account.begin()
        for step, parts in groupby(account.waited(iter(loader)), key=lambda micro: micro.step):
            if step in shard.passed_over:
                account.passed_over(step, parts)
                agreed = account.agree()
            else:
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
                agreed = account.agree()
                verdict = guard.judge(agreed.loss)
                result = engine.step(step) if verdict == "good" else engine.drop(step)
                if not result.skipped:
                    guard.applied(agreed.loss)
                else:
                    account.dropped(step, verdict if verdict != "good" else "gradients not finite", agreed.loss)
                    if guard.dropped(step):
                        with contextlib.suppress(CheckpointError):
                            checkpoints.wait()  # what is being written may be what the run goes back to
                        account.roll_back(step, guard.bad_in_a_row)
                        return
                account.step(step, result, checkpoints.ended())

            done = step + 1
            due = done % config.checkpoint.every == 0 and not guard.bad_in_a_row
            if due or agreed.stop or agreed.preempted or done == last_step:
                save(done)
            if agreed.stop:
                break
            with account.measure("sampling"):
                sampler.after(done, functools.partial(engine.export, ema=engine.averages))  # what export would take
        with account.checkpointing():
            checkpoints.wait()
        account.saved(checkpoints.ended())
        with account.measure("sampling"):
            sampler.finish(0.0 if done < last_step else None)

        # Stop, or hand over to the next segment
        if done < last_step and agreed.stop is not Stop.DURATION_REACHED:
            account.close(done, "budget spent" if agreed.stop is Stop.BUDGET_SPENT else "stopped")
            return
        with account.checkpointing():
            export_weights(engine, segment, done)
        account.close(done, "finished")
    except SavesFailedError as error:
        # no failure to Ray, which would start the workers again, into the same full disk
        account.close(done, f"{UNSAVED}{error}")
    except BaseException as error:
        account.close(done, f"{type(error).__name__}: {error}")
        raise


def preemption_announced() -> bool:
    """Whether a node of the group is about to go; all ranks ask together."""
    return ray.train.get_preemption_info() is not None


def make_feed(config: RunConfig, segment: Segment) -> Feed:
    """The data of a segment: encoded corpora, or raw ones that are encoded while they are trained on."""
    stage = segment.stage
    return Feed(
        indexes=tuple(
            join(config.corpus_folder(name, config.trained_form), INDEX_NAME) for name in sorted(stage.mixture)
        ),
        mixture=tuple(stage.weights.items()),
        where=tuple(stage.where.get(name) for name in sorted(stage.mixture)) if stage.where else (),
        seed=segment.seed,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        text_len=config.encoders.text_len,
        references=stage.references,
        reference_dropout=stage.reference_dropout,
        text_dropout=stage.text_dropout,
        paired=stage.loss.cross_pair_weight > 0,
        encoders=EncoderSources(**config.encoders.model_dump(exclude={"live"})) if config.encoders.live else None,
    )


def export_weights(engine: Engine, segment: Segment, steps: int) -> None:
    """Writes the segment's weights as a diffusers folder, and their moving average beside them where one is kept."""
    engine.export(segment.weights)
    if engine.averages:
        engine.export(segment.averaged_weights, ema=True)
    if dist.get_rank() == 0:
        segment.finish(steps)
    dist.barrier()


def train(
    run: Run,
    tracker: Tracker,
    watch: Callable[[], None],
    say: Callable[[Any], None],
    stage: str | None = None,
    resume: str = AUTO,
) -> Outcome:
    """Trains what is left of a run's schedule, or of one stage; `watch` is called about twice a second meanwhile.

    `resume` says where the first unfinished segment starts (resume.py). Raises ConfigError for a stage whose weights to
    begin with are not there yet, CheckpointError, DivergedError, and what ended the workers for good.
    """
    ledger, store, digest = Ledger(run.ledger_path), CheckpointStore.of(run.config), run.config.digest()
    notices = Notices(run.notices_path)
    if (last := ledger.last_line()) is not None:
        heard = max(last, run.heard_from())
        ledger.end_open("its driver died", until=heard + ALLOWANCE)

    def tell(segment: str) -> None:
        """Shows what was noted of a segment, here or by Ray's processes; of checkpoints MLflow keeps it too."""
        for _, kind, text in notices.new():
            say(text)
            if kind == PASSED_OVER:
                tracker.tag({"checkpoints.passed_over": "\n".join(notices.told(segment, kind))}, segment)

    if resume not in (AUTO, NONE):
        adopt_stages(run, store, resume, say)
    for segment in run.choose(stage):
        if segment.finished:
            say(f"Stage {segment.name} is finished; its weights are in {segment.weights}")
            continue
        require_origin(run, segment)
        tracker.open_segment(segment.name, params=dataclasses.asdict(SegmentParams.of(segment)))
        feed = make_feed(run.config, segment)
        commit = commit_of(segment.origin)
        base = weights_identity(segment.origin, segment.seed, run.fingerprints_path, commit)
        selected = select_trained(outline_model(run.config.model_of(segment.expert)), segment.stage.trained)

        def choose(resume: str, segment: Segment = segment) -> Checkpoint | None:
            note = functools.partial(notices.add, segment.name, PASSED_OVER)
            try:
                return choose_start(store, segment.name, resume, digest, note)
            finally:
                tell(segment.name)

        start = choose(resume)
        if start:
            require_fit(start, segment, base, sizes_digest(selected.trained), feed)
            if start.state.config_digest != digest:
                before = start.state.config
                changes = differences(before, run.config.decisive()) if before else "it does not say which"
                say(f"Checkpoint {start.name} was trained with another configuration: {changes}")
        begin(store, segment.name, resume, start, digest)
        if resume != AUTO:
            segment.begin_anew()
        resume = AUTO
        for corpus, source, index_digest, samples in feed.corpora():
            tracker.log_dataset(corpus, index_digest, source, samples, segment.name)
        run.write_ids(tracker.ids.to_dict())
        say(parameter_table({segment.name: selected}))
        while not segment.finished:
            if ledger.summary(run.config.budget_gpu_hours).spent:
                return "budget spent"
            say(f"Stage {segment.name}: " + (f"goes on after step {start.state.step}" if start else "begins"))
            job = {"base": base, "commit": commit, "mlflow": tracker.ids.to_dict()}
            fit = Fit(train_segment, run, segment, feed, job, start)
            for _ in fit.running():
                watch()
                tell(segment.name)
            ledger.end_open("the workers ended without a last line")
            if fit.left:
                return "stopped"
            outcome = run.read_progress().get("state", "")
            if outcome == "budget spent":
                return "budget spent"
            if outcome.startswith(UNSAVED):
                raise CheckpointError(f"stage {segment.name}: {outcome.removeprefix(UNSAVED)}")
            if not segment.finished and outcome != ROLLED_BACK:
                return "stopped"
            if outcome == ROLLED_BACK:
                refuse_to_go_in_circles(run, segment, say)
                start = choose(AUTO)
    return "finished"


def require_origin(run: Run, segment: Segment) -> None:
    """Raises ConfigError when the segment begins with the weights of another that is not finished."""
    for other in run.segments():
        if segment.origin == str(other.weights) and not other.finished:
            raise ConfigError(f"stage {segment.name!r} begins with the weights of {other.name!r}: train that one first")


def refuse_to_go_in_circles(run: Run, segment: Segment, say: Callable[[str], None]) -> None:
    """After a rollback: says what is passed over, or raises DivergedError when there were too many."""
    rollbacks = run.passed_over(segment.name)
    where = run.dropped_path(segment.name, 0).parent
    if len(rollbacks) > run.config.guard.most_rollbacks:
        raise DivergedError(
            f"stage {segment.name} went back to a checkpoint {len(rollbacks)} times, the last time for steps "
            f"{rollbacks[-1]}: look at their samples in {where}, and raise guard.spike_factor or guard.most_rollbacks; "
            "or go on from a checkpoint with a lower learning rate, as a run of its own: --set name=... --set "
            f"stages.{segment.stage.name}.learning_rate=... --resume PATH; domainshuttle checkpoints {run.folder} lists"
            " them"
        )
    say(f"Stage {segment.name} went back: steps {rollbacks[-1]} were bad and are now passed over (samples in {where})")


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
    where: str
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
            mixture=stage.shown_mixture,
            where=", ".join(f"{name}: {text}" for name, text in stage.where.items()),
            cross_pair_weight=stage.loss.cross_pair_weight,
        )
