"""What a metric is given, what it returns, and what decides its values.

A metric measures one case and one video at a time. Its value is a function of both and of the metric's digest alone, so
a row of (case, video digest, metric digest) is computed once and never again. What several metrics need of a video,
such as masks, is made once (`Work.once`), and what several need of a model is loaded once (`Models`).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from domainshuttle.pipelines.errors import DataError, StorageError, UserFacingError, one_line
from domainshuttle.pipelines.media.decode import RULES, Pixels, opened_clip, shown_frames
from domainshuttle.platform.evaluation.metrics.choices import MetricConfig
from domainshuttle.platform.evaluation.metrics.weights import MetricModels, hub_commit, weights_digest

Made = TypeVar("Made")
State = Literal["measured", "missing", "refused", "failed"]
"""`missing`: what it is measured against is not there, for any model (a refused edit). `refused`: a judge declines.
`failed`: it could not be measured. None of the three is a 0."""


@dataclass(frozen=True)
class Reference:
    """A reference picture [h,w,3] of a case, and what is known of it."""

    picture: Pixels
    word: str = ""
    """What it shows, as a detector is asked for it: "man", "cup". Empty: nothing can be looked for."""
    subject: int = 0
    """References of one subject have the same number."""
    background: bool = False
    domain: str = ""
    """The domain that the video is to show it in, by name; empty where none is said."""
    edit_prompt: str = ""
    """How an editor is told to carry it to that domain."""

    @cached_property
    def digest(self) -> str:
        """Of the pixels."""
        return _digest({"shape": self.picture.shape}, np.ascontiguousarray(self.picture).tobytes())


@dataclass(frozen=True)
class MetricCase:
    """What a video was asked for. `id` is the case's own, stable over files and positions."""

    id: str
    prompt: str
    references: tuple[Reference, ...] = ()
    split: str = ""
    """in_domain, or a cross-domain one: real_to_fantasy, fantasy_to_real, mixed."""

    @property
    def cross_domain(self) -> bool:
        """Whether subjects are to be carried to another domain."""
        return self.split not in ("", "in_domain")

    @property
    def subjects(self) -> dict[int, list[Reference]]:
        """The references by subject, without backgrounds."""
        found: dict[int, list[Reference]] = {}
        for one in self.references:
            if not one.background:
                found.setdefault(one.subject, []).append(one)
        return found


@dataclass(frozen=True)
class Video:
    """Every frame of a video, decoded once for all metrics: uint8 [frames,h,w,3] as shown."""

    frames: Pixels
    fps: float
    digest: str
    """sha256 of the file."""

    @classmethod
    def read(cls, path: Path) -> "Video":
        """Raises DataError for a file that can't be decoded, or whose frames differ in size."""
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        data = path.read_bytes()
        with opened_clip(data, str(path)) as clip:
            frames = list(shown_frames(clip))
            rate = clip.stream.average_rate or clip.stream.guessed_rate
        if not frames:
            raise DataError(f"{path}: no frame could be decoded")
        if len(shapes := {frame.shape for frame in frames}) > 1:
            raise DataError(f"{path}: its frames have {len(shapes)} sizes, such as {sorted(shapes)[:2]}")
        return cls(np.stack(frames), float(rate) if rate else 0.0, hashlib.sha256(data).hexdigest())


def frame_numbers(count: int, sampled: int | None) -> NDArray[np.int64]:
    """`sampled` of `count` frames, evenly from the first to the last, cut to whole numbers (as OpenS2V-Eval does);
    None: all. A video of fewer frames gives some of them more than once."""
    if sampled is None:
        return np.arange(count, dtype=np.int64)
    return np.linspace(0, count - 1, sampled).astype(np.int64)


@dataclass
class Work:
    """One case and its video, and what was made of them so far."""

    case: MetricCase
    video: Video
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made at the first call with this key: whatever decides it belongs into the key."""
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found

    def frames(self, sampled: int | None) -> list[Pixels]:
        """Frames [h,w,3], as `frame_numbers` says."""
        return [self.video.frames[number] for number in frame_numbers(len(self.video.frames), sampled)]


class Models:
    """The models of this process, each loaded once, on one device; and the folder of the evaluation, where what is made
    once for all models lies: edited references, answers of judges."""

    def __init__(self, device: str = "cpu", folder: Path | None = None) -> None:
        self.device, self.folder = device, folder
        self._loaded: dict[Hashable, Any] = {}

    def once(self, key: Hashable, load: Callable[[], Made]) -> Made:
        """The model of a key: whatever decides it belongs into the key."""
        if key not in self._loaded:
            self._loaded[key] = load()
        found: Made = self._loaded[key]
        return found


@dataclass(frozen=True)
class Score:
    """A case's value, or why there is none."""

    state: State
    value: float | None = None
    reason: str = ""
    beside: Mapping[str, float] = field(default_factory=dict)
    """Numbers to print beside the value, such as a detection rate; the mean over cases is of use."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a reader can check the value with: by frame, subject and answer. JSON."""

    def __post_init__(self) -> None:
        if (self.state == "measured") != (self.value is not None):
            raise ValueError(f"a score that is {self.state} with the value {self.value}")
        if self.value is not None and not np.isfinite(self.value):
            raise ValueError(f"the value {self.value} is not finite")
        if self.state != "measured" and not self.reason:
            raise ValueError(f"a score that is {self.state} says why")

    @property
    def in_part(self) -> bool:
        """Whether all of it, or an answer of a judge, failed or was refused: another try may give more."""
        answers = self.details.get("answers", {})
        return self.state in ("failed", "refused") or any(answers.get(one) for one in ("refused", "bad_answer"))

    def to_dict(self) -> dict[str, Any]:
        """JSON, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Score":
        return cls(**content)


@dataclass(frozen=True)
class Needs:
    """What the actors of a metric reserve, and what must be known before it runs (`stages`)."""

    gpus: float = 0.0
    """Share of a GPU of 80 GB that its models fill; of 1 a whole one. On machines without GPUs they run on CPUs."""
    endpoint: str = ""
    """The url of an endpoint that it asks: one actor alone, which keeps the endpoint's limits."""
    packages: tuple[str, ...] = ()
    """Of its model's own environment (`isolated`), with pip's names and versions."""
    licence: str = ""
    """Terms that bind more than the product's own: they are said before it runs."""


