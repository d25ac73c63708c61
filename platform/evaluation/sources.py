"""Where the cases of a test set come from: data sets of others, files and folders of one's own, held-out samples.

Each source is a section of an evaluation's configuration. One without a `path` is not there yet: its cases have to come
from the user, and the report says how many of those that are expected there are.
"""

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from domainshuttle.pipelines.corpora.words import domain_of
from domainshuttle.pipelines.errors import counted
from domainshuttle.pipelines.sample import IMAGE_EXTENSIONS, safe_key
from domainshuttle.pipelines.storage.uri import join
from domainshuttle.pipelines.values import Count, Section, Text
from domainshuttle.platform.config.loading import read_text
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.evaluation.cases import (
    SPLITS,
    EvaluationCase,
    ReferencePicture,
    case_of,
    freeze,
    read_case_file,
    require_unique,
)
from domainshuttle.platform.generation.cases import FiledCase

if TYPE_CHECKING:
    from domainshuttle.pipelines.index.table import Index

Split = Literal["in_domain", "real_to_fantasy", "fantasy_to_real", "mixed"]
Prefix = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_-]{0,30})?$")]


class _Source(Section, ABC):
    """What all sources have."""

    split: Split = Field("in_domain", description="of cases that do not say theirs")
    prefix: Prefix = Field("", description="before the ids, where two sources have the same")
    expected: Count | None = Field(None, description="cases that a whole test set has of it")
    about: str = Field("", description="what its cases are, for who must bring them")

    @abstractmethod
    def read(self, run: RunConfig | None, folder: Path) -> list[EvaluationCase]:
        """Its cases; `folder` is for what has to be written. Raises ConfigError, DataError."""

    @property
    def absent(self) -> bool:
        """Whether its cases have still to be brought."""
        return False


class OpenS2VSource(_Source):
    """A JSON of OpenS2V-Eval: Open-Domain, Human-Domain, Single-Domain or Hard-Case_Dev."""

    kind: Literal["opens2v"]
    path: Text | None = Field(None, description="the JSON; pictures are looked for beside it")
    groups: list[str] = Field(default_factory=list, description="only cases of these, such as multihuman; none: all")
    most_references: Count | None = Field(None, description="only the first pictures of each case")

    @property
    def absent(self) -> bool:
        return self.path is None

    def read(self, run: RunConfig | None, folder: Path) -> list[EvaluationCase]:
        path = Path(str(self.path)).expanduser()
        download = f"hf download BestWishYsh/OpenS2V-Eval --repo-type dataset --local-dir {path.parent}"
        if not path.is_file():
            raise ConfigError(f"there is no {path}: {download}")
        text = read_text(path)
        try:
            records = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error
        if not isinstance(records, dict):
            raise ConfigError(f"{path}: expected an object of cases by their name, as OpenS2V-Eval has")
        known = sorted({group_of(key) for key in records})
        if unknown := [group for group in self.groups if group not in known]:
            raise ConfigError(f"{path} has no cases of {', '.join(unknown)}; it has: {', '.join(known)}")
        chosen = {key: one for key, one in records.items() if not self.groups or group_of(key) in self.groups}
        for key, one in chosen.items():
            _check_record(one, f"{path}, case {key}")
        names = [name for one in chosen.values() for name in one["img_paths"][: self.most_references]]
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            raise ConfigError(
                f"{path}: {len(missing)} of its pictures are not beside it, such as {missing[0]}: {download}"
            )
        return [self._case(key, one, path) for key, one in chosen.items()]

    def _case(self, key: str, record: dict[str, Any], path: Path) -> EvaluationCase:
        shown = list(zip(record["img_paths"], record["class_label"], strict=True))[: self.most_references]
        references = tuple(_picture(path.parent / name, number, label) for number, (name, label) in enumerate(shown))
        return EvaluationCase(safe_key(self.prefix + key), self.split, record["prompt"], references, path.name)


