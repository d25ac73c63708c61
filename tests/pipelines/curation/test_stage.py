"""The frame of stages between build and encode. Run: python -m pytest tests/pipelines/curation/test_stage.py"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import jpeg

from domainshuttle.pipelines.curation.stage import Staged, Step, Work, attempt, run_stage
from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.parts import REPORT_NAME, TRACE_NAME
from domainshuttle.pipelines.index.samples import read_raw_sample
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import RawSample, Reference, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.values import ActorPool

pytestmark = pytest.mark.usefixtures("ray_cluster")
HALF = ActorPool(actors=1, cpus=0.5)


def raw_corpus(folder: Path, count: int = 20) -> CorpusSpec:
    """Pictures, each with one reference; the caption of number n is 'n'."""
    infos = {}
    with ShardWriter(folder, "own", 60_000) as writer:
        for number in range(count):
            info = SampleInfo(
                caption=str(number), source="mine", kind="image", frames=1, size=(40, 56),
                subjects=[Subject(id=0, word="thing", domain=1)],
                references=[Reference(file="ref0.jpg", subject=0, origin="photo", size=(40, 56))],
            )  # fmt: skip
            sample = RawSample(f"s{number}", info, {"jpg": jpeg(number), "ref0.jpg": jpeg(100 + number)})
            infos[sample.key] = info
            writer.write(sample.key, sample.members())
    rows = [IndexRow.of(entry, infos[entry.key], "1x32x32") for entry in writer.entries]
    write_index(folder / "index.parquet", rows, IndexMetadata(corpus="mine", stage="raw"))
    return CorpusSpec("mine", "raw", str(folder))


def steps(log: Path, breaks_at: int = -1) -> list[Step]:
    """Two: one that decodes and leaves out each seventh, one that adds a reference made of what the first handed on.
    Defined within, so that Ray sends them by value."""

    class Look:
        def __init__(self, log: Path) -> None:
            self.log = log

        def __call__(self, works: list[Work]) -> None:
            with self.log.open("a") as file:
                file.write(f"{works[0].row.key}\n")
            if any(work.info.caption == str(breaks_at) for work in works):
                raise StorageError("the place is full")
            attempt(works, self.look)

        def look(self, work: Work) -> None:
            from domainshuttle.pipelines.media.decode import decode_image

            number = int(work.info.caption)
            work.trace["level"] = int(decode_image(work.sample().target).mean())
            if number % 7 == 3:
                raise ValueError("a decoder's own error")
            if number % 7 == 4:
                work.left_out = "too dark: as it is"
            work.carried["level"] = np.full((8, 8, 3), number, np.uint8)

    class Add:
        def __call__(self, works: list[Work]) -> None:
            from domainshuttle.pipelines.media.decode import encode_jpeg

            for work in works:
                first = work.info.references[0].model_copy(update={"file": "ref1.jpg", "size": (8, 8)})
                work.info = work.info.model_copy(
                    update={"references": [*work.info.references, first], "caption": f"number {work.info.caption}"}
                )
                work.files["ref1.jpg"] = encode_jpeg(work.carried["level"])
                work.notes.append("references added")

    return [Step(Look, (log,), HALF, parts_at_once=2), Step(Add, (), HALF)]


def run(raw: CorpusSpec, folder: Path, made: list[Step], told: Callable[..., None] = lambda *_: None) -> Staged:
    return run_stage("adding", raw, folder, {"of": "these"}, made, told, samples_per_part=4, most_bad=0.5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, Staged, list[tuple[int, ...]]]:
    """A folder with a corpus (raw) and what the steps made of it without a stop (out), and what was told of it."""
    folder, told = tmp_path_factory.mktemp("whole"), list[tuple[int, ...]]()
    made = steps(folder / "log")
    return folder, run(raw_corpus(folder / "raw"), folder / "out", made, lambda *now: told.append(now)), told


def test_samples_pass_the_steps_and_nothing_is_dropped_silently(
    whole: tuple[Path, Staged, list[tuple[int, ...]]],
) -> None:
    folder, staged, told = whole
    index = Index.load(folder / "out" / "index.parquet")
    kept = [number for number in range(20) if number % 7 not in (3, 4)]
    assert [row.key for row in index.rows(range(len(index)))] == [f"s{number}" for number in kept]
    for number, row in zip(kept, index.rows(range(len(index))), strict=True):
        sample = read_raw_sample(row)
        assert sample.info.caption == f"number {number}" and row.bucket == "1x32x32"
        assert sample.target == jpeg(number) and sample.files["ref0.jpg"] == jpeg(100 + number)
        assert [reference.file for reference in sample.info.references] == ["ref0.jpg", "ref1.jpg"]
    bad = [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["key"] for row in bad] == ["s3", "s4", "s10", "s11", "s17", "s18"]
    assert "a decoder's own error" in bad[0]["reason"] and bad[1]["reason"] == "too dark: as it is"
    traces = [json.loads(line) for line in (folder / "out" / TRACE_NAME).read_text().splitlines()]
    assert traces == [{"key": f"s{number}", "level": number} for number in range(20)]  # also of those left out
    assert staged.report["left_out"] == {"unreadable sample": 3, "too dark": 3} and staged.bad == 6
    assert staged.report["notes"] == {"references added": 14} and staged.report["samples"] == 14
    assert json.loads((folder / "out" / REPORT_NAME).read_text()) == staged.report
    assert told[0] == (0, 20) and told[-1] == (20, 20)


def test_a_stage_that_stopped_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, whole: tuple[Path, Staged, list[tuple[int, ...]]]
) -> None:
    raw = CorpusSpec("mine", "raw", str(whole[0] / "raw"))
    with pytest.raises(StorageError, match="the place is full"):
        run(raw, tmp_path / "out", steps(tmp_path / "first", breaks_at=17))
    assert not (tmp_path / "out" / "index.parquet").exists()
    work, again = tmp_path / "out" / ".parts", tmp_path / "second"
    finished = {path.name for path in work.glob("*.done")}
    (tmp_path / "out" / "part-000004-000000.tar").write_bytes(b"torn")  # as where it was killed
    run(raw, tmp_path / "out", steps(again))
    assert contents(tmp_path / "out") == contents(whole[0] / "out")
    assert len(again.read_text().split()) == 5 - len(finished)
    run(raw, tmp_path / "out", steps(tmp_path / "third"))
    assert not (tmp_path / "third").exists()  # all is there


def test_a_step_that_forgets_its_file_and_one_that_can_not_begin(tmp_path: Path) -> None:
    raw = raw_corpus(tmp_path / "raw", 4)

    def forget(works: list[Work]) -> None:
        for work in works:
            named: Any = work.info.references[0].model_copy(update={"file": "ref7.jpg"})
            work.info = work.info.model_copy(update={"references": [named]})

    with pytest.raises(DataError, match=r"s0: ref7\.jpg is named, and no step made it"):
        run(raw, tmp_path / "out", [Step(lambda: forget, (), HALF)])

    class NoModel:
        def __init__(self) -> None:
            raise DataError("models/dino has no weights")

        def __call__(self, works: list[Work]) -> None: ...

    with pytest.raises(DataError, match=r"^models/dino has no weights$"):
        run(raw, tmp_path / "out", [Step(NoModel, (), HALF)])
