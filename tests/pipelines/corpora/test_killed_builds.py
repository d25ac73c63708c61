"""Builds of every kind of source, killed at a change of their files. Run: python -m pytest
tests/pipelines/corpora/test_killed_builds.py (-m nightly: at each one)"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_points import NEVER, contents, run_until
from sources.every import A_CAPTION, EVERY

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.corpora import builder
from domainshuttle.pipelines.index.table import Index

BUCKETS = [parse_bucket("1x16x16"), parse_bucket("5x16x16")]


def in_turn(function: Any, work: Any) -> Iterator[tuple[Any, Any]]:
    """As `each_result`, in this process."""
    for piece in work:
        yield piece, function(*piece)


def build(config: Any, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "each_result", in_turn)
        builder.build_corpus("mine", config, BUCKETS, folder, lambda *_: None, samples_per_part=1)


def killed_at(points: Any, name: str, tmp_path: Path) -> int:
    """Builds with a kill at each point, until it comes to its end; returns how many points there were."""
    config = EVERY[name](tmp_path / "root", A_CAPTION)
    assert run_until(NEVER, lambda: build(config, tmp_path / "whole"), tmp_path)
    whole = contents(tmp_path / "whole")
    assert len(Index.load(tmp_path / "whole" / "index.parquet")) == 2
    for number, point in enumerate(points):
        folder = tmp_path / f"killed-{point}"
        if run_until(point, lambda folder=folder: build(config, folder), tmp_path):
            return number
        if (folder / "index.parquet").exists():  # whole, or none
            assert (folder / "index.parquet").read_bytes() == whole["index.parquet"]
        assert run_until(NEVER, lambda folder=folder: build(config, folder), tmp_path)
        assert contents(folder) == whole, point
    return len(points)


@pytest.mark.parametrize("name", ["uno", "musar-gen", "manifest, CSV", "webdataset, tar.gz"])
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    points = np.random.default_rng(len(name)).choice(30, 2, replace=False)
    assert killed_at(points, name, tmp_path) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("name", EVERY)
def test_wherever_a_build_is_killed_it_goes_on_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    assert 30 < killed_at(range(500), name, tmp_path) < 500
