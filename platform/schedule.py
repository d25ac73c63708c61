"""The schedule of a run: its folder, its segments, and where each of them starts.

A run is a folder. Everything that survives a stop is in it, and its name is its identity: starting the same
configuration again goes on with it. A segment (a stage of the configuration) is finished when its weights are exported;
the next one begins with these.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from domainshuttle.platform.config import ConfigError, RunConfig, StageSection

DIGEST_NAME = "digest.txt"


@dataclass(frozen=True)
class Segment:
    """One stage of a run's schedule."""

    number: int
    stage: StageSection
    seed: int
    """Seeds the plan, noise and timesteps: of the run's seed and the segment's number."""
    weights: Path
    """Where its weights are, or will be, exported as a diffusers folder."""
    origin: str | None
    """Weights to begin with: the folder of the segment before, or the configuration's base; None: a new model."""

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def finished(self) -> bool:
        return (self.weights / DIGEST_NAME).exists()


class Run:
    """A run on disk. `open` makes or resumes it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = config.run_folder

    @classmethod
    def open(cls, config: RunConfig, fresh: bool = False) -> "Run":
        """Makes the run's folder, or resumes it.

        Raises ConfigError when a run of this name was made with another configuration, naming the keys that differ.
        """
        run = cls(config)
        if fresh and run.folder.exists():
            shutil.rmtree(run.folder)
        if run.config_path.exists():
            saved = RunConfig.model_validate(yaml.safe_load(run.config_path.read_text()))
            if saved.digest() != config.digest():
                before, now = saved.flattened(), config.flattened()
                keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
                changes = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys)
                raise ConfigError(
                    f"run {config.name!r} in {run.folder} was started with another configuration: {changes}. "
                    "Give this one a name of its own (--set name=...), or start it anew with --fresh"
                )
        for part in ("consumed", "quarantine", "weights", "checkpoints"):
            (run.folder / part).mkdir(parents=True, exist_ok=True)
        run.config_path.write_text(config.to_yaml())
        run.stop_path.unlink(missing_ok=True)
        return run

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def ledger_path(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def spool(self) -> Path:
        """Metrics on their way to MLflow."""
        return self.folder / "spool"

    @property
    def progress_path(self) -> Path:
        """Where the run is, for people: written by rank 0, small, and never needed to resume."""
        return self.folder / "progress.json"

    @property
    def stop_path(self) -> Path:
        """A file that asks the workers to write a checkpoint and stop."""
        return self.folder / "stop"

    def consumed_path(self, segment: str, rank: int) -> Path:
        """Which samples a rank trained on, a line a micro-batch."""
        return self.folder / "consumed" / f"{segment}.rank{rank:05d}.jsonl"

    def quarantine_path(self, segment: str, rank: int) -> Path:
        return self.folder / "quarantine" / f"{segment}.rank{rank:05d}.jsonl"

    def segments(self) -> list[Segment]:
        """The schedule in order."""
        segments: list[Segment] = []
        origin = self.config.model.base
        for number, stage in enumerate(self.config.stages):
            weights = self.folder / "weights" / stage.name
            seed = (self.config.seed << 8) + number
            segments.append(Segment(number, stage, seed, weights, origin))
            origin = str(weights)
        return segments

    def segment(self, name: str) -> Segment:
        """The segment of a name; raises ConfigError that lists those there are."""
        for segment in self.segments():
            if segment.name == name:
                return segment
        raise ConfigError(f"run {self.config.name!r} has no stage {name!r}; it has {[s.name for s in self.segments()]}")

    def read_ids(self) -> dict[str, Any] | None:
        """The ids of the run's MLflow runs, as they were saved last."""
        path = self.folder / "mlflow.json"
        ids: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return ids

    def write_ids(self, ids: Mapping[str, Any]) -> None:
        temporary = self.folder / ".mlflow.json.partial"
        temporary.write_text(json.dumps(dict(ids), indent=2))
        temporary.rename(self.folder / "mlflow.json")


def find_run(folder: str | Path) -> Run:
    """The run in a folder; raises ConfigError where there is none."""
    path = Path(folder).expanduser().absolute()
    saved = path / "config.yaml"
    if not saved.is_file():
        near = sorted(p.parent.name for p in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
        hint = (
            f"; runs beside it: {', '.join(near)}"
            if near
            else "; a run's folder is <output>/<name> of its configuration"
        )
        raise ConfigError(f"no run in {path}{hint}")
    return Run(RunConfig.model_validate(yaml.safe_load(saved.read_text())))


def weights_identity(origin: str | None, seed: int) -> str:
    """A digest of the weights that a segment begins with, so that a checkpoint is never put on others."""
    if origin is None:
        return f"new:{seed}"
    folder = Path(origin).expanduser()
    if not folder.is_dir():
        return f"hub:{origin}"
    noted = folder / DIGEST_NAME
    return noted.read_text().strip() if noted.exists() else folder_digest(folder)


def folder_digest(folder: Path) -> str:
    """A digest of the safetensors files and configurations in a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("config.json")]):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while chunk := file.read(16 << 20):
                digest.update(chunk)
    return digest.hexdigest()
