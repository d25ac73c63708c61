"""Labelling and pairing, killed at a change of their files. Run: python -m pytest
tests/pipelines/curation/test_killed_stages.py (-m nightly: at each one)"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_points import NEVER, contents, run_until
from label_corpora import inline, raw_sample, write_corpus

from domainshuttle.pipelines.curation import stage as frame
from domainshuttle.pipelines.curation.labels import stage as labelling
from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.curation.pairs import stage as pairing
from domainshuttle.pipelines.curation.pairs.candidates import Candidate
from domainshuttle.pipelines.curation.pairs.config import ROLES, PairConfig
from domainshuttle.pipelines.curation.stage import Step, Work
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.media.decode import encode_jpeg
from domainshuttle.pipelines.values import ActorPool


def labelled(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, "pass_through", inline)
        labelling.label_corpus(folder, LabelConfig(), [{"CPU": 2.0}], lambda *_: None)


class Finds:
    """Two pictures of each sample's subject, of its number alone."""

    def __call__(self, works: list[Work]) -> None:
        for work in works:
            number = int(work.row.key.removeprefix("s"))
            picture = encode_jpeg(np.full((20, 30, 3), number, np.uint8))
            work.carried = {"candidates": [self._candidate(work, place, picture) for place in range(2)]}

    def _candidate(self, work: Work, place: int, picture: bytes) -> Candidate:
        angle = 0.7 * place
        vector = np.array([np.cos(angle), np.sin(angle)], np.float32)
        word = work.info.subjects[0].word
        return Candidate(word, "target", place, (0.0, 0.0, 30.0, 20.0), 0.9, "P", (20, 30), 0.9, 0.5, picture,
                         (20, 30), vector, vector)  # fmt: skip


def paired(raw: Path, folder: Path) -> None:
    config = PairConfig.model_validate(
        {"models": dict.fromkeys(ROLES, "/x"), "least_dino": 0.1, "least_clip": 0.0, "least_side": 1, "pictures": 2}
    )
    pools = {name: ActorPool() for name in ("decode", "find", "embed", "choose")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairing, "pass_through", inline)
        patch.setattr(frame, "pass_through", inline)
        patch.setattr(pairing, "find_steps", lambda *_: [Step(Finds)])
        patch.setattr(pairing, "model_digest", lambda *_: "0")
        silent = lambda *_: None  # noqa: E731
        pairing.pair_corpus(CorpusSpec("mine", "raw", str(raw)), folder, config, pools, silent, silent, 0.05, 4)


def killed_at(points: Iterable[int], place: Callable[[str], Path], work: Callable[[Path], None], root: Path) -> int:
    """A stage with a kill at each point, until it comes to its end; returns how many points there were."""
    whole = place("whole")
    assert run_until(NEVER, lambda: work(whole), root)
    expected, number = contents(whole), 0
    for point in points:
        folder = place(f"killed-{point}")
        if run_until(point, lambda folder=folder: work(folder), root):
            break
        assert run_until(NEVER, lambda folder=folder: work(folder), root)
        assert contents(folder) == expected, point
        number += 1
    return number


def label_at(points: Iterable[int], root: Path) -> int:
    def corpus(name: str) -> Path:
        return write_corpus(root / name, map(raw_sample, range(12)))

    return killed_at(points, corpus, labelled, root)


def pair_at(points: Iterable[int], root: Path) -> int:
    raw = write_corpus(root / "raw", map(raw_sample, range(12)))
    number = killed_at(points, lambda name: root / name, lambda folder: paired(raw, folder), root)
    assert {"index.parquet", "trace.jsonl", "report.json"} < {*contents(root / "whole")}
    return number


@pytest.mark.parametrize("stage", [label_at, pair_at])
def test_a_killed_stage_goes_on_to_the_same_bytes(tmp_path: Path, stage: Any) -> None:
    points = np.random.default_rng(7).choice(25, 3, replace=False).tolist()
    assert stage(points, tmp_path) == 3


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [label_at, pair_at])
def test_wherever_a_stage_is_killed_it_goes_on_to_the_same_bytes(tmp_path: Path, stage: Any) -> None:
    assert 25 < stage(range(500), tmp_path) < 500
