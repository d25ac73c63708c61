"""The contact sheet: samples of a raw corpus as a step sees them, for people to look at.

A row a sample: its target as it is cropped for its bucket (first, middle and last frame), then reference sets A and B,
each picture as it lies in the bucket's frame, B's altered views included.
"""

import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from domainshuttle.pipelines.buckets import Bucket, parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.samples import read_raw_sample
from domainshuttle.pipelines.index.table import Index, IndexRow
from domainshuttle.pipelines.media.augment import apply_view, augmented_view
from domainshuttle.pipelines.media.claims import reference_pixels, target_pixels
from domainshuttle.pipelines.media.decode import Pixels, fit_reference
from domainshuttle.pipelines.plan.pairing import choose_references
from domainshuttle.pipelines.sample import RawSample

HEAD, LABEL, GAP, SPACE = 32, 22, 14, 2
"""Pixels above the sheet and above each row, for what is written there; beside a group of columns, and a cell."""
_SET = 5
_PAPER, _BLANK, _BAD, _INK = (250, 250, 250), (235, 235, 235), (150, 150, 150), (40, 40, 48)
_GROUPS = ("target", "references, set A", "set B (cross-pair loss)")
_NARROWEST = 2
"""Columns of a group at least, for its name."""

Cell = Pixels | DataError
"""A picture, or why there is none."""


@dataclass(frozen=True)
class _Row:
    """What is shown of a sample: a line of text, and its pictures by group."""

    label: str
    groups: tuple[list[Cell], list[Cell], list[Cell]]


def draw_sheet(index: Index, samples: int, side: int = 128) -> Image.Image:
    """The sheet of so many samples, evenly spread over the index, in cells of `side` pixels; each group has as many
    columns as its longest row.

    What can't be decoded is a grey cell with the reason. Raises DataError where there are no samples, or no pictures.
    """
    if index.parts[0].stage != "raw":
        raise DataError("a contact sheet needs pictures: give the index of a raw corpus")
    if not len(index) or samples < 1:
        raise DataError("no samples for a contact sheet: widen --where, or ask for more with --samples")
    chosen = np.unique(np.linspace(0, len(index) - 1, min(samples, len(index))).astype(int))
    rates = {part.corpus: part.fps for part in index.parts}
    rows = [_row(row, rates[row.corpus]) for row in index.rows(chosen)]
    columns = [max(_NARROWEST, *(len(row.groups[group]) for row in rows)) for group in range(len(_GROUPS))]
    lefts = [sum(columns[:group]) * (side + SPACE) + group * GAP for group in range(len(_GROUPS) + 1)]
    width, height = lefts[-1] - GAP - SPACE, side + LABEL
    sheet = Image.new("RGB", (width, HEAD + len(rows) * height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for left, head in zip(lefts, _GROUPS, strict=False):
        pen.text((left + 6, 6), head, fill=_INK, font=ImageFont.load_default(16))
    for number, row in enumerate(rows):
        top = HEAD + number * height
        _write(pen, (6, top + 4), row.label, width - 12)
        for left, count, cells in zip(lefts, columns, row.groups, strict=False):
            for column in range(count):
                cell = cells[column] if column < len(cells) else None
                sheet.paste(_drawn(cell, side), (left + column * (side + SPACE), top + LABEL))
    return sheet


def _row(row: IndexRow, fps: float | None) -> _Row:
    label = f"{row.key}  {row.bucket}  {', '.join(row.subjects)}"
    try:
        sample = read_raw_sample(row)
    except DataError as error:
        return _Row(label, ([error], [], []))
    bucket = parse_bucket(row.bucket)
    try:
        clip = target_pixels(sample, bucket, fps)
        target: list[Cell] = [clip[0], clip[len(clip) // 2], clip[-1]] if len(clip) > 1 else [clip[0]]
    except DataError as error:
        target = [error]
    pairing = choose_references(row.reference_subjects, row.reference_origins, 0, 0, row.sample_id, _SET)
    set_a = [_reference(sample, row, picture, bucket, altered=False) for picture in pairing.set_a]
    set_b = [
        _reference(sample, row, picture, bucket, altered)
        for picture, altered in zip(pairing.set_b, pairing.augment_b, strict=True)
    ]
    return _Row(f"{label}: {sample.info.caption}", (target, set_a, set_b))


def _reference(sample: RawSample, row: IndexRow, number: int, bucket: Bucket, altered: bool) -> Cell:
    try:
        picture = reference_pixels(sample, number)
    except DataError as error:
        return error
    if altered:
        # that of a corpus that is encoded beforehand
        picture = apply_view(picture, augmented_view(0, 0, row.sample_id, number))
    return fit_reference(picture, bucket)


def _drawn(cell: Cell | None, side: int) -> Image.Image:
    """A square of `side` pixels: the picture, whole, in its middle; light grey where nothing belongs."""
    if isinstance(cell, DataError):
        square = Image.new("RGB", (side, side), _BAD)
        font = ImageFont.load_default(11)
        lines = textwrap.wrap(str(cell), max(side // 6, 8))[: side // 14]
        ImageDraw.Draw(square).multiline_text((4, 4), "\n".join(lines), fill=_INK, font=font, spacing=2)
        return square
    square = Image.new("RGB", (side, side), _BLANK)
    if cell is not None:
        image = Image.fromarray(cell)
        scale = side / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
        square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, room: int) -> None:
    """One line of text, cut where it does not fit."""
    font = ImageFont.load_default(12)
    shown = text = " ".join(text.split())
    while text and pen.textlength(shown, font=font) > room:
        text = text[: -max(1, len(text) // 20)]
        shown = f"{text.rstrip()} …"
    pen.text(place, shown, fill=_INK, font=font)
