"""When clips are made while a run trains, and by which process."""

import gc
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from domainshuttle.pipelines.errors import one_line
from domainshuttle.platform.config.schema import RunConfig, SamplingSection
from domainshuttle.platform.generation.training_samples import OVER_STEPS_NAME, generate_samples, required_sampling
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.weights_origin import WeightsOrigin
from domainshuttle.platform.tracking.outbox import BackgroundLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Flight:
    """A generation on another process."""

    step: int
    task: Any
    deadline: float


class Sampler:
    """The samples of a segment. All ranks have one and call `after` at every step; only rank 0's has a log."""

    def __init__(
        self, run: Run, segment: Segment, log: BackgroundLog | None, origins: Mapping[str, WeightsOrigin]
    ) -> None:
        self._run, self.config, self.segment, self._log, self._origins = run, run.config, segment, log, origins
        self.folder = run.folder / "samples" / segment.name
        self.skipped = self.failed = 0
        self._flight: _Flight | None = None
        self._looked = 0.0
        if log is not None:
            for stale in self.folder.glob(".*"):  # of an attempt that was killed
                shutil.rmtree(stale, ignore_errors=True)

    def after(self, step: int, export: Callable[[Path], None]) -> None:
        """All ranks, after each step: `export` writes the whole weights into a folder, together on all ranks."""
        self.poll()
        if not self.due(step):
            return
        try:
            export(self.snapshot_folder(step))
        except OSError as error:  # on all ranks, such as a full disk
            if self._log is not None:
                self._ended(step, error)
            return
        self.start(step)

    def due(self, step: int) -> bool:
        """Whether a snapshot of this step is wanted: rank 0 decides for all, so all must ask.

        Not while another generation is under way (such a step is skipped and counted), nor for a step whose samples an
        earlier attempt has made.
        """
        section = self.config.sampling
        if section is None or (step % section.every and step != self.segment.stage.duration.planned_steps):
            return False
        wanted = [self._log is not None and self._wanted(step)]
        dist.broadcast_object_list(wanted)
        return wanted[0]

    def _wanted(self, step: int) -> bool:
        if step == self.segment.stage.duration.planned_steps:
            self.finish()  # the last samples are the ones to compare
        self.poll(at_once=True)
        if self._out(step).exists():
            self._track(step)
            return False
        if self._flight is not None:
            self.skipped += 1
            self._tag({"samples.skipped": f"{self.skipped}, the last at step {step}: sampling was still under way"})
            return False
        return True

    def snapshot_folder(self, step: int) -> Path:
        """Where the snapshot of a step goes; it is removed when its samples are made."""
        return self.folder / f".snapshot-{step:06d}"

    def _out(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def start(self, step: int) -> None:
        """On rank 0: generates from the snapshot, on another process if resources are free, else here and now."""
        section = self.config.sampling
        if self._log is None or section is None:
            return
        try:
            if _free(section):
                task = ray.remote(_sample_elsewhere).options(
                    num_cpus=section.cpus,
                    num_gpus=section.gpus,
                    max_retries=0,
                    scheduling_strategy="DEFAULT",  # not within the workers' own placement group
                    name=f"samples of {self.segment.name}, step {step}",
                )
                arguments = self.segment.name, str(self.snapshot_folder(step)), str(self._out(step))
                found = task.remote(self.config.model_dump(mode="json"), *arguments, self._origins)
                self._flight = _Flight(step, found, time.monotonic() + section.timeout)
                return
            self._sample_here(step, section)
        except Exception as error:  # whatever went wrong, the training goes on
            self._ended(step, error)
        else:
            self._ended(step, None)

    def _sample_here(self, step: int, section: SamplingSection) -> None:
        on_gpu = torch.cuda.is_available()
        device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
        try:
            with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
                arguments = self.segment.name, self.snapshot_folder(step), self._out(step)
                generate_samples(self.config, *arguments, device, section.timeout, self._origins)
                _measure(self.config, self._out(step), device)
        finally:
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()

    def poll(self, at_once: bool = False) -> None:
        """On rank 0: takes the result of a generation that has ended, or gives one up; looks about once a second."""
        if self._flight is None or (not at_once and time.monotonic() - self._looked < _LOOK_SECONDS):
            return
        self._looked = time.monotonic()
        self._settle(self._flight, 0.0)

    def finish(self, timeout: float | None = None) -> None:
        """On rank 0: waits for a generation that is under way, at most its own time or `timeout` seconds."""
        if self._flight is not None:
            left = max(0.0, self._flight.deadline - time.monotonic())
            self._settle(self._flight, left if timeout is None else min(left, timeout), last=True)

    def _settle(self, flight: _Flight, wait: float, last: bool = False) -> None:
        error: Exception | None = None
        try:
            if ray.wait([flight.task], timeout=wait)[0]:
                ray.get(flight.task)
            elif last or time.monotonic() > flight.deadline:
                ray.cancel(flight.task, force=True)
                error = TimeoutError("timed out: not finished, or no resources for it, within sampling.timeout")
            else:
                return
        except Exception as raised:  # of the task, or of Ray
            error = getattr(raised, "cause", None) or raised
        self._flight = None
        self._ended(flight.step, error)

    def _ended(self, step: int, error: Exception | None) -> None:
        shutil.rmtree(self.snapshot_folder(step), ignore_errors=True)
        if error is None:
            self._track(step)
            return
        self.failed += 1
        text = f"{self.failed}, the last at step {step}: {type(error).__name__}: {one_line(error)}"
        logger.warning("samples failed: %s", text)
        self._tag({"samples.failed": text})

    def _track(self, step: int) -> None:
        assert self._log is not None
        self._log.artifact(self._out(step), f"samples/{self._out(step).name}")
        self._log.artifact(self.folder / OVER_STEPS_NAME, "samples")
        if required_sampling(self.config).metrics is not None:
            from domainshuttle.platform.evaluation.training_metrics import read_metrics

            if values := read_metrics(self._out(step)):
                self._log.log(step, values)
                self._run.note_scores(self.segment.name, step, values)
        # references, what is generated and the real clip, side by side
        self._log.picture(self._out(step) / "grid.png", f"newest_samples/{self.segment.name}", step)

    def _tag(self, tags: dict[str, str]) -> None:
        assert self._log is not None
        self._log.tag(tags)


_LOOK_SECONDS = 1.0


def _free(section: SamplingSection) -> bool:
    free = ray.available_resources() if ray.is_initialized() else {}
    return free.get("CPU", 0.0) >= section.cpus and free.get("GPU", 0.0) >= section.gpus and bool(free)


def _sample_elsewhere(
    config: dict[str, Any], segment: str, weights: str, out: str, origins: Mapping[str, WeightsOrigin]
) -> None:
    """The Ray task."""
    settings = RunConfig.model_validate(config)
    section = required_sampling(settings)
    torch.set_num_threads(max(1, int(section.cpus)))
    device = "cuda" if section.gpus else "cpu"
    generate_samples(settings, segment, Path(weights), Path(out), device, section.timeout, origins)
    _measure(settings, Path(out), device)


def _measure(config: RunConfig, out: Path, device: str) -> None:
    """Measures the samples of a step, where the configuration names metrics for them."""
    if required_sampling(config).metrics is not None:
        from domainshuttle.platform.evaluation.training_metrics import measure_samples

        measure_samples(config, out, device, out.parent.parent / "measured")
