"""The pictures people look at: references beside generated clips, a row a case, and the same cases over the steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from domainshuttle.pipelines.media.decode import Pixels, encode_mp4

_SIDE, _GAP, _TEXT, _HEAD = 128, 8, 190, 30
_PAPER, _INK, _FAINT = (250, 250, 250), (40, 40, 48), (110, 110, 124)

Column = tuple[str, list[Pixels | None]]
"""A head and a picture [h,w,3] a row; None leaves its place empty."""


@dataclass(frozen=True)
class GridRow:
    """One case: pictures [h,w,3] and clips [F,h,w,3], uint8. A column that no row has is left out."""

    caption: str
    domain: str
    references: Sequence[Pixels]
    generated: Pixels
    target: Pixels | None = None
    other: Pixels | None = None
    """Generated from the same noise and caption with another subject's reference."""

    @property
    def label(self) -> tuple[str, str]:
        return self.caption, f"domain: {self.domain}"


def write_grid(rows: Sequence[GridRow], folder: Path, fps: float) -> list[Path]:
    """Writes `grid.png` (three frames of each clip) and, of clips, `grid.mp4` (side by side) into a folder.

    Clips may be of several sizes and lengths: a shorter one stays at its last frame.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = [row.label for row in rows]
    height, width = rows[0].generated.shape[1:3]
    frames = max(len(row.generated) for row in rows)
    picture = folder / "grid.png"
    shares = [0.0, 0.5, 1.0] if frames > 2 else [0.0, 1.0][:frames]
    stills = _columns(rows, [partial(_at_share, share) for share in shares], partial(_at_share, 0.5))
    Image.fromarray(draw_table(labels, stills, height / width)).save(picture)
    if frames == 1:
        return [picture]
    clip = folder / "grid.mp4"
    times = [partial(_at_time, time) for time in range(frames)]
    moving = [draw_table(labels, _columns(rows, [time], time), height / width) for time in times]
    clip.write_bytes(encode_mp4(np.stack(moving * 3), fps))  # three times round: a second alone is hard to see
    return [picture, clip]


def _at_share(share: float, clip: Pixels) -> Pixels:
    """The frame at a share of a clip's time."""
    frame: Pixels = clip[int(share * (len(clip) - 1))]
    return frame


def _at_time(time: int, clip: Pixels) -> Pixels:
    """A frame by its number, of a shorter clip the last."""
    frame: Pixels = clip[min(time, len(clip) - 1)]
    return frame


def _columns(
    rows: Sequence[GridRow], times: Sequence[Callable[[Pixels], Pixels]], compared: Callable[[Pixels], Pixels]
) -> list[Column]:
    """The references, the frames of the generated clips at `times`, and what they are compared with at `compared`."""
    most = max(len(row.references) for row in rows)
    columns: list[Column] = [
        ("" if place else "reference", [row.references[place] if place < len(row.references) else None for row in rows])
        for place in range(most)
    ]
    columns += [("" if number else "generated", [at(row.generated) for row in rows]) for number, at in enumerate(times)]
    for head, clips in (
        ("target", [row.target for row in rows]),
        ("other reference", [row.other for row in rows]),
    ):
        if any(clip is not None for clip in clips):
            columns.append((head, [None if clip is None else compared(clip) for clip in clips]))
    return columns


def draw_table(labels: Sequence[tuple[str, str]], columns: Sequence[Column], shape: float) -> Pixels:
    """A page [h,w,3] of pictures of height / width `shape`, each as large as fits; a label (text, note) a row."""
    wide = max(_SIDE, round(_SIDE / shape))
    width = _TEXT + len(columns) * (wide + _GAP) + _GAP
    height = _HEAD + len(labels) * (_SIDE + _GAP) + _GAP
    canvas = Image.new("RGB", (width + width % 2, height + height % 2), _PAPER)
    pen = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    for number, (head, _) in enumerate(columns):
        pen.text((_TEXT + number * (wide + _GAP), 8), head, fill=_INK, font=font)
    for row, (text, note) in enumerate(labels):
        top = _HEAD + row * (_SIDE + _GAP)
        pen.multiline_text((_GAP, top + 6), _wrapped(text), fill=_INK, font=small, spacing=3)
        pen.text((_GAP, top + _SIDE - 24), note, fill=_FAINT, font=small)
        for number, (_, pictures) in enumerate(columns):
            if (picture := pictures[row]) is not None:
                tile = ImageOps.contain(Image.fromarray(picture), (wide, _SIDE), Image.Resampling.BICUBIC)
                canvas.paste(tile, (_TEXT + number * (wide + _GAP), top + (_SIDE - tile.height) // 2))
    return np.asarray(canvas)


def _wrapped(text: str, width: int = 24, lines: int = 5) -> str:
    wrapped = [""]
    for word in text.split():
        if len(wrapped[-1]) + len(word) >= width:
            wrapped.append("")
        wrapped[-1] = f"{wrapped[-1]} {word}".strip()
    return "\n".join(wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], f"{wrapped[lines - 1]} ..."])
