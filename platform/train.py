"""The recipe: what one worker does, from top to bottom.

Ray Train calls `train_schedule` on every rank, with what the driver decided for this start.
"""

import contextlib
import functools
import time
from itertools import groupby

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.loading.loader import Loader
from domainshuttle.pipelines.loading.reader import MicroBatch
from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.platform.checkpoint.async_writer import AsyncCheckpointer, SavesFailedError, gather_objects
from domainshuttle.platform.checkpoint.resume import require_fit
from domainshuttle.platform.checkpoint.store import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    TrainingState,
    read_checkpoint,
)
from domainshuttle.platform.engine.stage_model import StageModel
from domainshuttle.platform.engine.zero3 import Engine
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import End, Segment, SegmentEnd, StartPoint, WorkerJob
from domainshuttle.platform.run.weights_digest import sizes_digest
from domainshuttle.platform.run.weights_origin import WeightsOrigin
from domainshuttle.platform.run.workers import WorkerSign
from domainshuttle.platform.training.device_memory import memory_error
from domainshuttle.platform.training.end_of_step import Stop, mean_loss
from domainshuttle.platform.training.loss_guard import LossGuard
from domainshuttle.platform.training.mfu import Utilization
from domainshuttle.platform.training.monitor import Monitor
from domainshuttle.platform.training.plan_stream import shared_blocks
from domainshuttle.platform.training.rng_state import random_snapshot, restore_random
from domainshuttle.platform.training.sampler import Sampler


