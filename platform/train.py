"""The recipe: how a segment is trained, read from top to bottom.

`train` runs a schedule on the driver; for each segment Ray Train starts workers that run `train_segment`. Where they
begin is decided once per start of the worker group (planned_data.py).
"""

import contextlib
import functools
from itertools import groupby
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.flow import FlowConfig
from domainshuttle.model.objective import training_loss
from domainshuttle.pipelines.loading.loader import Loader
from domainshuttle.platform.checkpoint.async_writer import AsyncCheckpointer, SavesFailedError, gather_objects
from domainshuttle.platform.checkpoint.resume import require_fit
from domainshuttle.platform.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    TrainingState,
    read_checkpoint,
)
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.engine.initialization import blueprint
from domainshuttle.platform.engine.trained_parameters import select_trained
from domainshuttle.platform.engine.zero3 import Engine, frozen_copy
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import Segment, Shard
from domainshuttle.platform.run.weights_digest import sizes_digest
from domainshuttle.platform.training.loss_guard import LossGuard
from domainshuttle.platform.training.mfu import Utilization
from domainshuttle.platform.training.monitor import UNSAVED, Account, Stop
from domainshuttle.platform.training.rng_state import random_snapshot, restore_random
from domainshuttle.platform.training.sampler import Sampler


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


def export_weights(engine: Engine, segment: Segment, steps: int) -> None:
    """Writes the segment's weights as a diffusers folder, and their moving average beside them where one is kept."""
    engine.export(segment.weights)
    if engine.averages:
        engine.export(segment.averaged_weights, ema=True)
    if dist.get_rank() == 0:
        segment.finish(steps)
    dist.barrier()
