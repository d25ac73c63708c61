"""Saving while training goes on: what is written is the copy, ranks agree on faults, and a kill leaves no torn one.

Ranks are threads here, with a barrier for their collective; the store between them is a real folder.

Run: python -m pytest tests/platform/checkpoint/test_async_writer.py
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from domainshuttle.platform.checkpoint.async_writer import AsyncCheckpointer, Saved, Write
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore, TrainingState
from domainshuttle.platform.config.schema import CheckpointSection

T = TypeVar("T")


def state(step: int, loss: float | None = None) -> TrainingState:
    return TrainingState("stage1", step, 1, 2, "d", {"seed": 1}, {}, {}, loss=loss)


class Ranks:
    """Ranks of one process: `on_all` runs a function of each rank's checkpointer on a thread of its own."""

    def __init__(self, folders: Sequence[Path], estimate: int = 0, **settings: Any) -> None:
        section = CheckpointSection(every=1, **settings)
        self.slots: list[Any] = [None] * len(folders)
        self.barrier = threading.Barrier(len(folders))
        self.ranks = [
            AsyncCheckpointer(
                CheckpointStore(folder), section, rank, len(folders), self.gather(rank), estimated_bytes=estimate
            )
            for rank, folder in enumerate(folders)
        ]

    def gather(self, rank: int) -> Callable[[Any], Sequence[Any]]:
        def collective(mine: Any) -> Sequence[Any]:
            self.slots[rank] = mine
            self.barrier.wait(20)
            every = list(self.slots)
            self.barrier.wait(20)
            return every

        return collective

    def on_all(self, do: Callable[[AsyncCheckpointer], T]) -> list[T]:
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            return list(pool.map(do, self.ranks))

    def save(
        self, step: int, write: Callable[[int], Write] = lambda rank: shard(rank, b"x"), **more: Any
    ) -> list[Saved]:
        self.on_all(lambda one: one.save(state(step, **more), lambda: write(one.rank)))
        return [saved for saved in self.on_all(lambda one: one.wait()) if saved]


def shard(rank: int, content: bytes) -> Write:
    def write(folder: Path) -> None:
        (folder / "zero").mkdir()
        (folder / "zero" / f"rank-{rank}.bin").write_bytes(content)

    return write


def steps(folder: Path) -> list[int]:
    return [name.step for name in sorted(CheckpointStore(folder).names(), key=lambda name: name.step)]


def newest_step(folder: Path) -> int:
    newest = CheckpointStore(folder).newest("stage1")
    return newest.state.step if newest else 0


def test_training_goes_on_and_the_files_hold_the_copy(tmp_path: Path) -> None:
    ranks = Ranks([tmp_path, tmp_path])
    weights = [bytearray(b"step 10, rank 0"), bytearray(b"step 10, rank 1")]
    may_write = threading.Event()

    def snapshot(rank: int) -> Write:
        copy = bytes(weights[rank])

        def write(folder: Path) -> None:
            assert may_write.wait(20)
            shard(rank, copy)(folder)

        return write

    began = ranks.on_all(lambda one: one.save(state(10), lambda: snapshot(one.rank)))
    assert all(begun.started and begun.waited + begun.copied < 1 for begun in began)
    for weight in weights:
        weight[:] = b"trained further"
    assert newest_step(tmp_path) == 0
    assert ranks.ranks[0].ended() == []
    threading.Timer(0.3, may_write.set).start()
    # there is memory for one copy, so the next save waits, and says how long
    began = ranks.on_all(lambda one: one.save(state(11), lambda: shard(one.rank, b"later")))
    assert all(0.2 < begun.waited < 10 for begun in began)
    ((first,), saved) = ranks.ranks[0].ended(), ranks.on_all(lambda one: one.wait())
    assert (first.step, first.fault) == (10, None)
    assert saved[0] == saved[1]
    assert saved[0] is not None
    ten = CheckpointStore(tmp_path).read("stage1-step00000010")
    for rank in (0, 1):
        file = f"zero/rank-{rank}.bin"
        assert (ten.folder / file).read_bytes() == b"step 10, rank %d" % rank
        assert ten.files[file]["rank"] == rank
    assert first.size == ten.size
    assert newest_step(tmp_path) == 11
    assert ranks.on_all(lambda one: one.wait()) == saved


