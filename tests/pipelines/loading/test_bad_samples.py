"""Encoded samples that can't be used: each goes to quarantine with its reason and another takes its place.

Run: python -m pytest tests/pipelines/loading/test_bad_samples.py
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as save_numpy

from domainshuttle.pipelines.errors import TooManyBadError
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME, INDEX_NAME
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.loading.loader import Loader
from domainshuttle.pipelines.plan.feed import Feed, planned_rows
from domainshuttle.pipelines.sample import Reference, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.shards.tensors import EncodedSample, write_safetensors

BUCKET = "5x32x32"
RNG = np.random.default_rng(0)
NAN, INFINITY, LARGEST = 0x7FC0, 0xFF80, 0xFF7F


def bits(*shape: int) -> np.ndarray:
    """bf16 bit patterns of any finite values, the largest among them."""
    values = RNG.integers(0, 0x4000, shape, np.uint16)
    values.flat[0] = LARGEST
    return values


def sample(number: int) -> EncodedSample:
    info = SampleInfo(
        caption="a ball",
        source="clips",
        kind="video",
        fps=8.0,
        frames=5,
        size=(32, 32),
        subjects=[Subject(id=0, word="ball", domain=1), Subject(id=1, word="cup", domain=1)],
        references=[
            Reference(file=f"ref{number}.jpg", subject=subject, origin="photo", size=(9, 9))
            for number, subject in enumerate((0, 0, 1))
        ],
    )
    references = [bits(16, 4, 4) for _ in range(3)]
    return EncodedSample(f"s{number}", info, bits(16, 2, 4, 4), references, bits(3, 8), {2: bits(16, 4, 4)})


def with_value(name: str, value: int) -> Callable[[EncodedSample], bytes]:
    def damage(one: EncodedSample) -> bytes:
        tensors = {key: array.copy() for key, array in one.tensors().items()}
        tensors[name].flat[-1] = value
        return write_safetensors(tensors)

    return damage


def with_tensor(name: str, array: np.ndarray | None) -> Callable[[EncodedSample], bytes]:
    def damage(one: EncodedSample) -> bytes:
        tensors = {key: value for key, value in one.tensors().items() if key != name}
        return write_safetensors(tensors if array is None else {**tensors, name: array})

    return damage


DAMAGE: dict[str, tuple[Callable[[EncodedSample], bytes | None], str]] = {
    "cut short": (lambda one: one.to_bytes()[:900], "extent does not fit; the file is cut short"),
    "cut in the header": (lambda one: one.to_bytes()[:20], "cut short or not safetensors"),
    "another header": (lambda one: one.to_bytes()[:8] + b"{" * (len(one.to_bytes()) - 8), "unreadable safetensors"),
    "zeros": (lambda one: bytes(len(one.to_bytes())), "header"),
    "empty": (lambda one: b"", "header"),
    "target's shape": (with_tensor("target", bits(16, 2, 4, 8)), "[16, 2, 4, 8], expected [16, 2, 4, 4]"),
    "reference's shape": (with_tensor("reference.2", bits(16, 4)), "reference.2 has shape"),
    "text's rank": (with_tensor("text", bits()), "text has shape []"),
    "text's width": (with_tensor("text", bits(3, 9)), "text has shape [3, 9], expected [3, 8]"),
    "NaN": (with_value("target", NAN), "target holds NaN or infinity"),
    "infinite text": (with_value("text", INFINITY), "text holds NaN or infinity"),
    "NaN in the view": (with_value("view.2", NAN), "view.2 holds NaN or infinity"),
    "no text": (with_tensor("text", None), "tensors ['text'] are missing"),
    "no view": (with_tensor("view.2", None), "tensors ['view.2'] are missing"),
    "another type": (lambda one: save_numpy({"target": np.zeros(4, np.float32)}), "target is F32, expected BF16"),
    "no member": (lambda one: None, "no safetensors member"),
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples s0, s1 ... are damaged in turn, 24 are whole; two shards of three more are cut short and missing."""
    folder = tmp_path_factory.mktemp("bad")
    entries, infos = [], {}
    count = len(DAMAGE) + 24
    damages = [damage for damage, _ in DAMAGE.values()]
    for prefix, numbers in (
        ("good", range(count)),
        ("cut", range(count, count + 3)),
        ("gone", range(count + 3, count + 6)),
    ):
        with ShardWriter(folder, prefix, 1 << 24) as writer:
            for number in numbers:
                one = sample(number)
                data = damages[number](one) if number < len(damages) else one.to_bytes()
                writer.write(one.key, {"json": one.info.to_json(), **({} if data is None else {"safetensors": data})})
                infos[one.key] = one.info
        entries += writer.entries
    cut = folder / "cut-000000.tar"
    cut.write_bytes(cut.read_bytes()[:2600])
    (folder / "gone-000000.tar").unlink()
    write_index(
        folder / INDEX_NAME,
        [IndexRow.of(entry, infos[entry.key], BUCKET) for entry in entries],
        IndexMetadata(corpus="clips", stage="encoded"),
    )
    (folder / EMPTY_CAPTION_NAME).write_bytes(write_safetensors({"text": bits(1, 8)}))
    return folder


