"""Files and folders appear whole or not at all, whenever their writer dies, and locks end with their holder.

Run: python -m pytest tests/pipelines/storage/test_atomic.py
"""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from domainshuttle.pipelines.storage import atomic
from domainshuttle.pipelines.storage.atomic import atomic_file, atomic_folder
from domainshuttle.pipelines.storage.locks import locked

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from domainshuttle.pipelines.storage.atomic import atomic_file, atomic_folder
from domainshuttle.pipelines.storage.locks import locked
place = Path(sys.argv[1])
"""


def run(program: str, *arguments: object) -> int:
    command = [sys.executable, "-c", PROGRAM + textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, timeout=120).returncode


def killed(program: str, place: Path) -> None:
    assert run(program, place) == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has no locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_file_is_replaced_when_the_block_ends_and_kept_where_it_raises(tmp_path: Path) -> None:
    place = tmp_path / "in" / "file"
    for content in ("one", "two"):
        with atomic_file(place) as aside:
            assert aside.parent == place.parent and aside.read_bytes() == b""
            aside.write_text(content)
            assert not place.exists() or place.read_text() == "one"
        assert place.read_text() == content and names(place.parent) == ["file"]
    for how in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(how), atomic_file(place) as aside:
            aside.write_text("half")
            raise how
        assert place.read_text() == "two" and names(place.parent) == ["file"]


def test_devices_pipes_and_folders_are_not_replaced_by_a_file_and_links_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").symlink_to("/dev/null")  # as /dev/stdout is one
    for name in ("pipe", "folder", "out"):
        before = os.lstat(tmp_path / name)
        with pytest.raises(FileExistsError, match=f"is no file.* path.*{name}"), atomic_file(tmp_path / name):
            pytest.fail("the work has begun")
        assert os.path.samestat(os.lstat(tmp_path / name), before)
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("link", "broken"):
        with atomic_file(tmp_path / name) as aside:
            aside.write_text("new")
        assert (tmp_path / name).read_text() == "new" and not (tmp_path / name).is_symlink()
    assert (tmp_path / "kept").read_text() == "kept" and not (tmp_path / "nowhere").exists()


def test_a_folder_is_replaced_when_the_block_ends_and_kept_where_it_raises(tmp_path: Path) -> None:
    place = tmp_path / "in" / "folder"
    for content in ("one", "two"):
        with atomic_folder(place) as aside:
            (aside / "deeper").mkdir()
            (aside / "deeper" / content).write_text(content)
            assert not place.exists() or names(place / "deeper") == ["one"]
        assert names(place / "deeper") == [content] and names(place.parent) == ["folder"]
    for how in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(how), atomic_folder(place) as aside:
            (aside / "half").touch()
            raise how
        assert names(place / "deeper") == ["two"] and names(place.parent) == ["folder"]


def test_modes_are_those_that_the_umask_leaves(tmp_path: Path) -> None:
    for mask in (0o022, 0o007, 0o077):
        former = os.umask(mask)
        try:
            with atomic_file(tmp_path / f"file-{mask:o}") as aside:
                aside.write_text("")
            with atomic_folder(tmp_path / f"folder-{mask:o}"):
                pass
        finally:
            os.umask(former)
        assert (tmp_path / f"file-{mask:o}").stat().st_mode & 0o777 == 0o666 & ~mask
        assert (tmp_path / f"folder-{mask:o}").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_link_to_a_folder_stays_one_and_a_mount_point_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    with atomic_folder(tmp_path / "link") as aside:
        (aside / "new").touch()
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "disk" / "folder") == ["new"]
    with (
        pytest.raises(OSError, match="mount point can't be replaced: name a folder in it"),
        atomic_folder(Path("/proc")),
    ):
        raise AssertionError("the work was done")


FILE_THAT_DIES = """
with atomic_file(place) as aside:
    aside.write_bytes(b"half" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""
FOLDER_THAT_DIES = """
with atomic_folder(place) as aside:
    (aside / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("program", "make"), [(FILE_THAT_DIES, atomic_file), (FOLDER_THAT_DIES, atomic_folder)])
def test_what_killed_writers_left_is_hidden_and_taken_by_the_next(
    tmp_path: Path, program: str, make: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    place = tmp_path / "place"
    killed(program, place)
    left = names(tmp_path)
    assert left and all(name.startswith(".place.") and name.endswith(".partial") for name in left)
    killed(program, place)
    assert names(tmp_path) == left, "it grows with each that dies"
    with make(place) as aside:
        assert aside.is_dir() or aside.read_bytes() == b""
        assert not aside.is_dir() or not names(aside)
    assert names(tmp_path) == ["place"]


def test_a_folder_whose_writer_died_between_the_renames_is_put_back(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with atomic_folder(place) as aside:
        (aside / "first").touch()
    killed(
        """
        rename = Path.rename
        def once(self, target):
            rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = once
        with atomic_folder(place) as aside:
            (aside / "second").touch()
        """,
        place,
    )
    assert not place.exists()
    with pytest.raises(ZeroDivisionError), atomic_folder(place):
        raise ZeroDivisionError
    assert names(place) == ["first"] and names(tmp_path) == ["place"]


def test_a_folder_that_can_not_take_the_place_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    with atomic_folder(place) as aside:
        (aside / "first").touch()
    rename, done = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        done.append(self)
        if len(done) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(place) as aside:
        (aside / "second").touch()
    assert len(done) == 3 and names(place) == ["first"] and names(tmp_path) == ["place"]


@pytest.mark.parametrize("locks", [True, False])
def test_writers_of_one_place_do_not_mix(tmp_path: Path, locks: bool, request: pytest.FixtureRequest) -> None:
    if not locks:
        request.getfixturevalue("without_locks")
    place = tmp_path / "file"

    def write(number: int) -> None:
        with atomic_file(place, sync=False) as aside, aside.open("wb") as file:
            for _ in range(20):
                file.write(bytes([number]) * 1000)
                file.flush()
                time.sleep(0.0005)
        with atomic_folder(tmp_path / f"folder-{number % 3}") as aside:
            (aside / "a").write_text(str(number))
            (aside / "b").write_text(str(number))

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(write, range(24)):
            content = place.read_bytes()
            assert len(content) == 20_000 and len({*content}) == 1
    for number in range(3):
        folder = tmp_path / f"folder-{number}"
        assert (folder / "a").read_text() == (folder / "b").read_text()
    assert names(tmp_path) == ["file", "folder-0", "folder-1", "folder-2"]


def test_writers_in_other_processes_do_not_mix(tmp_path: Path) -> None:
    program = """
    for number in range(30):
        with atomic_file(place, sync=False) as aside, aside.open("wb") as file:
            for _ in range(10):
                file.write(bytes([int(sys.argv[2])]) * 1000)
                file.flush()
    """
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda number: run(program, tmp_path / "file", number), range(4))] == [0] * 4
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 10_000 and len({*content}) == 1 and names(tmp_path) == ["file"]


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def name(path: object) -> str:
        return str(Path(str(path)).relative_to(tmp_path)).split("/", 1)[-1] if str(path) != str(tmp_path) else "."

    def noted(descriptor: int) -> None:
        said.append(f"sync {name(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", lambda one, to: (said.append(f"name {name(to)}"), rename(one, to))[1])
    monkeypatch.setattr(Path, "replace", lambda one, to: (said.append(f"name {name(to)}"), replace(one, to))[1])
    with atomic_folder(tmp_path / "folder") as aside:
        (aside / "x" / "y").mkdir(parents=True)
        (aside / "x" / "y" / "z").touch()
        (aside / "w").touch()
        (aside / "link").symlink_to("nowhere")
    *first, named, last = said
    assert (named, last) == ("name folder", "sync .")
    assert {"sync w", "sync x", "sync x/y", "sync x/y/z"} <= {*first} and "sync link" not in first
    said.clear()
    with atomic_file(tmp_path / "file"):
        pass
    assert len(said) == 3 and said[0].startswith("sync .file") and said[1:] == ["name file", "sync ."]
    said.clear()
    with atomic_file(tmp_path / "file", sync=False):
        pass
    assert said == ["name file"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with atomic_file(tmp_path / "file") as aside:
        aside.write_text("first")
    with atomic_folder(tmp_path / "folder") as aside:
        (aside / "first").touch()
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"), atomic_file(tmp_path / "file") as aside:
        aside.write_text("second")
    with pytest.raises(OSError, match="No space"), atomic_folder(tmp_path / "folder") as aside:
        (aside / "second").touch()
    assert (tmp_path / "file").read_text() == "first" and names(tmp_path / "folder") == ["first"]
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written_to_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError), atomic_file(tmp_path / "file"):
        pass


def test_a_lock_keeps_others_out_until_its_holder_ends_or_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", PROGRAM + "with locked(place) as held: print(held, flush=True); time.sleep(60)"]
    with subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "True\n"
        began = time.monotonic()
        with locked(path) as held:
            assert not held and time.monotonic() - began < 1
        with locked(path, wait=0.3) as held:
            assert not held and 0.3 <= time.monotonic() - began < 5
        other.kill()
        other.wait()
        with locked(path) as held:
            assert held, "a dead holder's lock is free at once"
    with locked(path) as held, locked(path) as again:
        assert held and not again, "threads and callers of one process keep each other out as well"
    with pytest.raises(ZeroDivisionError), locked(path) as held:
        raise ZeroDivisionError
    with locked(path, wait=5) as held:
        assert held
    with ThreadPoolExecutor(8) as pool:
        inside: list[int] = []

        def work(number: int) -> None:
            with locked(path, wait=60) as held:
                assert held and not inside
                inside.append(number)
                time.sleep(0.001)
                inside.remove(number)

        list(pool.map(work, range(40)))


def test_without_locks_of_the_file_system_a_lock_is_held_and_errors_stay_errors(
    tmp_path: Path, without_locks: None
) -> None:
    with locked(tmp_path / "lock") as held:
        assert held and names(tmp_path) == ["lock"]
    with pytest.raises(IsADirectoryError), locked(tmp_path):
        pass
