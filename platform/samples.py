"""Samples while a run trains: clips of fixed cases every so many steps, by step in MLflow.

They are made from a snapshot of the whole weights, never by the model that trains: that one is divided over the ranks,
and all of them would have to take part in each of its forwards. All ranks write the snapshot together; then a Ray task
generates from it beside the training or, where the cluster has no resources free, rank 0 does between two steps. A
generation that fails or takes too long is a warning and a tag of the MLflow run, and the training goes on.
"""

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from PIL import Image

from domainshuttle.pipelines.index import Index
from domainshuttle.pipelines.media import encode_mp4
from domainshuttle.pipelines.parts import INDEX_NAME
from domainshuttle.pipelines.storage import join
from domainshuttle.platform.config import RunConfig
from domainshuttle.platform.schedule import Run, Segment
from domainshuttle.platform.sections import SamplingSection
from domainshuttle.platform.spool import BackgroundLog, one_line

if TYPE_CHECKING:
    from domainshuttle.platform.evaluation.cases import Case
    from domainshuttle.platform.evaluation.grid import Column

# What generates is imported by the functions that do: every worker imports this module, and few generate.
logger = logging.getLogger(__name__)

OVER_STEPS_NAME = "over_steps.png"
_MOST_COLUMNS = 12
"""Steps on the picture over steps: the first, the last, and those evenly between."""


def sample_cases(config: RunConfig) -> "list[Case]":
    """The fixed cases; raises ConfigError or DataError for those that are not there."""
    from domainshuttle.platform.evaluation.cases import cases_of_file, load_cases

    section = _required(config)
    if section.cases_file is not None:
        return cases_of_file(Path(section.cases_file))
    assert config.evaluation is not None  # held by the configuration
    folder = config.corpus_folder(config.evaluation.corpus, "raw")
    return load_cases(Index.load(join(folder, INDEX_NAME)), section.cases, spread=True)


def networks_beside(run: Run, segment: Segment, weights: Path) -> tuple[list[Path], float | None]:
    """The folders of the networks to generate with, the one for high noise first, and the time that divides two.

    `weights` are a segment's. Of two experts the other one takes part as it is: with its newest finished stage's
    weights or, before it has one, with those that it begins with, which are written beside the samples once.
    """
    others = [other for other in run.segments() if other.expert not in (None, segment.expert)]
    if len({other.expert for other in others}) != 1:
        return [weights], None
    partner = next((other for other in reversed(others) if other.finished), None)
    if partner is None:
        folder = _begun_with(run, others[0])
    else:
        folder = partner.averaged_weights if partner.averaged_weights.exists() else partner.weights
    by_low = {segment.flow.low: weights, others[0].flow.low: folder}
    return [by_low[low] for low in sorted(by_low, reverse=True)], max(by_low)


def _begun_with(run: Run, segment: Segment) -> Path:
    """The weights that a segment begins with, as a folder of ours; it appears whole or not at all."""
    from domainshuttle.model.convert import MAX_SHARD_BYTES
    from domainshuttle.model.weight_files import write_shards
    from domainshuttle.platform.build import blueprint

    folder = run.folder / "samples" / f"begins-{segment.name}"
    if not folder.exists():
        design = blueprint(run.config.model_of(segment.expert), segment.origin, segment.seed)
        dtype = torch.bfloat16 if run.config.engine.precision == "bf16" else torch.float32
        order = [(name, tuple(p.shape), dtype) for name, p in design.outline.named_parameters()]
        stream, partial = design.weights(), folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_shards(partial, order, lambda _: next(stream)[1].to(dtype), MAX_SHARD_BYTES)
        design.outline.save_config(partial)
        partial.rename(folder)
    return folder


