"""EXIF orientation: cameras store a picture as the sensor saw it and say how it is to be turned for looking at."""

import struct

import numpy as np
from numpy.typing import NDArray

from domainshuttle.pipelines.sample import Buffer

Pixels = NDArray[np.uint8]

_ORIENTATION = 0x0112
_SHORT = 3


def upright(picture: Pixels, turned: int) -> Pixels:
    """[h,w,3] as it is to be looked at, by its EXIF orientation `turned` (1 to 8; 1: as it is): [h,w,3] or [w,h,3]."""
    if turned in (5, 6, 7, 8):
        picture = picture.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        picture = picture[::-1]
    if turned in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture)


def jpeg_orientation(data: Buffer) -> int:
    """The EXIF orientation of a JPEG, 1 where it says none: a walk over the segments before the picture itself."""
    view, position = memoryview(data).cast("B"), 2
    while position + 4 <= len(view) and view[position] == 0xFF:
        marker, size = view[position + 1], int.from_bytes(view[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xDA or size < 2:
            return 1
        if marker == 0xE1 and bytes(view[position + 4 : position + 10]) == b"Exif\0\0":
            return orientation(bytes(view[position + 4 : position + 2 + size]))
        position += 2 + size
    return 1


def orientation(exif: bytes) -> int:
    """The orientation of EXIF data, with or without its `Exif` head; 1 where they say none or can't be read, as the
    picture can."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
