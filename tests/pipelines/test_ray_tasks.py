"""Ray tasks over pieces of work. Run: python -m pytest tests/pipelines/test_ray_tasks.py"""

import os
from pathlib import Path

import pytest

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.ray_tasks import each_by_actors, each_result
from domainshuttle.pipelines.values import ActorPool

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


class Squarer:
    """Made once an actor: its file says by which process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / f"made-{os.getpid()}").touch()

    def __call__(self, number: int) -> int:
        if number == 12:
            raise DataError("12 is refused")
        return square(number, self.folder)


def test_actors_are_made_once_and_a_piece_that_kills_them_is_given_up(tmp_path: Path) -> None:
    pool = ActorPool(actors=2, cpus=0.5)
    found = dict(each_by_actors(Squarer, (tmp_path,), range(8), pool, tries=2))
    assert isinstance(found.pop(3), Exception)  # killed its actor each time
    assert found == {number: number * number for number in range(8) if number != 3}  # 4 once, and was tried again
    # one more for each of three deaths, but for the last one where nothing else was left to do
    assert len(list(tmp_path.glob("made-*"))) in (2 + 2, 2 + 3)
    (last := tmp_path / "last").mkdir()
    assert len(dict(each_by_actors(Squarer, (last,), [3], pool, tries=1))) == 1
    assert len(list(last.glob("made-*"))) == 1  # no other actor: there is nothing for it to do
    assert dict(each_by_actors(Squarer, (tmp_path,), [1, 2], None)) == {1: 1, 2: 4}
    assert (tmp_path / f"made-{os.getpid()}").exists()


@pytest.mark.parametrize("pool", [None, ActorPool(cpus=0.5)])
def test_faults_of_users_come_as_they_are(tmp_path: Path, pool: ActorPool | None) -> None:
    with pytest.raises(DataError, match=r"^12 is refused$"):
        list(each_by_actors(Squarer, (tmp_path,), [12], pool))
    with pytest.raises(FileNotFoundError):
        list(each_by_actors(Squarer, (tmp_path / "nowhere",), [1], pool))
