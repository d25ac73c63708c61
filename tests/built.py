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
    rows, _, _ = survey.select(source.wanted)
    records = [*survey.records(rows)]
    samples, bad = [], []
    parts = parts_of(rows, 3, {n for n, piece in enumerate(survey.pieces) if piece.in_order})
    for part in parts:
        for one in source.make([*survey.records(part)], survey, notes):
            (bad if isinstance(one, LeftOut) else samples).append(one)  # type: ignore[arg-type]
    return Made(records, samples, survey.tally(), bad, notes)


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