def train_schedule(run: Run, job: WorkerJob, sign: WorkerSign) -> SegmentEnd:
    """The worker: trains segment after segment until one does not finish. Returns how the last one ended."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    for number, start in enumerate(job.starts):
        end = train_segment(run, job, start, sign, first=number == 0)
        if end.kind is not End.FINISHED or end.asked:
            break
    return end


def train_segment(run: Run, job: WorkerJob, start: StartPoint, sign: WorkerSign, first: bool) -> SegmentEnd:
    """Trains one segment from its start point to its end, or until all ranks agree to stop."""
    config, segment = run.config, run.segment(start.segment)
    stage, last_step = segment.stage, segment.last_step
    last_trained = start.last_trained(last_step)
    monitor = Monitor(run, segment, job, start, preempted_nodes, first, sign.profile_wanted)
    sign.follow(monitor.look)
    model = None
    try:
        # Build
        origin = identified_origin(run, job.origins[segment.name])
        feed = make_feed(config, segment, start.order)
        loader = open_loader(run, segment, start, feed)
        model = StageModel(
            config, stage, segment.expert, origin, loader.accumulation, seed=segment.seed, flow=segment.flow
        )
        engine = model.engine
        store = CheckpointStore.of(config)
        checkpoints = open_checkpoints(run, store, engine.checkpoint_bytes(model.parameters.trained_count))
        sampler = Sampler(run, segment, monitor.logger, job.origins)
        monitor.built(
            feed.plan().describe(),
            Utilization(model.network_config, stage.trained, sharing=config.engine.sequence_parallel),
        )

        # Restore
        guard_state = None
        if start.checkpoint:
            saved = read_checkpoint(start.checkpoint, checksums=False)
            require_fit(saved, segment, origin, sizes_digest(model.parameters.trained), feed)
            restore(saved, store, engine)
            guard_state = saved.state.guard
        guard = LossGuard(config.guard, guard_state, start.skipped)

        # Train
        monitor.begin()
        done, stop, state = start.first_step, Stop.NO, None
        for step, parts in groupby(monitor.waited(iter(loader)), key=lambda micro: micro.step):
            if step < start.first_step:
                # nothing is left to train: the restored weights are checked by the step that made them
                *_, micro = parts
                if step == last_trained and not weights_are_good(model, micro, guard):
                    return monitor.close(step, End.DIVERGED)
                continue
            if step in start.skipped:
                agreed = monitor.skipped(step, parts)
            else:
                for micro in parts:
                    loss = model.loss(micro.batch, step)
                    engine.backward(loss.loss)
                    monitor.micro_batch(micro, loss)
                agreed = monitor.agree()
                verdict = guard.judge(agreed.loss)
                result = engine.step(step) if verdict == "good" else engine.drop(step)
                if not result.dropped:
                    guard.applied(agreed.loss)
                else:
                    monitor.dropped(step, verdict if verdict != "good" else "gradients not finite", agreed.loss)
                    if guard.dropped(step) or step == last_trained:
                        end_save(checkpoints, monitor)
                        return monitor.roll_back(step, guard.bad_in_a_row)
                monitor.step(step, result, checkpoints.ended())

            done = step + 1
            # a stage does not end with steps that were bad, or that nothing was trained on: its weights are judged by
            # the samples of its last step
            bad = bool(guard.bad_in_a_row) or step in start.skipped
            stop = Stop.NO if agreed.stop is Stop.DURATION_REACHED and bad else agreed.stop
            # what the last update made of the weights, no later loss would tell
            last = step == last_trained or stop is Stop.DURATION_REACHED
            if last and not weights_are_good(model, micro, guard):
                end_save(checkpoints, monitor)
                return monitor.close(step, End.DIVERGED)
            due = done % config.checkpoint.every == 0 and not guard.bad_in_a_row
            if due or stop or done == last_step:
                with monitor.checkpointing():
                    state = training_state(run, segment, done, feed, model, origin, guard, monitor)
                    save(checkpoints, state, engine)
            if stop:
                break
            with monitor.measure("sampling"):
                sampler.after(done, functools.partial(engine.export, ema=engine.averages))  # what export would take
        end_last_save(checkpoints, monitor, state, engine)
        with monitor.measure("sampling"):
            sampler.finish(0.0 if done < last_step else None)

        # Stop, or hand over to the next segment
        if done < last_step and stop is not Stop.DURATION_REACHED:
            return monitor.close(done, stop.end)
        with monitor.checkpointing():
            export_weights(engine, run, segment, done)
        return monitor.close(done, End.FINISHED, asked=stop.end if stop is not Stop.DURATION_REACHED else None)
    except SavesFailedError as error:
        # no failure to Ray, since another start would meet the same full disk
        return monitor.close(done, End.UNSAVED, str(error))
    except BaseException as error:
        states = model.engine.device_bytes if model is not None else None
        held = run.folder / "memory" / f"attempt-{job.attempt:04d}"
        memory = memory_error(error, config, stage, dist.get_rank(), monitor.at, states, held)
        monitor.fail(memory or error)
        if memory is not None:
            raise memory from error
        raise
    finally:
        if model is not None:
            model.close()


def identified_origin(run: Run, origin: WeightsOrigin) -> WeightsOrigin:
    """The weights that a segment begins with, and their identity: rank 0 reads them, all ranks are told."""
    found = [origin.identified(run.fingerprints) if dist.get_rank() == 0 else origin]
    dist.broadcast_object_list(found)
    return found[0]


def open_loader(run: Run, segment: Segment, start: StartPoint, feed: Feed) -> Loader[TrainingBatch]:
    """This rank's micro-batches from the start point on; all ranks must call. Neighbouring ranks that compute a sample
    together are handed the same, and the first of them lists what could not be read."""
    config, rank, sharing = run.config, dist.get_rank(), run.config.engine.sequence_parallel
    return Loader(
        shared_blocks(feed, start.first_planned(segment.last_step), segment.last_step, config),
        feed,
        rank // sharing,
        dist.get_world_size() // sharing,
        run.quarantine_path(segment.name, rank // sharing * sharing),
        **config.loader.model_dump(),
        device=get_device(),
        converted=run.converted_path(segment.name, rank),
        lists=rank % sharing == 0,
    )


def open_checkpoints(run: Run, store: CheckpointStore, estimated_bytes: int) -> AsyncCheckpointer:
    """What writes this rank's part of checkpoints while training goes on; `estimated_bytes` is of all ranks' parts."""
    return AsyncCheckpointer(
        store,
        run.config.checkpoint,
        dist.get_rank(),
        dist.get_world_size(),
        gather_objects(run.config.grace_seconds),
        ray.train.get_context().get_local_world_size(),
        estimated_bytes=estimated_bytes,
    )


def save(checkpoints: AsyncCheckpointer, state: TrainingState, engine: Engine) -> None:
    """Begins a save of this rank's part; all ranks must call."""
    checkpoints.save(state, engine.snapshot, functools.partial(random_snapshot, dist.get_rank()))


