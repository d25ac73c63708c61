"""Raw corpora to label, answers of a model that looks at them, and labelling without Ray."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import jpeg
from openai_server import Reply

from domainshuttle.pipelines.corpora.words import CAPTION_IS_INSTRUCTION, FROM_WORDS
from domainshuttle.pipelines.curation.labels import stage as labelling
from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.curation.stage import PartsJob, Passing, Step, Work
from domainshuttle.pipelines.index.samples import read_info
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.pipelines.sample import RawSample, Reference, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import ShardWriter

WORDS = ("person", "subject", "bread", "scene")


def raw_sample(number: int, caption: str | None = None, **changes: Any) -> RawSample:
    """An edit of a picture, each fifth a clip, whose caption is its command."""
    clip = number % 5 == 4
    files: dict[str, Any] = {"ref0.jpg": jpeg(100 + number)}
    files["mp4" if clip else "jpg"] = (
        encode_mp4(np.full((6, 40, 56, 3), number, np.uint8), 8.0) if clip else jpeg(number)
    )
    info = SampleInfo(
        caption=f"Change {number}: the woman shall dance" if caption is None else caption,
        source="mine", kind="video" if clip else "image", fps=8.0 if clip else None, frames=6 if clip else 1,
        size=(40, 56), subjects=[Subject(id=0, word=WORDS[number % 4], domain=number % 3)],
        references=[Reference(file="ref0.jpg", subject=0, origin="photo", size=(40, 56))],
        scores={CAPTION_IS_INSTRUCTION: 1.0, FROM_WORDS: 1.0, "aesthetic": number / 2},
    )  # fmt: skip
    return RawSample(f"s{number}", info.model_copy(update=changes), files)


def write_corpus(
    folder: Path, samples: Iterable[RawSample], prefix: str = "own", rows: Sequence[IndexRow] = ()
) -> Path:
    """Shards of some samples and an index of them, after those of `rows`."""
    infos = {}
    with ShardWriter(folder, prefix, 60_000) as writer:
        for sample in samples:
            infos[sample.key] = sample.info
            writer.write(sample.key, sample.members())
    made = [
        IndexRow.of(entry, infos[entry.key], "5x32x32" if infos[entry.key].kind == "video" else "1x32x32")
        for entry in writer.entries
    ]
    write_index(folder / "index.parquet", [*rows, *made], IndexMetadata(corpus="mine", stage="raw"))
    return folder


def rows_of(folder: Path) -> list[IndexRow]:
    index = Index.load(folder / "index.parquet")
    return index.rows(range(len(index)))


def says(score: int = 4, fails: Callable[[dict[str, Any], int], Reply | None] = lambda *_: None) -> Any:
    """A model that answers in the form that it is asked for; its caption names the picture's grey level."""

    def answer(body: dict[str, Any], number: int) -> Reply:
        if (fault := fails(body, number)) is not None:
            return fault
        schema = body["response_format"]["json_schema"]["schema"]
        content: dict[str, Any] = {"score": score}
        if "caption" in schema["properties"]:
            content["caption"] = f"A plain picture that asks {len(pictures(body))}."
        if "subjects" in schema["properties"]:
            asked = schema["properties"]["subjects"]
            fields = schema["$defs"]["Subject"]["properties"]
            one = {name: {"word": "Dancer", "domain": "fantasy"}[name] for name in fields}
            content["subjects"] = [one] * max(asked.get("minItems", 0), 1)
        return Reply(json.dumps(content))

    return answer


def pictures(body: dict[str, Any]) -> list[str]:
    return [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]


def asked_text(body: dict[str, Any]) -> str:
    return str(next(part["text"] for part in body["messages"][1]["content"] if part["type"] == "text"))


def endpoint(url: str, **changes: Any) -> LabelConfig:
    settings = {"url": url, "model": "made", "at_once": 4, "patience": 2.0, **changes.pop("endpoint", {})}
    return LabelConfig.model_validate({"labeller": "endpoint", "endpoint": settings, "most_failed": 1, **changes})


def inline(job: PartsJob, missing: Sequence[int], steps: Sequence[Step]) -> Iterable[int]:
    """The steps of a stage in this process, part by part: as `pass_through`."""
    ready = [step.make(*step.arguments) for step in steps]
    index = Index.load(job.raw.index)
    for part in missing:
        works = [(number, Work(row, read_info(row))) for number, row in enumerate(job.rows(index, part))]
        passing = Passing(works, [], Counter())
        for step in ready:
            passing.call(step)
        yield job.write(part, passing)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A labelling in this process; returns the parts that were made."""
    made: list[int] = []

    def noted(job: PartsJob, missing: Sequence[int], steps: Sequence[Step]) -> Iterable[int]:
        for part, done in zip(missing, inline(job, missing, steps), strict=True):
            made.append(part)
            yield done

    monkeypatch.setattr(labelling, "pass_through", noted)
    return made
