"""Encoding, killed at a change of its files. Run: python -m pytest tests/pipelines/encoding/test_killed_encoding.py (-m
nightly: at each one)"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from encoded_corpora import SAMPLES, Ran, captioned, inline_actors, run, write_raw
from kill_points import NEVER, contents, run_until

from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.shards.tar import read_members, sample_checksum

ran = pytest.fixture(inline_actors)
FIRST = {"a": SAMPLES[:6]}
GROWN = {"a": [SAMPLES[0], captioned(SAMPLES[1], "Another caption."), *SAMPLES[3:6]], "b": SAMPLES[6:10]}
"""Of which a sample is unchanged, one has another caption, one is gone, and some are new."""


def require_readable(folder: Path) -> None:
    """A corpus has an index, of before or of now, whose samples are all there; or none."""
    place = folder / "encoded" / "index.parquet"
    if place.exists():
        index = Index.load(place)
        for row in index.rows(np.arange(len(index))):
            assert sample_checksum(read_members(folder / "encoded", row.shard, row.members)) == row.checksum


def killed_at(points: Iterable[int], grown: bool, root: Path) -> int:
    """Encodes, or encodes what a corpus grew by, with a kill at each point, until it comes to its end; returns how many
    points there were."""
    begun, whole = root / "begun", root / "whole"
    write_raw(begun, FIRST)
    if grown:
        assert run_until(NEVER, lambda: run(begun), root)
        write_raw(begun, GROWN)
    shutil.copytree(begun / "raw", whole / "raw")
    assert run_until(NEVER, lambda: run(whole), root)
    expected, number = contents(whole / "encoded"), 0
    for point in points:
        folder = root / f"killed-{point}"
        shutil.copytree(begun, folder)
        if run_until(point, lambda folder=folder: run(folder), root):
            break
        require_readable(folder)
        assert run_until(NEVER, lambda folder=folder: run(folder), root)
        assert contents(folder / "encoded") == expected, point
        shutil.rmtree(folder)
        number += 1
    return number


@pytest.mark.parametrize("grown", [False, True])
def test_a_killed_encoding_goes_on_to_the_same_bytes(tmp_path: Path, ran: Ran, grown: bool) -> None:
    points = np.random.default_rng(grown).choice(12, 2, replace=False).tolist()
    assert killed_at(points, grown, tmp_path) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("grown", [False, True])
def test_wherever_encoding_is_killed_it_goes_on_to_the_same_bytes(tmp_path: Path, ran: Ran, grown: bool) -> None:
    assert 12 < killed_at(range(500), grown, tmp_path) < 500
