"""The picture people look at: reference, generated clip, target, and what another reference gives, a row a case."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from domainshuttle.pipelines.media import Pixels, encode_mp4

_SIDE, _GAP, _TEXT, _HEAD = 128, 8, 190, 30


@dataclass(frozen=True)
class GridRow:
    """One case: pictures [h,w,3] and clips [F,h,w,3], uint8."""

    caption: str
    domain: str
    reference: Pixels
    generated: Pixels
    target: Pixels
    other: Pixels
    """Generated from the same noise and caption with another subject's reference."""


def write_grid(rows: list[GridRow], folder: Path, fps: float) -> tuple[Path, Path]:
    """Writes `grid.png` (three frames of each clip) and `grid.mp4` (the clips side by side) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    last = len(rows[0].generated) - 1
    stills = ("reference", "generated", "", "", "target", "other reference")
    page = [
        [row.reference, row.generated[0], row.generated[last // 2], row.generated[last],
         row.target[last // 2], row.other[last // 2]]
        for row in rows
    ]  # fmt: skip
    picture = folder / "grid.png"
    Image.fromarray(_page(rows, stills, page)).save(picture)
    moving = ("reference", "generated", "target", "other reference")
    frames = [
        _page(rows, moving, [[r.reference, r.generated[t], r.target[t], r.other[t]] for r in rows])
        for t in range(last + 1)
    ]
    clip = folder / "grid.mp4"
    clip.write_bytes(encode_mp4(np.stack(frames * 3), fps))  # three times round: a second alone is hard to see
    return picture, clip


def _page(rows: list[GridRow], heads: tuple[str, ...], cells: list[list[Pixels]]) -> Pixels:
    width = _TEXT + len(heads) * (_SIDE + _GAP) + _GAP
    height = _HEAD + len(rows) * (_SIDE + _GAP) + _GAP
    canvas = Image.new("RGB", (width + width % 2, height + height % 2), (250, 250, 250))
    pen = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    for column, head in enumerate(heads):
        pen.text((_TEXT + column * (_SIDE + _GAP), 8), head, fill=(40, 40, 48), font=font)
    for number, (row, pictures) in enumerate(zip(rows, cells, strict=True)):
        top = _HEAD + number * (_SIDE + _GAP)
        pen.multiline_text((_GAP, top + 6), _wrapped(row.caption), fill=(40, 40, 48), font=small, spacing=3)
        pen.text((_GAP, top + _SIDE - 24), f"domain: {row.domain}", fill=(110, 110, 124), font=small)
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            canvas.paste(tile, (_TEXT + column * (_SIDE + _GAP), top))
    return np.asarray(canvas)


def _wrapped(text: str, width: int = 24) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
