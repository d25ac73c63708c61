"""Ditto-1M: clips and what an editor made of them by a command. Format: docs/datasets.md.

It has no references, masks or words. The edited clip is the target, and frames of the source clip show what it was made
of: one subject, the scene. With `source_clip` the whole source clip lies beside the target, and cross pairs are cut out
of it (`curation/pairs`), of subjects that labels name. Only the source has a caption.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field

from domainshuttle.pipelines.corpora.downloads import found_files, media_folder
from domainshuttle.pipelines.corpora.files import Shown, clip_of, drawn_picture, read_media, sample_of
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
    uncaptioned,
)
from domainshuttle.pipelines.corpora.words import CAPTION_IS_INSTRUCTION, FANTASY, FROM_WORDS
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.cut import frames_at
from domainshuttle.pipelines.quarantine import fault_reason
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.values import Whole

_CAPTIONS = "captions"
_OTHER = 4
"""The domain of a scene that stays as real as it was."""


class DittoConfig(SourceConfig):
    """Edited clips of Ditto-1M."""

    builder: Literal["ditto"] = "ditto"
    metadata: str = Field("training_metadata/*.json", description="below `folder`")
    captions: str | None = Field(
        "source_video_captions/*.json", description="of the source clips; none: commands alone"
    )
    videos: str = Field("videos", description="what paths of records are below")
    source_frames: Whole = Field(
        2, ge=0, le=8, description="frames of the source clip, evenly spread, as references of the scene; 0: no subject"
    )
    source_clip: bool = Field(
        False, description="keep the source clip beside the edited one: cross pairs are cut out of it"
    )


class DittoSource(FolderSource[DittoConfig], RecordSource):
    """See `source.Source`."""

    def pieces(self) -> list[Piece]:
        found = found_files(self.root, [self.config.metadata], "metadata files")
        media_folder(self.root, self.config.videos)
        captions = (
            [] if self.config.captions is None else found_files(self.root, [self.config.captions], "caption files")
        )
        return [
            *(Piece.of(path, self.root) for path in found),
            *(Piece.of(path, self.root, _CAPTIONS) for path in captions),
        ]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        for located in json_records(self.root / piece.name):
            where = f"{piece.name} at byte {located.offset}"
            try:
                fields = Fields(located.parse(where), where)
                if piece.role == _CAPTIONS:
                    yield Record(PurePosixPath(fields.text("path")).stem, {"caption": fields.caption("caption")})
                    continue
                source, edited = fields.text("source_path"), fields.text("edited_path")
                instruction = fields.caption("instruction")
            except DataError as error:
                yield LeftOut(where, fault_reason(error))
                continue
            content = {"source": source, "edited": edited, "instruction": instruction}
            yield Record(edited, content, uncaptioned=uncaptioned(instruction, "instruction"))

    def raw_sample(self, record: Record, tables: Tables, notes: Notes) -> RawSample:
        content, videos = record.payload, self.root / self.config.videos
        target = clip_of(read_media(videos, content["edited"], "clip"), content["edited"])
        source = clip_of(read_media(videos, content["source"], "source clip"), content["source"])
        count = min(self.config.source_frames, source.frames)
        numbers = {(2 * place + 1) * source.frames // (2 * count) for place in range(count)}
        frames = frames_at(source.data, numbers, content["source"]) if numbers else {}
        found = tables.find(_CAPTIONS, PurePosixPath(content["source"]).stem)
        if found is None and self.config.captions is not None:
            notes.add("source clips without a caption")
        before, instruction = found.payload["caption"] if found else "", content["instruction"]
        # without the command the source's caption is one of another clip
        caption = " ".join(text for text in (before, instruction) if text) if instruction else ""
        kind = content["edited"].partition("/")[0]
        fantasy = kind.startswith(("global_style", "global_freeform"))
        return sample_of(
            record.id,
            self.corpus,
            caption,
            target,
            [("scene", FANTASY if fantasy else _OTHER)] if frames else [],
            [Shown(0, "edited", drawn_picture(frames[number])) for number in sorted(frames)],
            {CAPTION_IS_INSTRUCTION: 1.0, FROM_WORDS: 1.0},
            source_clip=source if self.config.source_clip else None,
        )