def _check_record(record: Any, where: str) -> None:
    """Raises ConfigError for what is no case of OpenS2V-Eval."""
    content = record if isinstance(record, dict) else {}
    prompt, pictures, labels = content.get("prompt"), content.get("img_paths"), content.get("class_label")
    texts = isinstance(prompt, str) and prompt.strip()
    if not texts or not isinstance(pictures, list) or not isinstance(labels, list):
        raise ConfigError(f"{where}: expected a prompt, and lists img_paths and class_label, not {str(record)[:80]}")
    if len(pictures) != len(labels) or not all(isinstance(text, str) and text for text in (*pictures, *labels)):
        raise ConfigError(
            f"{where}: {len(pictures)} img_paths and {len(labels)} class_label: expected texts, a label for each "
            "picture"
        )


class CasesSource(_Source):
    """A JSONL of cases: the release's, or one's own with more keys."""

    kind: Literal["cases"]
    path: Text | None = Field(None, description="a JSONL, as `domainshuttle generate --cases` takes")

    @property
    def absent(self) -> bool:
        return self.path is None

    def read(self, run: RunConfig | None, folder: Path) -> list[EvaluationCase]:
        cases = read_case_file(Path(str(self.path)).expanduser(), self.split)
        return [_with_id(case, self.prefix + case.id) for case in cases]


class FolderSource(_Source):
    """A folder with a folder a case: `prompt.txt`, and pictures in the order of their names."""

    kind: Literal["folder"]
    path: Text | None = Field(
        None, description="its cases' names are their ids; case.json may have further keys of a line of cases"
    )

    @property
    def absent(self) -> bool:
        return self.path is None

    def read(self, run: RunConfig | None, folder: Path) -> list[EvaluationCase]:
        top = Path(str(self.path)).expanduser()
        if not top.is_dir():
            raise ConfigError(f"there is no folder {top}")
        cases = []
        for place in sorted(one for one in top.iterdir() if one.is_dir() and not one.name.startswith(".")):
            try:
                cases.append(self._case(place, top))
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigError(f"{place}: {error}") from error
        if not cases:
            raise ConfigError(f"{top} has no cases: expected a folder for each, with prompt.txt and pictures")
        return cases

    def _case(self, place: Path, top: Path) -> EvaluationCase:
        from domainshuttle.model.cases import GenerationCase

        there = sorted(one.name for one in place.iterdir() if not one.name.startswith("."))  # macOS leaves ._1.png
        pictures = [name for name in there if name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS]
        more, prompt = place / "case.json", place / "prompt.txt"
        item: dict[str, Any] = json.loads(read_text(more)) if more.is_file() else {}
        if not isinstance(item, dict):
            raise ValueError("case.json: expected an object")
        used = {*pictures, more.name, prompt.name, item.get("target")}
        if "seg_meta" not in item and (others := [name for name in there if name not in used]):
            raise ValueError(
                f"{', '.join(others[:3])} would not be used: pictures are {', '.join(IMAGE_EXTENSIONS)}, the text is "
                "prompt.txt; convert or remove it, or begin its name with a dot"
            )
        if prompt.is_file():
            item = {"prompts": read_text(prompt).strip(), **item}
        item = {"seg_meta": [{"seg_file": pictures}], **item, "id": safe_key(self.prefix + place.name)}
        filed = FiledCase(place.name, item["id"], GenerationCase.from_release(item, place), item)
        return case_of(filed, place, self.split, top.name)


