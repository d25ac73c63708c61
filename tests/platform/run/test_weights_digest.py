"""A digest is compared with the bytes that it stands for, where it is used.

Run: python -m pytest tests/platform/run/test_weights_digest.py
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import SampleInfo
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.platform.checkpoint.resume import adopt_stages
from domainshuttle.platform.checkpoint.store import CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.generation.export import export_run
from domainshuttle.platform.generation.networks import networks_beside
from domainshuttle.platform.run import weights_digest
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.weights_digest import ChangedError, Fingerprints, folder_digest, verified_digest
from domainshuttle.platform.run.weights_origin import WeightsOrigin


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config("demo", [f"output={tmp_path}", *overrides])


def finished(run: Run, stage: str, content: bytes = b"weights" * 1000) -> Path:
    """A stage with weights, finished as the workers do it."""
    segment = run.segment(stage)
    for folder in (segment.weights, segment.averaged_weights):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
    segment.finish(4, run.fingerprints)
    return segment.weights


def zeroed(path: Path) -> None:
    """A block of the disk that came back as zeros."""
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(content)


def silent(path: Path) -> None:
    """The same, with the time of writing put back."""
    status = path.stat()
    zeroed(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    """Other weights, copied there with an earlier time."""
    other = path.with_name("other")
    other.write_bytes(b"another" * 1000)
    os.utime(other, (1, 1))
    other.rename(path)


@pytest.mark.parametrize("damage", [zeroed, silent, replaced, lambda path: path.unlink()])
def test_a_changed_stage_is_refused_by_name(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Where the next stage begins with it, where it is exported, and where another run takes it over."""
    run = Run.open(config_of(tmp_path))
    weights = finished(run, "base")
    origin = WeightsOrigin(str(weights))
    assert origin.identified(run.fingerprints).identity == folder_digest(weights)
    state = TrainingState("stage1", 2, 0, 1, "", {}, {}, {}, origin=str(weights))
    store = CheckpointStore.of(run.config)
    write_manifest(store.place, state, "stage1-step00000002", {})
    damage(weights / "model.safetensors")
    message = rf"weights of stage base in {weights} are not those that were exported"
    with pytest.raises(ChangedError, match=message):
        origin.identified(run.fingerprints)
    with pytest.raises(ChangedError, match=message):
        origin.identified(Fingerprints())
    with pytest.raises(ChangedError, match=message):
        export_run(run, tmp_path / "exported", "base", averaged=False)
    other = Run.open(config_of(tmp_path, "name=other"))
    with pytest.raises(ChangedError, match=message):
        adopt_stages(other, CheckpointStore.of(other.config), str(store.place.root) + "/stage1-step00000002", print)
    assert not other.segment("base").finished


def test_the_moving_average_is_compared_too(tmp_path: Path) -> None:
    run = Run.open(config_of(tmp_path))
    finished(run, "base")
    zeroed(run.segment("base").averaged_weights / "model.safetensors")
    with pytest.raises(ChangedError, match="weights of stage base-ema"):
        export_run(run, tmp_path / "exported", "base")


def test_samples_do_not_generate_with_another_expert_than_was_trained(tmp_path: Path) -> None:
    run = Run.open(config_of(tmp_path, "experts=[{name: high, low: 0.5}, {name: low, high: 0.5}]"))
    finished(run, "base-high")
    silent(run.segment("base-high").averaged_weights / "model.safetensors")
    with pytest.raises(ChangedError, match="base-high-ema"):
        networks_beside(run, run.segment("base-low"), tmp_path / "snapshot", {})


def test_what_is_right_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just written is known; a copy is read, once, and so is what was only touched."""
    run = Run.open(config_of(tmp_path))
    weights = finished(run, "base")
    hashed: list[Path] = []

    def counted(folder: Path) -> str:
        hashed.append(folder)
        return folder_digest(folder)

    monkeypatch.setattr(weights_digest, "folder_digest", counted)
    for _ in range(3):
        verified_digest(weights, run.fingerprints)
    assert not hashed
    copied = tmp_path / "copied"
    shutil.copytree(weights, copied)
    for _ in range(3):
        assert verified_digest(copied, run.fingerprints) == verified_digest(weights, run.fingerprints)
    assert hashed == [copied]
    os.utime(weights / "model.safetensors")
    for _ in range(3):
        verified_digest(weights, run.fingerprints)
    assert hashed == [copied, weights]
    # what cannot be remembered is read again
    (lost := tmp_path / "gone" / "fingerprints.json").parent.mkdir()
    lost.mkdir()
    for _ in range(2):
        verified_digest(weights, Fingerprints(lost))
    assert len(hashed) == 4


def test_what_an_earlier_version_remembered_is_read_again(tmp_path: Path) -> None:
    run = Run.open(config_of(tmp_path))
    weights = finished(run, "base")
    entry = {"files": [["model.safetensors", 7000, 1]], "digest": "wrong"}
    for content in ({str(weights): entry}, {str(weights): None}, [], None):
        run.fingerprints_path.write_text(json.dumps(content))
        assert verified_digest(weights, run.fingerprints) == folder_digest(weights)


def test_an_index_whose_rows_were_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest says in which order samples come; it is compared with the rows once, and after each change."""
    info = SampleInfo(caption="a", source="x", kind="image", frames=1, size=(64, 64), subjects=[], references=[])
    with ShardWriter(tmp_path, "part", 1 << 20) as writer:
        for key in ("a", "b"):
            writer.write(key, {"json": info.to_json(), "jpg": b"x"})
    rows = [IndexRow.of(entry, info, parse_bucket("1x64x64")) for entry in writer.entries]
    place, known = tmp_path / "index.parquet", Fingerprints(tmp_path / "fingerprints.json")
    written = write_index(place, rows, IndexMetadata(corpus="x", stage="raw"))
    loaded: list[Any] = []
    load = Index.load
    monkeypatch.setattr(Index, "load", lambda path: loaded.append(path) or load(path))
    assert known.of_index(str(place)) == known.of_index(str(place)) == written.digest
    assert len(loaded) == 1
    said = pq.read_metadata(place).metadata  # of itself, with the digest
    pq.write_table(pq.read_table(place).slice(0, 1).replace_schema_metadata(said), place)
    with pytest.raises(DataError, match="its rows are not those it was written with"):
        known.of_index(str(place))
