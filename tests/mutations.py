"""Seeded damage to files: what disks, broken downloads and careless editing do."""

from pathlib import Path

import numpy as np


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """Bytes with one kind of damage that `random` draws: cut, changed, zeroed, removed, repeated, or mixed up."""
    size = len(data)
    place, length = int(random.integers(size)), int(random.integers(1, 64))
    match int(random.integers(6)):
        case 0:
            return data[:place]
        case 1:
            changed = bytearray(data)
            for where in random.integers(size, size=random.integers(1, 4)):
                changed[where] ^= 1 << int(random.integers(8))
            return bytes(changed)
        case 2:
            return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]
        case 3:
            return data[:place] + data[place + length :]
        case 4:
            return data[: place + length] + data[place:]
        case _:
            return data[:place] + random.bytes(length) + data[place + length :]


def damage_one(files: list[Path], random: np.random.Generator) -> Path:
    """Damages one of some files; returns which."""
    path = files[int(random.integers(len(files)))]
    path.write_bytes(damaged(path.read_bytes(), random))
    return path