def feed(corpus: Path) -> Feed:
    return Feed(
        shares=(CorpusShare("clips", str(corpus / INDEX_NAME), 1.0),),
        seed=1,
        global_batch=len(DAMAGE) + 30,
        micro_batch=len(DAMAGE) + 30,
        text_len=4,
        references=5,
        paired=True,
    )


def test_every_kind_of_damage_is_named_and_substituted(corpus: Path, tmp_path: Path) -> None:
    one = feed(corpus)
    loader = Loader([planned_rows(one, 0, 1, 0, 1)], one, 0, 1, tmp_path / "q", most_bad=1.0)  # type: ignore[arg-type, var-annotated]
    (micro,) = list(loader)
    assert micro.batch.batch_size == len(micro.keys) == len(DAMAGE) + 30
    assert micro.batch.latents.isfinite().all() and micro.batch.text.isfinite().all()
    whole = {f"clips/s{number}" for number in range(len(DAMAGE), len(DAMAGE) + 24)}
    assert set(micro.keys) <= whole
    lines = [json.loads(line) for line in (tmp_path / "q").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    for number, (name, (_, reason)) in enumerate(DAMAGE.items()):
        assert reason in reasons.pop(f"s{number}"), name
    shards = {line["key"]: line["shard"] for line in lines if line["key"] in reasons}
    assert sorted(shards.values()) == ["cut-000000.tar"] * 3 + ["gone-000000.tar"] * 3
    for key, shard in shards.items():
        assert ("cut short" if shard.startswith("cut") else "can't be read") in reasons[key]


def test_more_bad_samples_than_allowed_end_the_run(corpus: Path, tmp_path: Path) -> None:
    one = feed(corpus)
    loader = Loader([planned_rows(one, 0, 1, 0, 1)], one, 0, 1, tmp_path / "q")  # type: ignore[arg-type, var-annotated]
    with pytest.raises(
        TooManyBadError, match=r"samples could not be read, more than 1%: see .*q, then repair"
    ) as raised:
        list(loader)
    assert (tmp_path / "q").exists()
    accepted = float(str(raised.value).partition("--set loader.most_bad=")[2])
    again = Loader([planned_rows(one, 0, 1, 0, 1)], one, 0, 1, tmp_path / "q", most_bad=accepted)  # type: ignore[arg-type, var-annotated]
    assert len(list(again)) == 1


def test_a_quarantine_table_that_can_not_be_written_ends_no_step(corpus: Path, tmp_path: Path) -> None:
    one, table = feed(corpus), tmp_path / "full" / "q"
    loader = Loader([planned_rows(one, 0, 1, 0, 1)], one, 0, 1, table, most_bad=1.0)  # type: ignore[var-annotated]
    batches = iter(loader)
    micro = next(batches)
    assert len(micro.bad) >= len(DAMAGE)
    table.parent.mkdir()  # there is room again
    assert list(batches) == []
    assert [json.loads(line)["key"] for line in table.read_text().splitlines()] == [bad.key for bad in micro.bad]