class CorpusSource(_Source):
    """Samples of a raw corpus, held out from training; they come with their real clips."""

    kind: Literal["corpus"]
    corpus: Text = Field(description="a corpus of the run's configuration, or the folder of a raw one with its index")
    samples: Count | None = Field(None, description="how many; none: all")
    where: Text | None = Field("subject_count == 1", description="a filter of the samples")
    spread: bool = Field(False, description="evenly spread over the corpus, instead of the first ones")
    references: Count | None = Field(None, description="reference pictures of each; none: all that it has")

    def read(self, run: RunConfig | None, folder: Path) -> list[EvaluationCase]:
        from domainshuttle.pipelines.index.parts import INDEX_NAME
        from domainshuttle.pipelines.index.table import Index

        if run is not None and self.corpus in run.corpora:
            spec = run.corpus(self.corpus, "raw")
            index, fps = Index.load(join(spec.folder, INDEX_NAME)), run.corpora[self.corpus].fps
        else:
            index, fps = Index.load(join(self.corpus, INDEX_NAME)), None
        if self.where:
            index = index.filter(self.where)
        count = self.samples or len(index)
        if len(index) < count or not count:
            raise ConfigError(
                f"corpus {self.corpus} has {counted(len(index), 'sample')}"
                + (f" for which {self.where}" if self.where else "")
                + f", and {count} are asked for: ask for fewer samples"
            )
        rows = np.linspace(0, len(index) - 1, count).round().astype(int) if self.spread else np.arange(count)
        return self._cases(index, rows, fps, folder)

    def _cases(self, index: "Index", chosen: np.ndarray, fps: float | None, folder: Path) -> list[EvaluationCase]:
        from domainshuttle.pipelines.buckets import parse_bucket
        from domainshuttle.pipelines.encoding.sample_encoder import decode_target
        from domainshuttle.pipelines.index.samples import read_raw_sample
        from domainshuttle.pipelines.media.decode import encode_mp4

        cases = []
        for row in index.rows(chosen):
            sample = read_raw_sample(row)
            info, key = sample.info, safe_key(self.prefix + row.key)
            # those from other clips first, as a model is asked with in practice
            order = sorted(range(len(info.references)), key=lambda n: info.references[n].origin == "same_clip")
            references = []
            for number in order[: self.references]:
                one = info.references[number]
                subject = info.subjects[one.subject]
                path = folder / f"{key}-{one.file}"
                path.write_bytes(sample.files[one.file])
                references.append(ReferencePicture(path, _sha256(path), one.subject, subject.word, subject.domain))
            target = None
            if info.kind == "video":
                target = folder / f"{key}.mp4"
                pixels = decode_target(sample, parse_bucket(row.bucket), fps)
                target.write_bytes(encode_mp4(pixels, fps or info.fps or 16.0))
            source = f"{self.corpus}/{row.source}"
            cases.append(EvaluationCase(key, self.split, info.caption, tuple(references), source, target))
        return cases


Source = Annotated[OpenS2VSource | CasesSource | FolderSource | CorpusSource, Field(discriminator="kind")]


def group_of(key: str) -> str:
    """The group of a case of OpenS2V-Eval: `multihuman` of `multihuman_3`."""
    return key.rpartition("_")[0]


def _picture(path: Path, subject: int, label: str) -> ReferencePicture:
    return ReferencePicture(path, _sha256(path), subject, label.lower(), domain_of(label))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _with_id(case: EvaluationCase, key: str) -> EvaluationCase:
    return EvaluationCase(safe_key(key), case.split, case.prompt, case.references, case.source, case.target)


def build_test_set(
    sources: dict[str, Any], run: RunConfig | None, folder: Path, say: Callable[[str], None] = lambda _: None
) -> list[EvaluationCase]:
    """Reads all sources and writes the test set into `folder`, which then needs nothing else; returns its cases.

    `say` is told what is missing. Raises ConfigError, DataError; also where no source is there.
    """
    cases: list[EvaluationCase] = []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".reading.") as aside:
        for name, source in sources.items():
            if source.absent:
                say(f"{source.expected or 'The'} cases of {name} have to be brought ({source.about}): "
                    f"--set sources.{name}.path=FILE")  # fmt: skip
                continue
            cases += source.read(run, Path(aside))
        if not cases:
            raise ConfigError(
                f"no source has cases: give one a path, such as --set sources.{next(iter(sources))}.path=FILE"
            )
        require_unique(cases)
        return freeze(cases, folder)


def expected_counts(sources: dict[str, Any], cases: Sequence[EvaluationCase]) -> dict[str, tuple[int, int]]:
    """By split: how many cases there are, and how many a whole test set has."""
    counts = {}
    for split in SPLITS:
        there = sum(case.split == split for case in cases)
        whole = sum(source.expected or 0 for source in sources.values() if source.split == split)
        if there or whole:
            counts[split] = there, max(there, whole)
    return counts