def test_a_fault_of_one_rank_is_known_to_all_and_the_next_save_makes_up_for_it(tmp_path: Path) -> None:
    ranks = Ranks([tmp_path, tmp_path], keep=1, max_failed=2)
    ranks.save(1)

    def full(rank: int) -> Write:
        def write(folder: Path) -> None:
            (folder / "half").write_bytes(b"h")
            raise OSError(28, "No space left on device")

        return write if rank == 1 else shard(rank, b"x")

    def begin(step: int, write: Callable[[int], Write]) -> None:
        ranks.on_all(lambda one: one.save(state(step), lambda: write(one.rank)))

    begin(2, full)
    with pytest.raises(CheckpointError, match=r"stage1-step00000002 could not be written: rank 1: .*No space left"):
        ranks.on_all(lambda one: one.wait())
    assert newest_step(tmp_path) == 1
    # a save between is a success, so the count begins again
    begin(2, lambda rank: shard(rank, b"y"))
    begin(3, full)
    begin(4, full)
    with pytest.raises(CheckpointError, match=r"2 checkpoints in a row .*those before are intact"):
        begin(5, full)
    assert newest_step(tmp_path) == 2
    assert [bool(saved.fault) for saved in ranks.ranks[0].ended()] == [False, True, False, True, True]


def test_all_ranks_raise_together(tmp_path: Path) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text("")  # a rank that can write neither files nor the note that it could not
    ranks = Ranks([tmp_path / "store", nowhere], max_failed=1, timeout=20)
    raised = []

    def save(one: AsyncCheckpointer) -> None:
        one.save(state(1), lambda: shard(one.rank, b"x"))
        try:
            one.wait()
        except CheckpointError as error:
            raised.append(str(error))

    began = time.monotonic()
    ranks.on_all(save)
    assert time.monotonic() - began < 5, "rank 0 must not wait for a note that can't come"
    assert len(raised) == 2
    assert all("rank 1: " in text and "Not a directory" in text for text in raised)


def test_a_slow_rank_is_named_and_nothing_begins_while_it_is_at_work(tmp_path: Path) -> None:
    ranks = Ranks([tmp_path, tmp_path], timeout=0.5, max_failed=9)
    go_on = threading.Event()

    def slow(rank: int) -> Write:
        def write(folder: Path) -> None:
            if rank == 1:
                go_on.wait(20)
            shard(rank, b"slow")(folder)

        return write

    with pytest.raises(CheckpointError, match=r"rank 1 was still writing after 0.5 s"):
        ranks.save(1, slow)
    begun = ranks.on_all(lambda one: one.save(state(2), lambda: shard(one.rank, b"x")))
    assert not any(one.started for one in begun)
    assert "rank 1 is still at work on the checkpoint of step 1" in str(ranks.ranks[0].ended()[-1].fault)
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(10)
    ranks.save(3)
    assert newest_step(tmp_path) == 3
    assert steps(tmp_path) == [3], "what the slow rank left is removed"


def test_ranks_that_do_not_see_one_store_are_told_so(tmp_path: Path) -> None:
    ranks = Ranks([tmp_path / "a", tmp_path / "b"], timeout=0.5)
    with pytest.raises(CheckpointError, match=r"ranks \[1\] wrote nothing.* where all nodes see them"):
        ranks.save(1)


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    ranks = Ranks([tmp_path, tmp_path], estimate=1 << 60)
    begun = ranks.on_all(lambda one: one.save(state(1), lambda: shard(one.rank, b"x")))
    assert not any(one.started for one in begun)
    (ended,) = ranks.ranks[0].ended()
    assert "a checkpoint takes 1181116006.40 GiB" in str(ended.fault)
    assert "lower checkpoint.keep" in str(ended.fault)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="GiB free"):
        ranks.on_all(lambda one: one.wait())


def test_what_a_killed_attempt_left_of_the_step_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "stage1-step00000004"
    (left / ".rank-00002").mkdir(parents=True)
    (left / ".rank-00002" / "half").write_bytes(b"h")
    (left / "zero").mkdir()
    (left / "zero" / "rank-2.bin").write_bytes(b"of a larger world")
    (left / "rank-00001.json").write_text(json.dumps({"attempt": "before", "files": {}}))
    Ranks([tmp_path, tmp_path]).save(4)
    found = sorted(str(path.relative_to(left)) for path in left.rglob("*") if path.is_file())
    notes = ["rank-00000.json", "rank-00001.json"]
    assert found == ["manifest.json", *notes, "state.json", "zero/rank-0.bin", "zero/rank-1.bin"]


