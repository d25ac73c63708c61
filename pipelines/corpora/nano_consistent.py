"""Nano-Consistent-150K: portraits, each edited in many ways. Format: docs/datasets.md.

The outputs of one portrait are pictures of one person, so that other outputs are further references of it. The text of
a record is the edit command: a caption is what the labelling of captions makes of it.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from domainshuttle.pipelines.corpora.downloads import check_folder, found_files, media_folder
from domainshuttle.pipelines.corpora.files import Shown, read_picture, sample_of
from domainshuttle.pipelines.corpora.json_records import jsonl_records
from domainshuttle.pipelines.corpora.source import (
    SAMPLES,
    Fields,
    FolderSource,
    LeftOut,
    Notes,
    Piece,
    Record,
    RecordSource,
    SourceConfig,
    Tables,
    draw,
    surveyed,
    uncaptioned,
)
from domainshuttle.pipelines.corpora.words import CAPTION_IS_INSTRUCTION, FROM_WORDS, domain_of
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import fault_reason
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.values import Whole

_PREFIX = "Nano-150k"
"""What the paths of records begin with: the folder that the archive has."""


class NanoConsistentConfig(SourceConfig):
    """Edits of Nano-Consistent-150K: the output is the target, the inputs and other outputs are references."""

    builder: Literal["nano-consistent"] = "nano-consistent"
    records: str = Field("json/*.jsonl", description="below `folder` or its Nano-150k")
    other_outputs: Whole = Field(
        1, ge=0, le=16, description="further references of a person: other edits of its portrait"
    )


class NanoConsistentSource(FolderSource[NanoConsistentConfig], RecordSource):
    """See `source.Source`."""

    def __init__(self, config: NanoConsistentConfig, corpus: str) -> None:
        super().__init__(config, corpus)
        if (self.root / _PREFIX).is_dir():
            self.root = self.root / _PREFIX

    def pieces(self) -> list[Piece]:
        check_folder(Path(self.config.folder))
        found = found_files(self.root, [self.config.records], "files of records")
        media_folder(self.root, "Image")
        return [Piece.of(path, self.root) for path in found]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        return surveyed(piece, jsonl_records(self.root / piece.name), self._record)

    def _record(self, fields: Fields) -> Record | LeftOut:
        inputs = [_below(path) for path in fields.texts("input_images")]
        output = _below(fields.text("output_image"))
        instruction = fields.caption("instruction")
        if not inputs:
            return LeftOut(output, "no input picture")
        person = _subject(inputs[0]) if len(inputs) == 1 else ""
        content = {"inputs": inputs, "output": output, "caption": instruction}
        return Record(output, content, person, uncaptioned(instruction, "instruction"))

    def raw_sample(self, record: Record, tables: Tables, notes: Notes) -> RawSample:
        content = record.payload
        shown = [Shown(number, "photo", read_picture(self.root, path)) for number, path in enumerate(content["inputs"])]
        others = [one for one in tables.group(SAMPLES, record.group) if one.id != record.id] if record.group else []
        others.sort(key=lambda one: draw(self.config.seed, f"{record.id}+{one.id}"))
        for other in others[: self.config.other_outputs]:
            try:
                shown.append(Shown(0, "edited", read_picture(self.root, other.payload["output"])))
            except DataError as error:
                notes.add(f"other outputs that are left out: {fault_reason(error).partition(':')[0]}")
        words = ["person" if "/people/" in f"/{path}" else "subject" for path in content["inputs"]]
        return sample_of(
            record.id,
            self.corpus,
            content["caption"],
            read_picture(self.root, content["output"]),
            [(word, domain_of(word)) for word in words],
            shown,
            {CAPTION_IS_INSTRUCTION: 1.0, FROM_WORDS: 1.0},
        )


def _below(path: str) -> str:
    return path.removeprefix(f"{_PREFIX}/")


def _subject(path: str) -> str:
    """Of which portrait a picture is: its folder and its name, without the ending."""
    pure = PurePosixPath(path)
    return f"{pure.parent.name}/{pure.stem}"
