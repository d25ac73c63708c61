"""The videos of an evaluation: who made them, where they lie, and the generation of what is missing.

A column is what a reader compares: a model, the same model with other references (a control), the real clips, or a
folder of videos that another system made. Its videos are `videos/COLUMN/CASE.mp4`, each with a JSON beside it that says
what it was made of and its sha256; a later repeat is `CASE.r1.mp4`. A video whose JSON names the same model, case, seed
and settings is never made again, and one that could not be made is a JSON with its reason.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import encode_mp4, opened_clip
from domainshuttle.pipelines.ray_tasks import each_by_actors
from domainshuttle.pipelines.sample import VIDEO_EXTENSIONS
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.config.loading import read_text
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import progress
from domainshuttle.platform.evaluation.cases import EvaluationCase
from domainshuttle.platform.evaluation.config import Control, EvaluationConfig, GenerationSettings
from domainshuttle.platform.evaluation.stages import largest_node, require_fits
from domainshuttle.platform.generation.cases import case_seed

REAL = "real"
"""The column of the real clips."""
CONTROL_MARK = "~"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


@dataclass(frozen=True)
class Column:
    """Who made the videos that stand in one column."""

    name: str
    path: str
    """An exported folder, a diffusers folder, a hub id, or a folder of videos."""
    generated: bool
    """Whether its videos are made here."""
    control: Control | None = None
    of: str = ""
    """Of a control, the column that it is one of."""
    how: dict[str, Any] = field(default_factory=dict)
    """Of one that is made here: model, pipeline and settings of its clips, as their JSONs have them."""

    @property
    def judged(self) -> bool:
        """Whether it is one of the models that are ranked."""
        return self.control is None and self.name != REAL


@dataclass(frozen=True)
class Clip:
    """A video of a column."""

    column: str
    case: str
    repeat: int
    path: Path
    sha256: str
    """Empty where there is none."""
    failure: str
    """Why there is none."""
    made: dict[str, Any]
    """What its JSON says of how it was made."""


def columns_of(models: Sequence[str], config: EvaluationConfig, cases: Sequence[EvaluationCase]) -> list[Column]:
    """The columns of models as they were named, `PATH` or `NAME=PATH`, with their controls, and the real clips.

    Raises ConfigError for what is no model, and for one name twice.
    """
    columns: list[Column] = []
    for text in models:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = Path(text).name, text
        if not _NAME.fullmatch(name) or name == REAL:
            raise ConfigError(
                f"model {text!r}: give it a name of 1 to 61 letters, digits, ., - and _, a letter or digit first, not "
                f"{REAL!r}: NAME={path}"
            )
        if any(column.name == name for column in columns):
            raise ConfigError(f"two models are called {name!r}: give each a name, such as {name}-2={path}")
        folder = Path(path).expanduser()
        generated = not folder.is_dir() or (folder / "model_index.json").is_file()
        if not generated and not any(folder.glob("*.mp4")):
            raise ConfigError(
                f"{folder} is no exported model, and has no videos CASE.mp4: make one with domainshuttle export"
            )
        columns.append(Column(name, str(folder.absolute()) if folder.is_dir() else path, generated))
        if generated:
            columns += [
                Column(f"{name}{CONTROL_MARK}{control}", columns[-1].path, True, control, name)
                for control in dict.fromkeys(config.controls)
            ]
    if any(case.target for case in cases):
        columns.append(Column(REAL, "", False))
    return columns


def partner(case: EvaluationCase, cases: Sequence[EvaluationCase], group: int | None = None) -> EvaluationCase:
    """The case whose references a control `other` takes: of the cases of the same split, in order of ids, the one half
    of them further on; half of its group where they are tested in groups of `group` (identity) and it is not alone in
    its own. Of a split of one case it is one of another split; the case itself where no other has references."""
    whole = sorted((one for one in cases if one.references), key=lambda one: one.id)
    split = [one for one in whole if one.split == case.split]
    place = next((n for n, one in enumerate(split) if one.id == case.id), 0)
    start = place // (group or len(whole)) * (group or len(whole))
    for ring in (split[start : start + (group or len(whole))], split, whole):
        here = next((n for n, one in enumerate(ring) if one.id == case.id), None)
        if here is not None and len(ring) > 1:
            return ring[(here + len(ring) // 2) % len(ring)]
    return case


MANIFEST_NAME = "manifest.json"
"""Of a folder of videos: what people are to know of how they were made, an object of texts and numbers."""


def read_manifest(column: Column) -> dict[str, Any]:
    """What the folder of a column says of its videos; nothing where it says nothing. Raises ConfigError for what is no
    object."""
    path = Path(column.path) / MANIFEST_NAME
    if column.generated or column.name == REAL or not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: expected an object, such as {{"model": "Kling 1.6", "fps": 24}}')
    return content


def strangers(column: Column, cases: Sequence[EvaluationCase], repeats: int) -> list[str]:
    """The videos in a column's folder that are of no case. Raises ConfigError where all of them are."""
    if column.generated or column.name == REAL:
        return []
    names = {f"{case.id}{f'.r{number}' if number else ''}.mp4" for case in cases for number in range(repeats)}
    files = (one.name for one in Path(column.path).iterdir() if one.is_file() and not one.name.startswith("."))
    videos = sorted(name for name in files if name.lower().rpartition(".")[2] in VIDEO_EXTENSIONS)
    if not names.intersection(videos):
        raise ConfigError(
            f"{column.path}: no video has the name of a case: they are called {', '.join(videos[:3])}, and cases "
            f"{', '.join(case.id for case in cases[:3])}: rename them to CASE.mp4"
        )
    return [name for name in videos if name not in names]


