"""What pictures' files say beside their pixels, where neither simplejpeg nor Pillow tells."""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.colours import BT709, ColourSpace, named
from domainshuttle.pipelines.sample import Buffer

_START_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_SRGB_GAMMA, _LEAST_GAMMA, _MOST_GAMMA = 45455, 10_000, 1_000_000
"""In hundred-thousandths."""
GREY, RGB = 0, 2
"""PNG's colour types."""


def jpeg_is_plain(data: Buffer, name: str) -> bool:
    """Whether a JPEG has nothing that changes how its levels look: no EXIF or XMP, no ICC profile, no other
    pictures (MPF), 8 bits, grey or three channels. A walk over the segments before the pixels; what it does not
    understand is not plain.

    Raises DataError for pixels that are not square.
    """
    view, position, common = memoryview(data).cast("B"), 2, False
    while position + 4 <= len(view) and view[position] == 0xFF:
        marker, size = view[position + 1], int.from_bytes(view[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        content = view[position + 4 : position + 2 + size]
        if marker in _START_OF_FRAME:  # after which, too, notes may stand
            common = len(content) > 5 and content[0] == 8 and content[5] in (1, 3)
        if marker == 0xE0 and bytes(content[:5]) == b"JFIF\0" and len(content) >= 12:
            _check_square(name, *struct.unpack_from(">HH", content, 8))
        if marker == 0xDA:
            return common
        if size < 2 or marker == 0xE1:
            return False
        if marker == 0xE2 and bytes(content[:11]).startswith((b"ICC_PROFILE", b"MPF\0")):
            return False
        position += 2 + size
    return False


@dataclass(frozen=True)
class PngTags:
    """What a PNG says before its pixels."""

    depth: int
    """Bits a channel."""
    colour_type: int
    hidden: bool
    """Whether one level or colour is transparent."""
    coded: bool
    """Whether it names its colours by cICP, which stands above an ICC profile."""
    space: ColourSpace | None
    """Its colours by cICP, or by gAMA and cHRM where no sRGB and no ICC profile stands above them; None for sRGB."""


def check_png(data: Buffer, name: str) -> None:
    """Compares each chunk with its checksum, which Pillow does not do for pixels: raises DataError for a PNG that is
    damaged, or cut before its end."""
    view, position = memoryview(data).cast("B"), 8
    while position + 12 <= len(view):
        size, kind = int.from_bytes(view[position : position + 4], "big"), bytes(view[position + 4 : position + 8])
        end = position + 8 + size
        if end + 4 > len(view):
            break
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise DataError(f"{name}: damaged: the checksum of its chunk {kind!r} at byte {position} is another")
        if kind == b"IEND":
            return
        position = end + 4
    raise DataError(f"{name}: damaged: it is cut at byte {len(view)}, before its end")


def png_tags(data: Buffer, name: str) -> PngTags:
    """Raises DataError for colours that can't be shown, and for pixels that are not square."""
    chunks = dict(_chunks(data))
    header = chunks.get(b"IHDR", b"")
    if len(header) != 13:
        raise DataError(f"{name}: not a readable PNG picture (no header)")
    if len(density := chunks.get(b"pHYs", b"")) == 9:
        _check_square(name, *struct.unpack_from(">II", density))
    space = None
    if coded := len(chunks.get(b"cICP", b"")) == 4:
        primaries, transfer, matrix, full = chunks[b"cICP"]
        if matrix or not full:
            raise DataError(f"{name}: cICP with matrix {matrix} and range {full}; expected RGB (0) in full range (1)")
        space = named(primaries, transfer, name)
    elif not {b"iCCP", b"sRGB"} & chunks.keys():
        space = _by_gamma(chunks)
    return PngTags(header[8], header[9], b"tRNS" in chunks, coded, space)


def _by_gamma(chunks: dict[bytes, bytes]) -> ColourSpace | None:
    """The colours of gAMA and cHRM. Those that writers of sRGB give to readers that know no sRGB are sRGB."""
    gamma = int.from_bytes(chunks[b"gAMA"], "big") if len(chunks.get(b"gAMA", b"")) == 4 else 0
    chromaticities = BT709
    if len(chunks.get(b"cHRM", b"")) == 32:
        wx, wy, *rgb = (value / 100_000 for value in struct.unpack(">8I", chunks[b"cHRM"]))
        found = (*rgb, wx, wy)
        if max(abs(one - other) for one, other in zip(found, BT709, strict=True)) > 0.002:
            chromaticities = found
    if gamma and not _LEAST_GAMMA <= gamma <= _MOST_GAMMA:
        raise DataError(f"gAMA of {gamma / 100_000:g} is that of no screen: expected 0.1 to 10")
    if chromaticities == BT709 and (not gamma or abs(gamma - _SRGB_GAMMA) < 100):
        return None
    return ColourSpace(chromaticities, 100_000 / gamma if gamma else "sRGB")


def _chunks(data: Buffer) -> Iterator[tuple[bytes, bytes]]:
    """The chunks before the pixels."""
    view, position = memoryview(data).cast("B"), 8
    while position + 8 <= len(view):
        size, kind = int.from_bytes(view[position : position + 4], "big"), bytes(view[position + 4 : position + 8])
        if kind == b"IDAT":
            return
        yield kind, bytes(view[position + 8 : position + 8 + min(size, 1 << 16)])
        position += 12 + size


def _check_square(name: str, across: int, down: int) -> None:
    """Densities are read in two ways, as pixels an inch and as the shape of one, so neither is guessed."""
    if across and down and abs(across / down - 1) > 0.01:
        raise DataError(
            f"{name}: its pixels are not square (density {across}x{down}): scale it to square ones, or remove that note"
        )