def test_ranks_do_not_disturb_each_other(tmp_path: Path) -> None:
    ranks = Ranks([tmp_path] * 6, keep=2)
    for step in range(1, 31):
        ranks.save(step)
    assert steps(tmp_path) == [29, 30]
    assert len(CheckpointStore(tmp_path).read("stage1-step00000030").files) == 7


def test_the_rule_of_retention_holds_after_each_save(tmp_path: Path) -> None:
    ranks = Ranks([tmp_path], keep=2, keep_every=4, keep_best=1)
    for step, loss in enumerate((5.0, 1.0, 4.0, 3.0, 2.0, 2.0, 2.0), start=1):
        ranks.save(step, loss=loss)
    assert steps(tmp_path) == [2, 4, 6, 7]


_KILLED = """
import os, resource, signal, sys
from pathlib import Path
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState
from domainshuttle.platform.checkpoint.async_writer import AsyncCheckpointer
from domainshuttle.platform.config.schema import CheckpointSection

root = Path(sys.argv[1])
content = {rank: bytes([65 + rank]) * 300_000 for rank in (0, 1)}

def run(folder, kill_at, most_bytes=None):
    count = 0
    def hook(event, arguments):
        # every step of the way that can be seen from outside: files opened, renamed, removed, folders made
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.listdir"):
            if any(str(folder) in str(argument) for argument in arguments):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
    section = CheckpointSection(every=1, keep=1)
    writer = AsyncCheckpointer(CheckpointStore(folder), section, 0, 1, lambda mine: [mine])
    def snapshot():
        def write(to):
            for rank, data in content.items():
                (to / f"{rank}.bin").write_bytes(data)
        return write
    for step in (1, 2):
        if step == 2 and most_bytes is None:
            sys.addaudithook(hook)
        elif step == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills at this byte of any file
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        writer.save(TrainingState("stage1", step, 1, 1, "d", {}, {}, {}), snapshot)
        writer.wait()

def killed(*arguments):
    child = os.fork()
    if not child:
        run(*arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for most_bytes in (0, 1, 100, 8191, 65536, 299_999):
    assert killed(root / f"byte-{most_bytes:06d}", 0, most_bytes)
for kill_at in range(1, 1000):
    if not killed(root / f"point-{kill_at:04d}", kill_at):
        break
"""


def test_a_kill_at_any_moment_of_a_save_leaves_one_whole_checkpoint(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _KILLED, tmp_path], check=True, timeout=120)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 20, "the save must have been killed at many points"
    reached = [newest_step(folder) for folder in folders]
    assert set(reached) == {1, 2}
    assert reached == sorted(reached), "from some point on the new one is whole"
    for folder, step in zip(folders, reached, strict=True):
        # and a save of the same step again makes it whole, and clears what was left
        Ranks([folder], keep=1).save(2, lambda rank: shard(rank, b"again"))
        assert newest_step(folder) == 2
        assert steps(folder) == [2], f"{folder} after {step}"


_FULL = """
import resource, sys
from pathlib import Path
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore, TrainingState
from domainshuttle.platform.checkpoint.async_writer import AsyncCheckpointer
from domainshuttle.platform.config.schema import CheckpointSection

store = CheckpointStore(sys.argv[1])
writer = AsyncCheckpointer(store, CheckpointSection(every=1), 0, 1, lambda mine: [mine])
def save(step, size):
    state = TrainingState("stage1", step, 1, 1, "d", {}, {}, {})
    writer.save(state, lambda: lambda to: (to / "a").write_bytes(b"x" * size))
    writer.wait()
save(1, 50_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(2, 200_000)
except CheckpointError as error:
    print(error)
save(3, 60_000)
print(store.newest("stage1").state.step)
"""


def test_a_disk_that_takes_no_more_leaves_the_one_before(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _FULL, tmp_path], capture_output=True, text=True, timeout=60, check=True
    )
    assert "stage1-step00000002 could not be written: rank 0: [Errno 27] File too large" in run.stdout
    assert run.stdout.strip().endswith("3")
    assert steps(tmp_path) == [1, 3]


def test_random_states_return(tmp_path: Path) -> None:
    import torch

    from domainshuttle.platform.training.rng_state import random_snapshot, restore_random

    torch.manual_seed(11)
    write = random_snapshot(rank=1)
    expected = torch.rand(5)
    write(tmp_path)
    torch.rand(100)
    assert restore_random(tmp_path, rank=1)
    assert torch.equal(torch.rand(5), expected)
    assert not restore_random(tmp_path, rank=2)
