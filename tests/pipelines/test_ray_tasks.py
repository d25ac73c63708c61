"""Ray tasks over pieces of work. Run: python -m pytest tests/pipelines/test_ray_tasks.py"""

import os
from pathlib import Path

import pytest

from domainshuttle.pipelines.ray_tasks import each_result

pytestmark = pytest.mark.usefixtures("ray_cluster")


def square(number: int, folder: Path) -> int:
    if number == 3:
        os._exit(1)  # as a decoder that crashes would
    if number == 4 and not (folder / "tried").exists():
        (folder / "tried").touch()
        os._exit(1)
    if number > 10:
        raise ValueError(f"{number} is too large")
    return number * number


def test_a_piece_that_kills_its_worker_does_not_end_the_work(tmp_path: Path) -> None:
    work = [(number, tmp_path) for number in range(8)]
    found = {piece[0]: result for piece, result in each_result(square, work, at_once=3, retries=1)}
    assert isinstance(found.pop(3), Exception)
    assert found == {number: number * number for number in range(8) if number != 3}


def test_errors_of_the_function_are_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="11 is too large"):
        list(each_result(square, [(number, tmp_path) for number in (1, 11)]))
    assert list(each_result(square, [])) == []
