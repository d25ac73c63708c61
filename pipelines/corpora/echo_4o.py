"""Echo-4o-Image: pictures that were generated from several reference pictures. Format: docs/datasets.md.

Only the multi-reference part has references; records of the two other parts are counted and left out. The names of its
files could not be verified, so both forms in which its authors write such data are read: JSONL, and Parquet rows whose
last picture is the target.
"""

import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from domainshuttle.pipelines.corpora.downloads import check_folder, found_files
from domainshuttle.pipelines.corpora.files import Picture, Shown, picture_of, read_picture, sample_of
from domainshuttle.pipelines.corpora.json_records import jsonl_records
from domainshuttle.pipelines.corpora.parquet_rows import parquet_rows, picture_bytes, require_columns
from domainshuttle.pipelines.corpora.source import (
    Fields,
    FolderSource,
    LeftOut,
    Notes,
    Piece,
    Record,
    SourceConfig,
    Tables,
    surveyed,
    uncaptioned,
    unknown_form,
)
from domainshuttle.pipelines.corpora.words import CAPTION_IS_INSTRUCTION, FROM_WORDS, domain_of
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import SampleFault, fault_reason, of_sample
from domainshuttle.pipelines.sample import RawSample

_COLUMNS = ("image_list", "instruction_list")
_NAMED = re.compile(
    r"\b(?:the|an?)\s+(?P<word>[\w' -]{1,40}?)\s+(?:in|from|of)\s+(?:the\s+)?(?:"
    r"(?P<ordinal>first|second|third|fourth|fifth)\s+(?:image|picture|photo|figure)|"
    r"(?:image|picture|photo|figure)\s*#?(?P<number>\d))",
    re.IGNORECASE,
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth")


class Echo4oConfig(SourceConfig):
    """The multi-reference part of Echo-4o-Image."""

    builder: Literal["echo-4o"] = "echo-4o"
    files: list[str] = Field(["**/*.jsonl", "**/*.parquet"], min_length=1, description="below `folder`")


class Echo4oSource(FolderSource[Echo4oConfig]):
    """See `source.Source`."""

    def pieces(self) -> list[Piece]:
        check_folder(self.root)
        found = found_files(self.root, self.config.files, "files of records")
        for path in found:
            if path.suffix == ".parquet":
                require_columns(path, _COLUMNS)
        return [Piece.of(path, self.root, in_order=path.suffix == ".parquet") for path in found]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        if piece.in_order:
            for number, row in enumerate(parquet_rows(self.root / piece.name, ["instruction_list"], 1024)):
                id_ = f"{piece.name} row {number}"
                try:
                    texts = Fields(row, id_).texts("instruction_list")
                except DataError as error:
                    yield LeftOut(id_, fault_reason(error))
                    continue
                caption = texts[0].strip() if texts else ""
                content = {"file": piece.name, "row": number, "caption": caption}
                yield Record(id_, content, uncaptioned=uncaptioned(caption, "instruction"))
            return
        yield from surveyed(piece, jsonl_records(self.root / piece.name), lambda fields: self._record(fields, piece))

    def _record(self, fields: Fields, piece: Piece) -> Record | LeftOut:
        output = fields.text("output_image")
        id_ = f"{piece.name}+{output}"
        inputs = fields.texts("input_images") if fields.content.get("input_images") else []
        caption = fields.caption("instruction")
        if not inputs:
            return LeftOut(id_, "no references: a record of another part")
        content = {"file": piece.name, "inputs": inputs, "output": output, "caption": caption}
        return Record(id_, content, uncaptioned=uncaptioned(caption, "instruction"))

    def make(self, records: Sequence[Record], tables: Tables, notes: Notes) -> Iterator[RawSample | LeftOut]:
        """See `source.Source`."""
        for record, pictures in self._with_pictures(records):
            try:
                with of_sample(record.id):
                    sample = self._sample(record, pictures)
            except DataError as error:
                yield LeftOut(record.id, fault_reason(error))
                continue
            yield sample

    def _with_pictures(self, records: Sequence[Record]) -> Iterator[tuple[Record, Any]]:
        """Each record with what its pictures are read of: a row of Parquet, or nothing where they are files."""
        if "row" not in records[0].payload:
            yield from ((record, None) for record in records)
            return
        wanted = {record.payload["row"]: record for record in records}
        for number, row in enumerate(parquet_rows(self.root / records[0].payload["file"], ["image_list"], 8)):
            if (record := wanted.pop(number, None)) is not None:
                yield record, row["image_list"]
                if not wanted:
                    return

    def _sample(self, record: Record, row: Any) -> RawSample:
        content = record.payload
        if "row" in content:
            if not isinstance(row, list) or len(row) < 2:
                raise unknown_form(record.id, "image_list: expected references and then the target")
            names = [f"{record.id}: picture {number}" for number in range(len(row))]
            pictures = [picture_of(picture_bytes(one, name), name) for one, name in zip(row, names, strict=True)]
        else:
            pictures = [self._picture(path, content["file"]) for path in (*content["inputs"], content["output"])]
        *references, target = pictures
        words = named_subjects(content["caption"], len(references))
        return sample_of(
            record.id,
            self.corpus,
            content["caption"],
            target,
            [(word, domain_of(word)) for word in words],
            [Shown(number, "photo", picture) for number, picture in enumerate(references)],
            {CAPTION_IS_INSTRUCTION: 1.0, FROM_WORDS: 1.0},
        )

    def _picture(self, path: str, file: str) -> Picture:
        """A picture by a path whose beginning need not exist: what of it does, below the records' folder or the
        source's, and else its name."""
        parts = PurePosixPath(path).parts
        if ".." in parts:
            raise SampleFault("unsafe name", f"{path[:120]!r}")
        parts = parts[1:] if parts and parts[0] == "/" else parts
        beside = (self.root / file).parent
        for folder in (self.root, beside):
            for first in range(len(parts)):
                name = "/".join(parts[first:])
                if (folder / name).is_file():
                    return read_picture(folder, name)
        found = _by_name(beside).get(parts[-1] if parts else "", ())
        if len(found) > 1:
            raise SampleFault("ambiguous picture", f"{path} may be {found[0]} or {found[1]}")
        return read_picture(beside, found[0] if found else "/".join(parts) or path)


def named_subjects(instruction: str, count: int) -> list[str]:
    """A word for each of `count` reference pictures, where an instruction says "the dog in image 1" or "in the first
    image"; 'subject' where it says nothing."""
    words = ["subject"] * count
    for match in _NAMED.finditer(instruction):
        number = int(match["number"]) - 1 if match["number"] else _ORDINALS.index(match["ordinal"].lower())
        if 0 <= number < count and words[number] == "subject":
            words[number] = match["word"].strip().lower()
    return words


@lru_cache(maxsize=16)
def _by_name(folder: Path) -> dict[str, tuple[str, ...]]:
    """The files below a folder, relative to it, by their own name."""
    found: dict[str, tuple[str, ...]] = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            found[name] = (*found.get(name, ()), (Path(parent) / name).relative_to(folder).as_posix())
    return found
