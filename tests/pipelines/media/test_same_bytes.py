"""The same input gives the same bytes, whatever was in memory before and whatever runs beside it.

Memory that is read before it was written is not found by trying again: most of the time it holds the same. So glibc is
asked to fill what it hands out with another pattern in each process, and all processes must agree.

Run: python -m pytest tests/pipelines/media/test_same_bytes.py
"""

import json
import os
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from media_files import ALPHA, CODECS, INTERLACED, MODES, Traits, clip, picture, scene

CONVERSIONS = Path(__file__).with_name("conversions.py")
PATTERN = (
    "import ctypes; m = ctypes.CDLL(None).malloc; m.restype = ctypes.c_void_p; print(ctypes.string_at(m(999), 9).hex())"
)


def filled(pattern: int) -> dict[str, str]:
    """The environment of a process whose fresh memory holds `pattern`, also in large pieces."""
    tunables = f"glibc.malloc.perturb={pattern}:glibc.malloc.mmap_max=0"
    return os.environ | {"MALLOC_PERTURB_": str(pattern), "MALLOC_MMAP_MAX_": "0", "GLIBC_TUNABLES": tunables}


def started(folder: Path, pattern: int, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(CONVERSIONS), str(folder), str(rounds)],
        env=filled(pattern),
        stdout=subprocess.PIPE,
        text=True,
    )


def digests(process: subprocess.Popen[str]) -> dict[str, list[str]]:
    said, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(said)


SIZES = [(50, 34), (64, 96), (18, 130), (34, 66), (98, 50)]
"""Heights and widths, some beside the widths of registers."""


def fill(folder: Path, sizes: int) -> None:
    """Clips of each codec and form, plain, stretched and interlaced, and pictures of each kind, of some sizes each."""
    number = 0
    for codec in [*CODECS, *ALPHA]:
        for _ in range(sizes):
            number += 1
            height, width = SIZES[number % len(SIZES)]
            if codec.name in ("libsvtav1", "libx265"):  # the one takes no small ones, the other writes beside them
                height, width = 64, 96
            frames = np.stack([scene(3 * k, height, width) for k in range(6)])
            if codec in ALPHA:
                frames = np.concatenate([frames, frames[..., :1]], axis=-1)
            aspect = Fraction(1 + number % 3, 2)
            full = True if codec.form == "gray" else None
            traits = Traits(aspect, full=full, interlaced=codec in INTERLACED and height % 4 == 0)
            (folder / f"{number}-{codec.label}-{height}x{width}.clip").write_bytes(clip(codec, traits, frames))
    for kind, modes in MODES.items():
        for mode, wide in product(modes, (False, True)):
            number += 1
            height, width = (size - number % 2 for size in SIZES[number % len(SIZES)])
            data = picture(kind, mode, wide and mode != "CMYK", 1 + number % 8, height, width)
            (folder / f"{number}-{mode.replace(';', '')}.{kind.lower().replace('jpeg', 'jpg')}").write_bytes(data)


def test_memory_is_filled() -> None:
    """That the instrument works: glibc writes the complement of the pattern into what it hands out."""
    for pattern in (85, 170):
        run = subprocess.run([sys.executable, "-c", PATTERN], env=filled(pattern), capture_output=True, text=True)
        if run.returncode:
            pytest.skip("this C library fills no memory")
        assert run.stdout.strip() == f"{pattern ^ 255:02x}" * 9


def test_what_was_in_memory_changes_no_byte(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    found = [digests(process) for process in [started(tmp_path, pattern, 1) for pattern in (0, 85, 170)]]
    assert len(found[0]) >= 100
    for others in found[1:]:
        assert {name for name, of_name in found[0].items() if others[name] != of_name} == set()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_thousands_of_conversions_beside_other_work_change_no_byte(tmp_path: Path) -> None:
    """Four at a time on two cores, so that each is interrupted and moved all the time."""
    fill(tmp_path, 2)
    found = [digests(process) for process in [started(tmp_path, pattern, 40) for pattern in (0, 0, 85, 170)]]
    assert sum(len(of_name) for of_name in found[0].values()) == len(found[0])
    assert all(others == found[0] for others in found[1:])
