"""Every conversion of pictures and clips over many sizes, as digests: what test_same_bytes compares between processes.

Run: python conversions.py FOLDER ROUNDS (writes JSON: each name with the digests that were found)
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import (
    Pixels,
    decode_image,
    decode_video,
    encode_jpeg,
    encode_mp4,
    fit_reference,
    fit_target,
)

SIZES = [
    (18, 20),
    (48, 22),
    (96, 24),
    (50, 36),
    (96, 42),
    (48, 62),
    (34, 66),
    (96, 96),
    (50, 102),
    (16, 130),
    (64, 176),
]
"""Heights and widths of which some had other bytes from time to time, some lie on the widths of registers."""
BUCKET = parse_bucket("5x48x64")


def moving(height: int, width: int, frames: int = 9) -> Pixels:
    """[frames,h,w,3]: blocks of random colours that move."""
    blocks = np.random.default_rng(height * 1000 + width).integers(
        0, 256, (height // 8 + 4, width // 8 + 5, 3), np.uint8
    )
    scene = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return np.stack([scene[2 * k : 2 * k + height, 3 * k : 3 * k + width] for k in range(frames)])


def conversions(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What each conversion gives: those of drawn frames, and those of the files in `folder`."""
    for height, width in SIZES:
        clip, name = moving(height, width), f"{height}x{width}"
        data = encode_mp4(clip, 8.0)
        yield f"{name} to H.264", data
        yield f"{name} from H.264", decode_video(data, 9).tobytes()
        yield f"{name} to JPEG", encode_jpeg(clip[0])
        yield f"{name} from JPEG", decode_image(encode_jpeg(clip[0])).tobytes()
        yield f"{name} to its bucket", fit_target(clip[:2], BUCKET).tobytes() + fit_reference(clip[0], BUCKET).tobytes()
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        try:
            if path.suffix in (".jpg", ".png", ".webp"):
                yield path.name, decode_image(data).tobytes()
            else:
                yield path.name, decode_video(data, 5).tobytes() + decode_video(data, 5, 8.0, fit=BUCKET).tobytes()
        except DataError as error:
            yield path.name, str(error).encode()


def main() -> None:
    found: dict[str, set[str]] = {}
    held = []
    for number in range(int(sys.argv[2])):
        held.append(bytearray(np.random.default_rng(number).integers(1, 100_000)))  # another place in memory each round
        for name, data in conversions(Path(sys.argv[1])):
            found.setdefault(name, set()).add(hashlib.md5(data).hexdigest())
    sys.stdout.write(json.dumps({name: sorted(digests) for name, digests in found.items()}))


if __name__ == "__main__":
    main()