Direction = Literal["falls", "same", "ceiling", "halves"]
Trial = Literal[
    "other_reference", "other_prompt", "still_reference", "still_edit", "shuffled", "blurred", "noisy",
    "half_without_subject", "recompressed", "no_references",
]  # fmt: skip
"""What a sensitivity test does to a case or its video (`sensitivity`)."""


Config = TypeVar("Config", bound=MetricConfig)


class Metric(ABC, Generic[Config]):
    """One metric with its choices.

    A kind of metric has a name as the configuration has it, a title as the paper has it, the version of its code, which
    rises whenever the same input may give another value, and what must happen to its value when a case or a video is
    altered (`expects`).
    """

    name: str
    title: str
    source: str
    """Where its definition is from."""
    code_version: int
    expects: ClassVar[Mapping[Trial, Direction]] = {}
    uses: tuple[str, ...] = ()
    """The fields of MetricModels that it needs."""

    def __init__(self, config: Config, models: Models | None = None, folders: MetricModels | None = None) -> None:
        self.config = config
        self.models = models or Models()
        self.folders = folders or MetricModels()
        self.variant = ""
        """Which of several of one kind it is, such as that with a larger model."""

    @classmethod
    def every(cls, config: Config, models: Models, folders: MetricModels) -> list[Self]:
        """The metrics that these choices are for: one, but for kinds that say otherwise."""
        return [cls(config, models, folders)]

    @property
    def label(self) -> str:
        """Its name in tables: two of one kind have different ones."""
        return f"{self.name}.{self.variant}" if self.variant else self.name

    def expectations(self) -> Mapping[Trial, Direction]:
        """What the sensitivity tests expect of it, with these choices."""
        return self.expects

    def needs(self) -> Needs:
        return Needs()

    def edited_references(self, case: MetricCase) -> list[Pixels]:
        """The edited references that it compares with, where it does and they are there; for the sensitivity tests."""
        return []

    def check(self) -> None:
        """Raises UserFacingError before work starts, for a model's folder that is not whole for example."""
        self.weights()

    def weights(self) -> Mapping[str, str]:
        """A digest of each model's files."""
        return {name: weights_digest(self.folders, name, self.name) for name in self.uses}

    def commits(self) -> Mapping[str, str]:
        """The hub's commit of each model, where its folder says it."""
        found = {name: hub_commit(self.model_folder(name)) for name in self.uses}
        return {name: commit for name, commit in found.items() if commit}

    def model_folder(self, name: str) -> str:
        """The folder of a model. Raises DataError where none is named."""
        return self.folders.folder(name, self.name)

    def decisions(self) -> dict[str, Any]:
        """All that decides a value beside the case and the video; the report prints it."""
        return {
            "metric": self.name,
            "code": self.code_version,
            "choices": self.config.model_dump(mode="json", exclude=_WHERE),
            "weights": dict(self.weights()),
            "pixels": RULES,
        }

    @cached_property
    def digest(self) -> str:
        """Of `decisions`."""
        return _digest(self.decisions())

    def applies(self, case: MetricCase) -> bool:
        """Whether the metric is one of this case's."""
        wanted = self.config.cases
        return wanted == "all" or case.cross_domain == (wanted == "cross_domain")

    @abstractmethod
    def measure(self, work: Work) -> Score:
        """The score of a case that it applies to. What it raises is the score's failure (`score`), but for a store or
        an endpoint that is away: nothing is known of the case then."""

    def score(self, work: Work) -> Score:
        """`measure`, with what it raises as a failed score."""
        try:
            return self.measure(work)
        except (StorageError, MemoryError):
            raise
        except UserFacingError as error:
            if not isinstance(error, DataError):
                raise
            return Score("failed", reason=one_line(error))
        except Exception as error:  # one video that a model chokes on must not end the other 219
            return Score("failed", reason=f"{type(error).__name__}: {one_line(error)}")

    def score_all(self, works: Iterable[Work]) -> Iterator[Score]:
        """Scores in order. A metric that waits for answers works at several cases at a time."""
        return map(self.score, works)

    def void(self, scores: Iterable[Score]) -> str:
        """Why these scores of one model may not be averaged; empty where they may."""
        return ""


_WHERE = {"cases", "gpus"}
"""Choices that decide which cases have a value, or where it is computed, and not what it is."""


def _digest(content: Mapping[str, Any], data: bytes = b"") -> str:
    text = json.dumps(content, sort_keys=True, default=list).encode()
    return hashlib.blake2b(text + b"\0" + data, digest_size=16).hexdigest()
