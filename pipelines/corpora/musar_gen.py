"""MUSAR-Gen: generated pictures of two objects, each of which has a picture of its own. Format: docs/datasets.md."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from domainshuttle.pipelines.corpora.downloads import found_files
from domainshuttle.pipelines.corpora.files import Shown, picture_of, sample_of
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
    uncaptioned,
)
from domainshuttle.pipelines.corpora.words import FROM_WORDS, domain_of, head_noun
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import fault_reason, of_sample
from domainshuttle.pipelines.sample import RawSample

_FIXED = "An undivided, seamless, and harmonious picture with two objects."
"""What the prompts begin with: it told the generator not to split the picture, and describes nothing."""
_TEXTS = ("cond_prompt_0", "cond_prompt_1", "prompt")
_PICTURES = ("cond_img_0", "cond_img_1", "tgt_img")


class MusarGenConfig(SourceConfig):
    """Pictures of MUSAR-Gen with their two references."""

    builder: Literal["musar-gen"] = "musar-gen"
    files: str = Field("**/*.parquet", description="below `folder`")


class MusarGenSource(FolderSource[MusarGenConfig]):
    """See `source.Source`."""

    def pieces(self) -> list[Piece]:
        found = found_files(self.root, [self.config.files], "Parquet files")
        for path in found:
            require_columns(path, (*_TEXTS, *_PICTURES))
        return [Piece.of(path, self.root, in_order=True) for path in found]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        for number, row in enumerate(parquet_rows(self.root / piece.name, _TEXTS, 1024)):
            id_ = f"{piece.name} row {number}"
            try:
                fields = Fields(row, id_)
                caption = fields.caption("prompt").removeprefix(_FIXED).strip()
                words = [head_noun(fields.text(f"cond_prompt_{side}")) or "object" for side in (0, 1)]
            except DataError as error:
                yield LeftOut(id_, fault_reason(error))
                continue
            content = {"file": piece.name, "row": number, "caption": caption, "words": words}
            yield Record(id_, content, uncaptioned=uncaptioned(caption))

    def make(self, records: Sequence[Record], tables: Tables, notes: Notes) -> Iterator[RawSample | LeftOut]:
        """See `source.Source`."""
        wanted = {record.payload["row"]: record for record in records}
        rows = parquet_rows(self.root / records[0].payload["file"], _PICTURES, 16)
        for number, row in enumerate(rows):
            if (record := wanted.pop(number, None)) is None:
                continue
            try:
                with of_sample(record.id):
                    sample = self._sample(record, row)
            except DataError as error:
                yield LeftOut(record.id, fault_reason(error))
                continue
            yield sample
            if not wanted:
                return

    def _sample(self, record: Record, row: dict[str, Any]) -> RawSample:
        first, second, target = (
            picture_of(picture_bytes(row[name], f"{record.id}: {name}"), f"{record.id}: {name}") for name in _PICTURES
        )
        words = record.payload["words"]
        return sample_of(
            record.id,
            self.corpus,
            record.payload["caption"],
            target,
            [(word, domain_of(word)) for word in words],
            [Shown(0, "photo", first), Shown(1, "photo", second)],
            {FROM_WORDS: 1.0},
        )