def end_last_save(
    checkpoints: AsyncCheckpointer, monitor: Monitor, state: TrainingState | None, engine: Engine
) -> None:
    """Waits for the save under way, that of `state`. Where it failed no later one makes up for it, and the steps since
    the one before would be lost: it is tried again. All ranks must call.

    Raises SavesFailedError when as many in a row have failed as may.
    """
    while True:
        try:
            with monitor.checkpointing():
                checkpoints.wait()
            return
        except SavesFailedError:
            raise
        except CheckpointError:
            assert state is not None, "without a save there is none that failed"
            with monitor.checkpointing():
                time.sleep(_AGAIN_SECONDS)
                save(checkpoints, state, engine)
        finally:
            monitor.saved(checkpoints.ended())


_AGAIN_SECONDS = 5.0
"""Until a save that failed is tried again: a store that was away, or a disk that was full, may be back."""


def end_save(checkpoints: AsyncCheckpointer, monitor: Monitor) -> None:
    """Lets the save under way end: what it writes may be what the run goes back to. All ranks must call."""
    with contextlib.suppress(CheckpointError), monitor.checkpointing():
        checkpoints.wait()
    monitor.saved(checkpoints.ended())


def restore(saved: Checkpoint, store: CheckpointStore, engine: Engine) -> None:
    """Loads this rank's part of a checkpoint, and its random states; all ranks must call."""
    rank = dist.get_rank()
    as_before = saved.state.world_size == dist.get_world_size()
    folder = store.fetch(saved, {rank} if as_before else None)
    engine.load(folder, own=as_before)
    restore_random(folder, rank)
    dist.barrier()
    store.release(saved)


def training_state(
    run: Run,
    segment: Segment,
    step: int,
    feed: Feed,
    model: StageModel,
    origin: WeightsOrigin,
    guard: LossGuard,
    monitor: Monitor,
) -> TrainingState:
    """What a checkpoint after `step` steps says of the run, beside the tensors."""
    return TrainingState(
        segment=segment.name,
        step=step,
        seed=segment.seed,
        world_size=dist.get_world_size(),
        config_digest=run.config.digest(),
        plan=feed.plan().state(),
        ledger=monitor.ledger_snapshot(),
        mlflow=run.read_ids() or {},
        base=origin.identity,
        loss=guard.median_loss(),
        guard=guard.state(),
        config=run.config.decisive(),
        trained=sizes_digest(model.parameters.trained),
        origin=origin.place,
        finished={other.name: other.last_step for other in run.segments() if other.finished},
        passed_over={other.name: run.skipped(other.name) for other in run.segments()},
    )


def weights_are_good(model: StageModel, micro: MicroBatch[TrainingBatch], guard: LossGuard) -> bool:
    """Whether a segment may end with these weights, by the loss of a micro-batch of each rank; all ranks must call."""
    return guard.judge_weights(mean_loss(model.judged(micro.batch, micro.step)))


def preempted_nodes() -> list[str]:
    """The nodes of the group that are about to go; all ranks ask together."""
    announced = ray.train.get_preemption_info()
    return announced.preempted_node_ids if announced else []


def export_weights(engine: Engine, run: Run, segment: Segment, steps: int) -> None:
    """Writes the segment's weights as a diffusers folder, and their moving average beside them where one is kept."""
    engine.export(segment.weights)
    if engine.averages:
        engine.export(segment.averaged_weights, ema=True)
    if dist.get_rank() == 0:
        segment.finish(steps, run.fingerprints)
    dist.barrier()
