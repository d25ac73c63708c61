"""What a source makes, without Ray: for tests of sources."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainshuttle.pipelines.corpora.builder import parts_of
from domainshuttle.pipelines.corpora.registry import make_source
from domainshuttle.pipelines.corpora.source import LeftOut, Notes, Record
from domainshuttle.pipelines.corpora.survey import Survey, Tally
from domainshuttle.pipelines.media.decode import decode_image, encode_jpeg, encode_mp4
from domainshuttle.pipelines.sample import RawSample

MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"


@dataclass
class Made:
    """All samples of a source, what was left out of its survey, and what could not be made."""

    records: list[Record]
    samples: list[RawSample]
    tally: Tally
    bad: list[LeftOut]
    notes: Notes

    def __iter__(self) -> Iterator[RawSample]:
        return iter(self.samples)


def made(config: Any, folder: Path, corpus: str = "mine") -> Made:
    """Surveys a source into `folder` and makes all of its samples."""
    source, notes = make_source(config, corpus), Notes()
    survey = Survey(folder, tuple(source.pieces()))
    for number in survey.missing():
        survey.take(number, source)
    survey.write_tables()
    tally = survey.tally()
    rows, _, repeated = survey.select(source.wanted)
    tally.join(repeated)
    records = [*survey.records(rows)]
    samples, bad = [], []
    parts = parts_of(rows, 3, {n for n, piece in enumerate(survey.pieces) if piece.in_order})
    for part in parts:
        for one in source.make([*survey.records(part)], survey, notes):
            (bad if isinstance(one, LeftOut) else samples).append(one)  # type: ignore[arg-type]
    return Made(records, samples, tally, bad, notes)


def encoded(mask: np.ndarray) -> str:
    """COCO's string of a mask, as rleToString of its C code makes it."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    runs = runs if not flat[0] else [0, *runs]
    text = ""
    for number, run in enumerate(runs):
        value = run - runs[number - 2] if number > 2 else run
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != -1 if bits & 0x10 else value != 0
            text += chr((bits | (0x20 if more else 0)) + 48)
    return text


def jpeg(shade: int, height: int = 40, width: int = 56) -> bytes:
    """A picture of one grey."""
    return encode_jpeg(np.full((height, width, 3), shade, np.uint8))


def mp4(shade: int = 0, frames: int = 10, height: int = 48, width: int = 64, fps: float = 10) -> bytes:
    """A clip whose frame n has the grey `shade` + 10 n."""
    levels = (shade + 10 * np.arange(frames)).astype(np.uint8)
    return encode_mp4(np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)), fps)


def grey(data: Any) -> int:
    """The mean level of a picture's bytes."""
    return round(float(decode_image(data).mean()))


def reasons(left: list[LeftOut]) -> list[str]:
    return sorted(one.reason.partition(":")[0] for one in left)
