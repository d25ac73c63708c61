"""Parts of the worker's recipe; whole trainings are tests/platform/driver/test_training.py and its neighbours.

Run: python -m pytest tests/platform/test_train.py
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from domainshuttle.platform import train
from domainshuttle.platform.checkpoint.async_writer import AsyncCheckpointer, Saved, SavesFailedError
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState
from domainshuttle.platform.config.schema import CheckpointSection


@pytest.mark.parametrize("failing", [0, 2, 9])
def test_the_last_save_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """No later one makes up for it: a store that is away for a moment costs no step."""
    monkeypatch.setattr(train, "_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    settings = CheckpointSection(every=1, max_failed=3)
    checkpoints = AsyncCheckpointer(CheckpointStore(tmp_path), settings, 0, 1, lambda mine: [mine])
    tries, told = list[int](), list[Saved]()

    def write(folder: Path) -> None:
        tries.append(len(tries))
        if len(tries) <= failing:
            raise OSError("the store does not answer")
        (folder / "part").write_bytes(b"weights")

    def saved(ended: Sequence[Saved]) -> None:
        told.extend(ended)

    engine: Any = SimpleNamespace(snapshot=lambda: write)
    monitor: Any = SimpleNamespace(checkpointing=contextlib.nullcontext, saved=saved)
    state = TrainingState("stage1", 7, 1, 1, "d", {}, {}, {})
    train.save(checkpoints, state, engine)
    with pytest.raises(SavesFailedError) if failing > 2 else contextlib.nullcontext():
        train.end_last_save(checkpoints, monitor, state, engine)
    newest = CheckpointStore(tmp_path).newest("stage1")
    assert (newest.state.step if newest else None) == (7 if failing < 3 else None)
    assert len(tries) == min(failing, 2) + 1
    assert [bool(one.fault) for one in told] == [True] * min(failing, 3) + [False] * (failing < 3)


def test_where_nothing_was_saved_nothing_is_waited_for(tmp_path: Path) -> None:
    checkpoints = AsyncCheckpointer(CheckpointStore(tmp_path), CheckpointSection(every=1), 0, 1, lambda mine: [mine])
    monitor: Any = SimpleNamespace(checkpointing=contextlib.nullcontext, saved=lambda ended: None)
    train.end_last_save(checkpoints, monitor, None, cast(Any, None))
