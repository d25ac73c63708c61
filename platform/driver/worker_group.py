"""A fit: Ray Train's workers for one segment, started again after faults, until they end for good."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import ray.data
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import CheckpointConfig, ScalingConfig
from ray.train.v2.api.config import RunConfig as RayRunConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.platform.checkpoint.store import Checkpoint
from domainshuttle.platform.driver.planned_data import PlannedData
from domainshuttle.platform.driver.restarts import DividingSizes, FailuresInARow, failed_start, final_error
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import FAILED, WAITING, Notices
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.segments import Segment

STOP_SECONDS, TELL_SECONDS = 5.0, 120.0
"""How long no worker is at its work before a stop is not waited for, and before people are told."""


class Fit:
    """The workers of a segment, each of which runs `worker` with a job. `start` is what the driver has verified."""

    def __init__(
        self,
        worker: Callable[[dict[str, Any]], None],
        run: Run,
        segment: Segment,
        feed: Feed,
        job: dict[str, Any],
        start: Checkpoint | None,
    ) -> None:
        self._worker, self._run, self._segment, self._feed = worker, run, segment, feed
        self._job, self._start = job, start
        self._notices, self._ledger = Notices(run.notices_path), Ledger(run.ledger_path)
        self.left = False
        """Whether it was left because a stop was asked for while there were no workers that could agree on one."""

    def running(self) -> Iterator[None]:
        """Runs the workers, and yields about twice a second and once at their end. Raises what ended them for good.

        A start at which workers die is made again, `cluster.max_failures` times in a row.
        """
        failed_starts, begun = 0, self._ledger.summary().attempts
        while True:
            try:
                yield from self._fitted()
                return
            except TrainingFailedError as error:
                reason = failed_start(error)
                if self._ledger.summary().attempts > begun:  # others began to train in between
                    failed_starts, begun = 0, self._ledger.summary().attempts
                failed_starts += 1
                most = self._run.config.cluster.max_failures
                if reason is None or failed_starts > most:
                    raise final_error(error) or error from error
            text = " ".join(str(reason).split())[:200]
            self._notices.add(
                self._segment.name,
                FAILED,
                f"Stage {self._segment.name}: a worker failed while they started ({type(reason).__name__}: {text}); "
                f"they start again. Failed start {failed_starts} in a row, at most {most}",
            )

    def _fitted(self) -> Iterator[None]:
        """The same, with one controller of Ray's."""
        trainer = self._trainer()
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failure.append(error)

        # In a thread, so that a signal reaches the driver, which asks the workers for a checkpoint, and not Ray's
        # handler, which would abort them.
        thread = threading.Thread(target=fit, name="fit", daemon=True)
        thread.start()
        worked, told = time.monotonic(), False
        while thread.is_alive():
            thread.join(0.5)
            yield
            if self._ledger.last_line() is not None:
                worked, told = time.monotonic(), False
            idle = time.monotonic() - worked
            if idle > STOP_SECONDS and self._run.stop_path.exists():
                self.left = True
                return
            if idle > TELL_SECONDS and not told:
                told = True
                self._notices.add(self._segment.name, WAITING, self._waiting())
        yield
        if failure:
            raise failure[0]

    def _waiting(self) -> str:
        cluster = self._run.config.cluster
        free = ray.available_resources()
        return (
            f"Stage {self._segment.name}: waiting for {cluster.least_workers} workers, each with "
            f"{cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker} GPUs; the cluster has "
            f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs free"
        )

    def _trainer(self) -> "_Trainer":
        run, segment, cluster = self._run, self._segment, self._run.config.cluster
        sizes = run.config.worker_sizes(segment.stage)
        trainer = _Trainer(
            self._worker,
            train_loop_config={
                **self._job,
                "config": run.config.model_dump(mode="json"),
                "segment": segment.name,
                "start": {"command": psutil.Process().create_time(), "asked": time.time()},
            },
            datasets={"plan": ray.data.range(1)},
            dataset_config=PlannedData(run, segment, self._feed, self._start),
            torch_config=TorchConfig(
                backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=int(run.config.patience)
            ),
            scaling_config=ScalingConfig(
                num_workers=cluster.workers if isinstance(cluster.workers, int) else (sizes[0], sizes[-1]),
                elastic_resize_monitor_interval_s=cluster.resize_seconds,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker={"CPU": cluster.cpus_per_worker}
                | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
            ),
            run_config=RayRunConfig(
                # Ray's own bookkeeping of this start; ours is the run's folder
                name=f"{run.config.name}-{segment.name}-{time.time_ns()}",
                storage_path=str(run.folder / "ray"),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        trainer.failures = FailuresInARow(run, segment.name, cluster.max_failures)
        trainer.sizes = sizes
        return trainer


class _Trainer(TorchTrainer):
    """Ray's, with our decisions about failures and sizes, which it has no public way to take."""

    failures: FailuresInARow
    sizes: list[int]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = self.failures
        if isinstance(self.scaling_config.num_workers, tuple):
            arguments["scaling_policy"] = DividingSizes(self.scaling_config, self.sizes)
        return super()._initialize_and_run_controller(**arguments)
