"""A worker group: Ray Train's workers for the rest of a schedule, from their start to their end, whatever ends them.

Ray Train restarts nothing (`max_failures=0`): the driver does (schedule_loop.py).
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from domainshuttle.pipelines.errors import counted
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.driver.group_size import free_text
from domainshuttle.platform.driver.process_group import ProcessGroup, free_room
from domainshuttle.platform.engine.lean_imports import without
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.segments import SegmentEnd, WorkerJob
from domainshuttle.platform.run.workers import WorkerSign
from domainshuttle.platform.tracking.outbox import system_metrics

# Ray's annotations are those of its version 1
_NO_RESTARTS: dict[str, Any] = {"controller_failure_limit": 0, "max_preemption_failures": 0}

STOP_SECONDS = 5.0
"""How long no worker is at its work before a stop is not waited for."""


def _work(config: dict[str, WorkerJob]) -> SegmentEnd:
    job, context = config["job"], ray.train.get_context()
    run, node = Run(RunConfig.model_validate(job.config)), ray.get_runtime_context().get_node_id()
    rank, size, node_rank = context.get_world_rank(), context.get_world_size(), context.get_node_rank()
    measure = system_metrics if context.get_local_rank() == 0 else None
    with WorkerSign(run, job.attempt, rank, size, node, node_rank, measure) as sign:
        # imported by the workers alone: torch, DeepSpeed and the model take seconds. Schedulers of diffusers and losses
        # of transformers, which nobody uses here, would load scipy.
        with without("scipy"):
            from domainshuttle.platform.engine.zero3 import import_deepspeed
            from domainshuttle.platform.train import train_schedule

        import_deepspeed()
        return train_schedule(run, job, sign)


def ray_trainer(
    config: RunConfig,
    work: Callable[[dict[str, Any]], Any],
    given: dict[str, Any],
    size: int,
    name: str,
    storage: Path,
    room: Path,
    timeout_seconds: float,
) -> DataParallelTrainer:
    """`size` workers of Ray Train, each with what the configuration gives a worker, that do `work(given)` in one
    process group and are not restarted by Ray. `storage` is for Ray's own bookkeeping, `room` for the process group's
    (`free_room`), and `timeout_seconds` bound a collective."""
    cluster = config.cluster
    return DataParallelTrainer(
        work,
        train_loop_config=given,
        backend_config=ProcessGroup(
            "nccl" if cluster.gpus_per_worker else "gloo", timeout_seconds=int(timeout_seconds), room=str(room)
        ),
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=config.worker_resources(),
            label_selector=cluster.node_labels or None,  # type: ignore[call-arg]  # of Ray Train's version 2
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=0, **_NO_RESTARTS),
        ),
    )


class WorkerGroup:
    """One start of the workers. `running` follows them; then `end` or `error` says how they ended, or neither when a
    stop was asked for while there was nobody who could agree on it."""

    def __init__(self, run: Run, job: WorkerJob, size: int) -> None:
        self.size = size
        self.end: SegmentEnd | None = None
        self.error: BaseException | None = None
        self.idle_seconds = 0.0
        """How long no worker has been at its work; exactly 0 while workers are."""
        self._run, self._ledger = run, Ledger(run.ledger_path)
        storage = run.folder / "ray"
        storage.mkdir(exist_ok=True)
        self._room = storage / f"room-{job.attempt:04d}"
        self._trainer = ray_trainer(
            run.config,
            _work,
            {"job": job},
            size,
            name=f"{run.config.name}-{time.time_ns()}",
            storage=storage,
            room=self._room,
            timeout_seconds=run.config.grace_seconds,
        )

    def running(self) -> Iterator[None]:
        """Runs the workers, and yields about twice a second and once at their end."""
        # In a thread, so that a signal reaches the driver, which asks the workers for a checkpoint, and not Ray's
        # handler, which would abort them.
        thread = threading.Thread(target=self._fit, name="fit", daemon=True)
        thread.start()
        worked = time.monotonic()
        while thread.is_alive():
            thread.join(0.5)
            now = time.monotonic()
            if self._ledger.last_line() is not None:
                worked = now
            self.idle_seconds = now - worked
            yield
            if self.idle_seconds > STOP_SECONDS and self._run.stop_path.exists():
                return
        yield

    def _fit(self) -> None:
        try:
            self.end = self._trainer.fit().return_value  # type: ignore[attr-defined]
        except BaseException as error:
            self.error = error
        finally:
            free_room(self._room)

    def waits_for(self) -> str:
        """What the workers need that is not there, for people."""
        return f"waiting for room for {counted(self.size, 'worker')}, {free_text(self._run.config)}"
