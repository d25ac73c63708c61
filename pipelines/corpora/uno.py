"""UNO-1M: pairs of generated pictures of one subject in two scenes. Format: docs/datasets.md."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from domainshuttle.pipelines.corpora.downloads import found_files, media_folder
from domainshuttle.pipelines.corpora.files import Shown, read_picture, sample_of
from domainshuttle.pipelines.corpora.json_records import json_records
from domainshuttle.pipelines.corpora.source import (
    Fields,
    FolderSource,
    LeftOut,
    Notes,
    Piece,
    Record,
    RecordSource,
    SourceConfig,
    Tables,
    surveyed,
    uncaptioned,
)
from domainshuttle.pipelines.corpora.words import FROM_WORDS, domain_of
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.values import Real

SCORE = "consistency"
_MOST_SCORE = 4.0
"""The scale of the filter that the authors ran ends here; a few records have impossible scores."""


class UnoConfig(SourceConfig):
    """Pairs of UNO-1M: the second picture is the target, the first its reference."""

    builder: Literal["uno"] = "uno"
    labels: str = Field("labels/*.json", description="the label files, below `folder`")
    images: str = Field("images", description="the folder of split1, split2 ..., below `folder`")
    least_score: Real = Field(4.0, ge=0, le=_MOST_SCORE, description="of the authors' consistency filter")


class UnoSource(FolderSource[UnoConfig], RecordSource):
    """See `source.Source`."""

    def pieces(self) -> list[Piece]:
        found = found_files(self.root, [self.config.labels], "label files")
        media_folder(self.root, self.config.images)
        # the union of the others lies beside or among them
        parts = [path for path in found if "total" not in path.stem] or found
        return [Piece.of(path, self.root) for path in parts]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        return surveyed(piece, json_records(self.root / piece.name), self._record)

    def _record(self, fields: Fields) -> Record | LeftOut:
        if "image_tgt_path" in fields:
            return self._training_record(fields)
        first, second = fields.text("img_path1"), fields.text("img_path2")
        id_ = f"{first}+{second}"
        caption = fields.fields("caption")
        filtered = fields.fields("vlm_filter_cot")
        score = filtered.number("score_final")
        parts = filtered.fields("score_part") if "score_part" in filtered else Fields({}, id_)
        text, words = caption.caption("img_path2"), caption.texts("subject")
        for name, value in [("score_final", score), *((name, parts.number(name)) for name in parts.content)]:
            if not 0 <= value <= _MOST_SCORE:
                return LeftOut(id_, f"impossible score: {name} is {value:g}, expected 0 to {_MOST_SCORE:g}")
        if score < self.config.least_score:
            return LeftOut(id_, "low score")
        if not words or not words[0].strip():
            return LeftOut(id_, "no subject")
        content = {"references": [first], "target": second, "words": words[:1], "scores": {SCORE: score}}
        return Record(id_, {**content, "caption": text}, uncaptioned=uncaptioned(text))

    def _training_record(self, fields: Fields) -> Record | LeftOut:
        """A record in the form in which the authors' training reads them, filtered and without words."""
        target, caption = fields.text("image_tgt_path"), fields.caption("prompt")
        paths = fields.texts("image_paths") if "image_paths" in fields else [fields.text("image_path")]
        id_ = f"{'+'.join(paths)}+{target}"
        if not paths:
            return LeftOut(id_, "no subject")
        target, *paths = (path.removeprefix(f"{self.config.images}/") for path in (target, *paths))
        words = [f"subject {number}" for number in range(1, len(paths) + 1)] if len(paths) > 1 else ["subject"]
        content = {"references": paths, "target": target, "caption": caption, "words": words, "scores": {}}
        return Record(id_, content, uncaptioned=uncaptioned(caption))

    def raw_sample(self, record: Record, tables: Tables, notes: Notes) -> RawSample:
        content, images = record.payload, self.root / self.config.images
        shown = [
            Shown(number, "photo", read_picture(images, path)) for number, path in enumerate(content["references"])
        ]
        return sample_of(
            record.id,
            self.corpus,
            content["caption"],
            read_picture(images, content["target"]),
            [(word, domain_of(word)) for word in content["words"]],
            shown,
            {**content["scores"], FROM_WORDS: 1.0},
        )