@dataclass(frozen=True)
class _Order:
    """A clip to be made."""

    case: EvaluationCase
    """As the model is shown it."""
    repeat: int
    seed: int
    path: Path
    made: dict[str, Any]
    """What decides the clip: its JSON begins with it."""


class VideoFolder:
    """The videos of an evaluation, in a folder that all nodes see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, column: Column, case: EvaluationCase, repeat: int) -> Path:
        """Where a video lies, or has to be put."""
        if column.name == REAL:
            assert case.target is not None
            return case.target
        folder = self.folder / column.name if column.generated else Path(column.path)
        return folder / f"{case.id}{f'.r{repeat}' if repeat else ''}.mp4"

    def note(self, column: Column, case: EvaluationCase, repeat: int) -> Path:
        """Where it is said what a video was made of."""
        return self.folder / column.name / f"{case.id}{f'.r{repeat}' if repeat else ''}.json"

    def orders(
        self, column: Column, cases: Sequence[EvaluationCase], config: EvaluationConfig, again: bool = False
    ) -> tuple[list[_Order], dict[str, Any]]:
        """What is missing of a column that is made here, and how its clips are made. `again`: also what failed."""
        from domainshuttle.platform.evaluation.generators import Settings, model_digest, pipeline_class

        settings = Settings.of(column.path, config.generation)
        how = {
            "model": model_digest(column.path), "pipeline": pipeline_class(column.path),
            "settings": settings.to_dict(), "control": column.control or "",
        }  # fmt: skip
        orders = []
        for repeat in range(config.repeats):
            for case in cases:
                shown = _as_shown(column, case, cases, config)
                if shown is None:
                    continue
                # a control has the noise of the clip that it is compared with
                seed = case_seed(config.seed, case.id, repeat)
                made = {**how, "case": shown.digest, "seed": seed}
                path = self.path(column, case, repeat)
                there = read_note(self.note(column, case, repeat))
                if there is not None and {key: there.get(key) for key in made} == made:
                    if "failure" in there and not again:
                        continue
                    if "failure" not in there and path.is_file() and path.stat().st_size == there.get("bytes"):
                        continue
                orders.append(_Order(shown, repeat, seed, path, made))
        return orders, how

    def generate(
        self, column: Column, cases: Sequence[EvaluationCase], config: EvaluationConfig, again: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """Makes what is missing of a column; returns how many clips, and how those of the column are made. Raises
        ConfigError for a model that can't be loaded, or settings that it can't have."""
        orders, how = self.orders(column, cases, config, again)
        if not orders:
            return 0, how
        (self.folder / column.name).mkdir(parents=True, exist_ok=True)
        size = config.generation.batch
        batches = list(_batches(orders, size))
        if (pool := config.generation.pool) is not None:
            require_fits(pool, "generation.pool", largest_node())
        done = 0
        with progress(f"Generating {column.name}", "clips") as show:
            show(0, len(orders))
            arguments = (column.path, config.generation, how["settings"])
            for batch, result in each_by_actors(_ClipMaker, arguments, batches, pool):
                if isinstance(result, Exception):  # its worker died each time
                    for order in batch:
                        _write_failure(order, f"the worker that made it died each time: {result}")
                done += len(batch)
                show(done, len(orders))
        return len(orders), how

    def clips(self, column: Column, cases: Sequence[EvaluationCase], config: EvaluationConfig) -> list[Clip]:
        """The videos of a column, with their digests; a digest is computed again only where the file has changed.

        One that was made of another form of its case, with another seed or otherwise than those of its column is a
        failure: a model that is not named again keeps what it had."""
        return [
            self._clip(column, case, repeat, cases, config)
            for case in cases
            for repeat in range(config.repeats if column.name != REAL else 1)
        ]

    def _clip(
        self, column: Column, case: EvaluationCase, repeat: int, cases: Sequence[EvaluationCase],
        config: EvaluationConfig,
    ) -> Clip:  # fmt: skip
        def failed(why: str) -> Clip:
            return Clip(column.name, case.id, repeat, path, "", why, there)

        note, path = self.note(column, case, repeat), Path()
        there = read_note(note) or {}
        if not column.generated:  # a model that was made here may have had its name
            there = {name: value for name, value in there.items() if name in ("sha256", "bytes", "changed", "header")}
        if column.name == REAL and case.target is None:
            return failed("the case has no real clip")
        path = self.path(column, case, repeat)
        if column.generated:
            if (shown := _as_shown(column, case, cases, config)) is None:
                return failed("no other case has references to take")
            made = {**column.how, "case": shown.digest, "seed": case_seed(config.seed, case.id, repeat)}
            if other := [key for key, value in made.items() if key in there and there[key] != value]:
                return failed(
                    f"made otherwise than is asked for now ({', '.join(other)}): evaluate {column.path} again"
                )
            if "failure" in there:
                return failed(str(there["failure"]))
        try:
            status = path.stat()
            known = (there.get("bytes"), there.get("changed")) == (status.st_size, status.st_mtime_ns)
            data = b"" if known else path.read_bytes()
        except FileNotFoundError:
            return failed(f"there is no video {path}")
        except OSError as error:  # a folder of that name, or a file of another user
            return failed(f"{path} can't be read: {error.strerror}")
        sha256 = str(there["sha256"]) if known else hashlib.sha256(data).hexdigest()
        if column.generated and there.get("sha256") != sha256:  # a stop came between the two, or somebody changed it
            return failed(f"{path} is not the clip that its JSON is of: remove it, and evaluate {column.path} again")
        if not known:
            there |= {"sha256": sha256, "bytes": status.st_size, "changed": status.st_mtime_ns}
            there |= {} if column.generated else {"header": _header(data)}
            write_note(note, there)
        return Clip(column.name, case.id, repeat, path, sha256, "", there)


def _header(data: bytes) -> str:
    """What a video says of itself; clips of other lengths, sizes and rates are measured as they are."""
    try:
        with opened_clip(data) as clip:
            stream = clip.stream
            rate = float(stream.average_rate or 0)
            return f"{stream.frames} frames of {stream.width}x{stream.height} at {rate:g} a second"
    except DataError:
        return "not a readable clip"


def _as_shown(
    column: Column, case: EvaluationCase, cases: Sequence[EvaluationCase], config: EvaluationConfig
) -> EvaluationCase | None:
    """A case as the model of a column is shown it; None where a control would be shown it as it is."""
    if column.control is None:
        return case
    if column.control == "none" or not case.references:
        return replace(case, references=())
    other = partner(case, cases, config.identity.candidates if config.identity else None)
    return None if other is case else replace(case, references=other.references)


class _ClipMaker:
    """Makes clips with one pipeline."""

    def __init__(self, model: str, settings: GenerationSettings, resolved: dict[str, Any]) -> None:
        from domainshuttle.platform.evaluation.generators import Settings, load_generator

        self.settings = Settings(**resolved)
        self.generator = load_generator(model)
        self.generator.check(self.settings)
        self.batch = settings.batch
        self._warm: set[int] = set()

    def __call__(self, batch: list[_Order]) -> int:
        """Writes the clips of a batch, or why there are none; returns how many there are."""
        from domainshuttle.platform.evaluation.generators import CaseError

        if len(batch) not in self._warm:
            self._warm_up(batch)
        try:
            clips, latency = self.generator.generate(
                [order.case for order in batch], [order.seed for order in batch], self.settings
            )
        except CaseError as error:
            if len(batch) > 1:  # which of them it is
                return sum(self([order]) for order in batch)
            _write_failure(batch[0], str(error))
            return 0
        for order, clip in zip(batch, clips, strict=True):
            data = encode_mp4(clip, self.settings.fps, self.settings.crf)
            write_bytes(order.path, data)
            digest, status = hashlib.sha256(data).hexdigest(), order.path.stat()
            found = {"sha256": digest, "bytes": status.st_size, "changed": status.st_mtime_ns}
            write_note(order.path.with_suffix(".json"), {**order.made, **found, "latency": latency.to_dict()})
        return len(batch)

    def _warm_up(self, batch: list[_Order]) -> None:
        """One step of the same shape, so that the first call's costs are in no figure."""
        from domainshuttle.platform.evaluation.generators import CaseError

        self._warm.add(len(batch))
        try:
            one_step = replace(self.settings, steps=1)
            self.generator.generate([order.case for order in batch], [order.seed for order in batch], one_step)
        except CaseError:
            return  # said of the case itself


def _batches(orders: Sequence[_Order], size: int) -> Iterator[list[_Order]]:
    """Orders in groups of at most `size`."""
    for start in range(0, len(orders), size):
        yield list(orders[start : start + size])


def _write_failure(order: _Order, reason: str) -> None:
    write_note(order.path.with_suffix(".json"), {**order.made, "failure": reason})


def read_note(path: Path) -> dict[str, Any] | None:
    """What is said of a video; None where nothing is, or nothing whole."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_note(path: Path, content: dict[str, Any]) -> None:
    """Says what a video was made of; whole or not at all."""
    with atomic_file(path, sync=False) as aside:
        aside.write_text(json.dumps(content))