def generate_samples(config: RunConfig, segment: str, weights: Path, out: Path, device: str, timeout: float) -> None:
    """Generates all cases from the folder of a segment's transformer into `out`, which appears whole or not at all.

    It gets grid.png and grid.mp4, and of each case a still and a clip; beside it the picture over steps is drawn again.
    Cases without a target have the size of the stage's largest bucket. Raises TimeoutError after `timeout` seconds.
    """
    from domainshuttle.platform.evaluation.cases import generate_cases
    from domainshuttle.platform.evaluation.grid import GridRow, write_grid
    from domainshuttle.platform.export import assemble_pipeline

    deadline = time.monotonic() + timeout
    cases, sampling = sample_cases(config), config.generation
    run = Run(config)
    stage = run.segment(segment).stage
    pipeline: Any = assemble_pipeline(config, *networks_beside(run, run.segment(segment), weights), device=device)
    pipeline.set_progress_bar_config(disable=True)

    def in_time(_: int) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the samples took more than {timeout:g} s: raise sampling.timeout, or ask for fewer")

    buckets = [bucket for corpus in stage.mixture for bucket in config.corpora[corpus].parsed_buckets]
    largest = max(buckets, key=lambda bucket: bucket.frames * bucket.height * bucket.width)
    rows = []
    for number, case in enumerate(cases):
        size = case.target.shape[:3] if case.target is not None else (largest.frames, largest.height, largest.width)
        # one at a time, as memory grows with each
        seed = config.seed + number
        (clip,) = generate_cases(pipeline, [case], size, sampling.steps, sampling.guidance, seed, in_time)
        rows.append(GridRow(case.caption, case.domain, case.references, clip, case.target))
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_grid(rows, partial, sampling.fps)
    for number, row in enumerate(rows, 1):
        Image.fromarray(row.generated[len(row.generated) // 2]).save(partial / f"case-{number:02d}.png")
        if len(row.generated) > 1:
            (partial / f"case-{number:02d}.mp4").write_bytes(encode_mp4(row.generated, sampling.fps))
    (partial / "cases.json").write_text(json.dumps([[case.key, case.caption, case.domain] for case in cases]))
    partial.rename(out)
    draw_over_steps(out.parent)


def draw_over_steps(folder: Path) -> Path:
    """Draws `over_steps.png` in a segment's folder of samples: a row a case, a column a step.

    Of steps whose cases were others than those of the last one nothing is shown.
    """
    from domainshuttle.platform.evaluation.grid import draw_table

    steps = sorted(path.parent for path in folder.glob("step-*/cases.json"))
    cases = json.loads((steps[-1] / "cases.json").read_text())
    steps = [step for step in steps if json.loads((step / "cases.json").read_text()) == cases]
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(_MOST_COLUMNS, len(steps))).round().astype(int))
    columns: list[Column] = []
    for step in (steps[place] for place in chosen):
        stills = [np.asarray(Image.open(step / f"case-{number:02d}.png")) for number in range(1, len(cases) + 1)]
        columns.append((f"step {int(step.name.removeprefix('step-')):,}", list(stills)))
    first = columns[0][1][0]
    assert first is not None
    page = draw_table([(text, f"domain: {domain}") for _, text, domain in cases], columns, len(first) / len(first[0]))
    picture = folder / OVER_STEPS_NAME
    Image.fromarray(page).save(picture)
    return picture


@dataclass(frozen=True)
class _Flight:
    """A generation on another process."""

    step: int
    task: Any
    deadline: float


class Sampler:
    """The samples of a segment. All ranks have one and call `after` at every step; only rank 0's has a log."""

    def __init__(self, run: Run, segment: Segment, log: BackgroundLog | None) -> None:
        self.config, self.segment, self._log = run.config, segment, log
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
        if section is None or (step % section.every and step != self.segment.stage.steps):
            return False
        wanted = [self._log is not None and self._wanted(step)]
        dist.broadcast_object_list(wanted)
        return wanted[0]

    def _wanted(self, step: int) -> bool:
        if step == self.segment.stage.steps:
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
                found = task.remote(self.config.model_dump(mode="json"), *arguments)
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
                generate_samples(self.config, *arguments, device, section.timeout)
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
                error = TimeoutError("given up: not done, or not begun for want of resources, in time")
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

    def _tag(self, tags: dict[str, str]) -> None:
        assert self._log is not None
        self._log.tag(tags)


_LOOK_SECONDS = 1.0


def _free(section: SamplingSection) -> bool:
    free = ray.available_resources() if ray.is_initialized() else {}
    return free.get("CPU", 0.0) >= section.cpus and free.get("GPU", 0.0) >= section.gpus and bool(free)


def _sample_elsewhere(config: dict[str, Any], segment: str, weights: str, out: str) -> None:
    """The Ray task."""
    settings = RunConfig.model_validate(config)
    section = _required(settings)
    torch.set_num_threads(max(1, int(section.cpus)))
    device = "cuda" if section.gpus else "cpu"
    generate_samples(settings, segment, Path(weights), Path(out), device, section.timeout)


def _required(config: RunConfig) -> SamplingSection:
    if config.sampling is None:
        raise ValueError("this run takes no samples: it has no `sampling`")
    return config.sampling
