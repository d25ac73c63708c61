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
from ray.train.v2.torch.torch_trainer import TorchTrainer

from domainshuttle.pipelines.feed import Feed
from domainshuttle.platform.checkpoint import Checkpoint
from domainshuttle.platform.planned_data import PlannedData
from domainshuttle.platform.policies import DividingSizes, FailuresInARow, final_error
from domainshuttle.platform.schedule import Run, Segment


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
        cluster = run.config.cluster
        self._run, self._segment = run, segment
        sizes = run.config.worker_sizes(segment.stage)
        self._trainer = _Trainer(
            worker,
            train_loop_config={
                **job,
                "config": run.config.model_dump(mode="json"),
                "segment": segment.name,
                "start": {"command": psutil.Process().create_time(), "asked": time.time()},
            },
            datasets={"plan": ray.data.range(1)},
            dataset_config=PlannedData(run, segment, feed, start),
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
        self._trainer.failures = FailuresInARow(run, segment.name, cluster.max_failures)
        self._trainer.sizes = sizes

    def running(self) -> Iterator[None]:
        """Runs the workers, and yields about twice a second and once at their end. Raises what ended them for good."""
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                self._trainer.fit()
            except BaseException as error:
                failure.append(error)

        # In a thread, so that a signal reaches the driver, which asks the workers for a checkpoint, and not Ray's
        # handler, which would abort them.
        thread = threading.Thread(target=fit, name="fit", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
            yield
        yield
        if failure:
            raise final_error(failure[0]) or failure[0]


class _Trainer(TorchTrainer):
    """Ray's, with our decisions about failures and sizes, which it has no public way to take."""

    failures: FailuresInARow
    sizes: list[int]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = self.failures
        if isinstance(self.scaling_config.num_workers, tuple):
            arguments["scaling_policy"] = DividingSizes(self.scaling_config, self.sizes)
        return super()._initialize_and_run_controller(**arguments)
