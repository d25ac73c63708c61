"""Raw corpora that are encoded while they are trained on, against the same corpora encoded beforehand.

Run: python -m pytest tests/pipelines/loading/test_live.py
"""

import io
import json
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from ray_books import plasma_bytes, reserved
from safetensors.torch import save_file
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.encoder_sources import encoder_files, files_digest
from domainshuttle.model.encoders import load_text_encoder, load_video_encoder
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.encoding import sample_encoder as encode_module
from domainshuttle.pipelines.encoding.sample_encoder import SampleEncoder, encode_rows, to_pixels
from domainshuttle.pipelines.errors import DataError, StorageError, TooManyBadError
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME, INDEX_NAME
from domainshuttle.pipelines.index.spec import CorpusShare
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.loading import live as live_module
from domainshuttle.pipelines.loading.buffers import Staging
from domainshuttle.pipelines.loading.live import LiveEncoder, RawReader, Unpacked, pack
from domainshuttle.pipelines.loading.loader import Loader
from domainshuttle.pipelines.loading.ray_source import packed, plan_dataset
from domainshuttle.pipelines.loading.reader import Drawn, MicroBatch
from domainshuttle.pipelines.media.augment import apply_view, augmented_view
from domainshuttle.pipelines.media.decode import decode_image, decode_video, encode_mp4, fit_reference, fit_target
from domainshuttle.pipelines.plan.feed import EncoderSources, Feed, planned_rows
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.shards.tar import ShardWriter, read_members
from domainshuttle.pipelines.shards.tensors import EncodedSample
from domainshuttle.pipelines.values import ActorPool

SOURCES = EncoderSources("block-dct", "byte-umt5", 48)
DAMAGED = {"train-0000003": "jpeg", "train-0000005": "clip", "train-0000008": "short"}


def raw_corpus(
    folder: Path, name: str, damage: dict[str, str] | None = None, sampled: float | None = None,
    source: str | None = None, fitted: str | None = None, **options: Any,
) -> None:  # fmt: skip
    """A corpus of sprites, written without Ray; `damage` says which samples get which broken member, `sampled` at which
    rate clips are sampled, `source` what the samples say that they are from (none: the corpus)."""
    config = SpritesConfig(samples=24, identities=72, side=48, seed=4, **options)
    bucket = parse_bucket(fitted or ("1x32x32" if config.kind == "image" else "5x32x32"))
    infos = {}
    with ShardWriter(folder / name / "raw", "part", 1 << 20) as writer:
        for sample in SpritesBuilder(config, source or name).build(0, config.samples):
            files = dict(sample.files)
            kind = (damage or {}).get(sample.key)
            if kind == "jpeg":
                files["ref0.jpg"] = files["ref0.jpg"][: len(files["ref0.jpg"]) // 2]
            elif kind == "turned":
                files["ref0.jpg"] = resaved(files["ref0.jpg"], "JPEG", exif=turned_exif())
            elif kind == "clear":
                files["ref0.jpg"] = resaved(files["ref0.jpg"], "PNG", mode="RGBA")
            elif kind == "clip":
                files["mp4"] = b"\0" * 400 + files["mp4"][400:]
            elif kind == "short":
                files["mp4"] = encode_mp4(np.zeros((2, 48, 48, 3), np.uint8), 8.0)
            writer.write(sample.key, {"json": sample.info.to_json(), **files})
            infos[sample.key] = sample.info
    rows = [IndexRow.of(entry, infos[entry.key], bucket) for entry in writer.entries]
    write_index(folder / name / "raw" / INDEX_NAME, rows, IndexMetadata(corpus=name, stage="raw", fps=sampled))


def resaved(data: bytes, form: str, mode: str = "RGB", **options: Any) -> bytes:
    """A picture of the same size, saved anew."""
    Image.open(io.BytesIO(data)).convert(mode).save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


def encode_corpus(folder: Path, name: str) -> None:
    """The encoded corpus of a raw one, one sample after the other."""
    index = Index.load(folder / name / "raw" / INDEX_NAME)
    video, text = load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48)
    samples = {row.key: one for row, one in encode_rows(index.rows(range(len(index))), video, text, index.parts[0].fps)}
    encoded = folder / name / "encoded"
    with ShardWriter(encoded, "part", 1 << 20) as writer:
        for key, sample in samples.items():
            assert not isinstance(sample, DataError), sample
            writer.write(key, sample.members())
    raw = {row.key: row for row in index.rows(range(len(index)))}
    rows = [
        IndexRow.of(entry, one.info, raw[entry.key].bucket, len(one.text), one.whole_caption_tokens)
        for entry in writer.entries
        if isinstance(one := samples[entry.key], EncodedSample)
    ]
    write_index(encoded / INDEX_NAME, rows, IndexMetadata(corpus=name, stage="encoded"))
    save_file({"text": text.encode([""])[0].bfloat16()}, encoded / EMPTY_CAPTION_NAME)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    raw_corpus(folder, "pictures", kind="image")
    raw_corpus(folder, "clips", kind="video", frames=5)
    raw_corpus(folder, "singles", kind="image", references_per_subject=1)
    raw_corpus(folder, "damaged", DAMAGED, kind="video", frames=5)
    for name in ("pictures", "clips", "singles"):
        encode_corpus(folder, name)
    return folder


def feed(folder: Path, *names: str, live: bool, **changes: Any) -> Feed:
    base = Feed(
        shares=tuple(
            CorpusShare(name, str(folder / name / ("raw" if live else "encoded") / INDEX_NAME), 1.0) for name in names
        ),
        seed=9,
        global_batch=8,
        micro_batch=4,
        text_len=48,
        references=3,
        reference_dropout=0.2,
        text_dropout=0.2,
        paired=True,
        encoders=SOURCES if live else None,
    )
    return replace(base, **changes)


def load(one: Feed, steps: int, quarantine: Path, converted: Path | None = None) -> list[MicroBatch]:
    """The micro-batches of a single rank; live ones are made by the actor's class, here."""
    rows = planned_rows(one, 0, steps, 0, 1)
    if one.encoders:
        encoder = LiveEncoder(one)
        tables = [encoder(packed(rows.slice(number, 1))) for number in range(len(rows))]
    else:
        tables = [rows]
    return list(Loader([*tables], one, 0, 1, quarantine, most_bad=1.0, converted=converted))


def assert_equal(first: TrainingBatch, second: TrainingBatch) -> None:
    for field in fields(TrainingBatch):
        left, right = getattr(first, field.name), getattr(second, field.name)
        assert left.equal(right) if isinstance(left, Tensor) else left == right, field.name


def test_live_batches_are_those_of_the_encoded_corpus_bit_for_bit(corpora: Path, tmp_path: Path) -> None:
    names = ("clips", "pictures")
    encoded = load(feed(corpora, *names, live=False), 12, tmp_path / "q")
    live = load(feed(corpora, *names, live=True), 12, tmp_path / "q")
    assert len(encoded) == len(live) == 24
    for first, second in zip(encoded, live, strict=True):
        assert (first.step, first.part, first.keys) == (second.step, second.part, second.keys)
        assert first.pair_kinds == second.pair_kinds
        assert first.cut_captions == second.cut_captions
        assert_equal(first.batch, second.batch)
    assert {micro.batch.bucket for micro in live} == {(1, 4, 4), (2, 4, 4)}
    assert not (tmp_path / "q").exists()


def test_conversions_are_listed_as_encoding_lists_them_each_sample_once(tmp_path: Path) -> None:
    turned = {"train-0000002": "turned", "train-0000007": "turned", "train-0000009": "clear"}
    raw_corpus(tmp_path, "mine", turned, kind="image")
    one = feed(tmp_path, "mine", live=True, reference_dropout=0.0, references=5)
    micros = load(one, 12, tmp_path / "q", tmp_path / "c")  # four passes over 24 samples
    lines = [json.loads(line) for line in (tmp_path / "c").open()]
    index = Index.load(tmp_path / "mine" / "raw" / INDEX_NAME)
    expected = {(row.key, what) for row in index.rows(range(len(index))) for what in noted_conversions_of(row)}
    assert {key for key, _ in expected} == set(turned)
    assert sorted((line["key"], line["reason"]) for line in lines) == sorted(expected)
    assert sum(len(micro.converted) for micro in micros) > len(lines)
    assert not (tmp_path / "q").exists()


def noted_conversions_of(row: IndexRow) -> tuple[str, ...]:
    """What encoding beforehand notes."""
    ((_, sample),) = encode_rows([row], load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48), None)
    assert isinstance(sample, EncodedSample)
    return sample.converted


def test_an_actor_refuses_other_encoder_files_than_those_of_the_start(corpora: Path, tmp_path: Path) -> None:
    for name, seed in (("here", 0), ("there", 1)):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        vae.save_pretrained(tmp_path / name / "vae")
    files = (("video_files", files_digest(encoder_files(str(tmp_path / "here"), "video"))),)
    here, there = (replace(SOURCES, video=f"{tmp_path}/{name}", files=files) for name in ("here", "there"))
    LiveEncoder(feed(corpora, "clips", live=True, encoders=here))
    with pytest.raises(DataError, match=r"other files on node .* than where the run was started"):
        LiveEncoder(feed(corpora, "clips", live=True, encoders=there))


def test_captions_that_are_cut_are_counted_where_they_are_shown(tmp_path: Path) -> None:
    """byte-umt5 has a token a byte and one for the end."""
    raw_corpus(tmp_path, "mine", kind="video", frames=5)
    encode_corpus(tmp_path, "mine")
    rows = Index.load(tmp_path / "mine" / "raw" / INDEX_NAME)
    longer = {f"{row.source}/{row.key}" for row in rows.rows(range(len(rows))) if row.caption_length + 1 > 48}
    assert len(longer) > 0
    encoded = Index.load(tmp_path / "mine" / "encoded" / INDEX_NAME)
    assert encoded.alterations().cut_captions == len(longer)
    for live in (False, True):
        micros = load(feed(tmp_path, "mine", live=live, text_dropout=0.0), 3, tmp_path / "q")
        assert [micro.cut_captions for micro in micros] == [
            sum(key in longer for key in micro.keys) for micro in micros
        ]
        dropped = load(feed(tmp_path, "mine", live=live, text_dropout=1.0), 3, tmp_path / "q")
        assert sum(micro.cut_captions for micro in dropped) == 0


def test_a_batch_names_the_corpora_whatever_its_samples_say_they_are_from(tmp_path: Path) -> None:
    """As with users' own corpora: metrics count by the mixture's names."""
    raw_corpus(tmp_path, "mine", source="another", kind="image")
    encode_corpus(tmp_path, "mine")
    for live in (False, True):
        for micro in load(feed(tmp_path, "mine", live=live), 2, tmp_path / "q"):
            assert micro.batch.sources == ("mine",) * 4
            assert all(key.startswith("another/") for key in micro.keys)


def test_clips_are_sampled_at_the_corpus_rate(tmp_path: Path) -> None:
    raw_corpus(tmp_path, "fast", kind="video", frames=9, fps=8.0, sampled=4.0)
    encode_corpus(tmp_path, "fast")
    raw, video = Index.load(tmp_path / "fast" / "raw" / INDEX_NAME), load_video_encoder("block-dct")
    rows = {row.sample_id: row for row in raw.rows(range(len(raw)))}
    for live in (False, True):
        (micro, *_) = load(feed(tmp_path, "fast", live=live), 1, tmp_path / "q")
        for latents, sample_id in zip(micro.batch.latents, micro.batch.sample_ids.tolist(), strict=True):
            row = rows[sample_id]
            sample = RawSample.from_members(row.key, read_members(row.folder, row.shard, row.members))
            every_second = fit_target(decode_video(sample.target, 9)[::2], parse_bucket("5x32x32"))
            assert latents.equal(video.encode(to_pixels(every_second))[0].bfloat16())


def test_a_packed_micro_batch_is_opened_in_place(corpora: Path) -> None:
    one = feed(corpora, "clips", live=True)
    reader = RawReader(one, SOURCES, "cpu")
    made = next(reader.works(planned_rows(one, 0, 1, 0, 1))).make()
    row = pack(0, made)
    (work,) = Unpacked(Staging()).works(row)
    memory = row.column("batch").chunk(0).buffers()[2]
    assert work.size == memory.size
    opened = work.make().batch
    assert_equal(opened, made.batch)
    assert memory.address <= opened.latents.data_ptr() < memory.address + memory.size


@pytest.mark.parametrize("live", [False, True])
def test_single_pictures_are_shown_as_altered_views(corpora: Path, tmp_path: Path, live: bool) -> None:
    one = feed(corpora, "singles", live=live, reference_dropout=0.0, text_dropout=0.0)
    plan, raw, video = one.plan(), Index.load(corpora / "singles" / "raw" / INDEX_NAME), load_video_encoder("block-dct")
    rows = {row.sample_id: row for row in raw.rows(range(len(raw)))}
    bucket = parse_bucket("1x32x32")
    for micro in load(one, 4, tmp_path / "q"):
        assert micro.pair_kinds == {"augmented": int(micro.batch.paired_reference_mask.sum())}  # type: ignore[union-attr]
        epochs = dict(zip(one.index().column("sample_id")[plan[micro.step].rows], plan[micro.step].epochs, strict=True))
        for number, sample_id in enumerate(micro.batch.sample_ids.tolist()):
            row = rows[sample_id]
            sample = RawSample.from_members(row.key, read_members(row.folder, row.shard, row.members))
            for picture, reference in enumerate(sample.info.references):
                pixels = decode_image(sample.files[reference.file])
                view = augmented_view(9, int(epochs[sample_id]), sample_id, picture) if live else None
                altered = apply_view(pixels, view or augmented_view(0, 0, sample_id, picture))
                expected = video.encode(to_pixels(fit_reference(altered, bucket)[None]))[0, :, 0].bfloat16()
                assert micro.batch.paired_references is not None
                assert micro.batch.paired_references[number, picture].equal(expected)
                assert not micro.batch.references[number, picture].equal(expected)


def test_damaged_samples_are_quarantined_and_substituted(corpora: Path, tmp_path: Path) -> None:
    one = feed(corpora, "damaged", live=True, reference_dropout=0.0)
    micros = load(one, 3, tmp_path / "q")  # one epoch
    assert all(micro.batch.batch_size == 4 for micro in micros)
    shown = {key.partition("/")[2] for micro in micros for key in micro.keys}
    assert not shown & (set(DAMAGED) - {"train-0000003"})
    lines = [json.loads(line) for line in (tmp_path / "q").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert "not a readable clip" in reasons["train-0000005"]
    assert "2 frames at its own rate could be read; the bucket needs 5" in reasons["train-0000008"]
    # the broken picture is met only where the pairing shows it
    assert "ref0.jpg" in reasons.get("train-0000003", "ref0.jpg")
    assert {line["shard"] for line in lines} <= {path.name for path in (corpora / "damaged" / "raw").glob("*.tar")}


def test_a_broken_reference_is_a_bad_sample(corpora: Path) -> None:
    one = feed(corpora, "damaged", live=True, references=5, reference_dropout=0.0)
    reader = RawReader(one, SOURCES, "cpu")
    (row,) = (row for row in one.index().rows(range(24)) if row.key == "train-0000003")
    for epoch in range(20):
        pairing = one.pair(row, epoch)
        if 0 in {*pairing.set_a, *pairing.set_b}:
            with pytest.raises(DataError, match=r"train-0000003.ref0.jpg: not a readable"):
                reader.read_one(Drawn(row, epoch, pairing))
            return
    raise AssertionError("no epoch shows the broken picture")


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (KeyError(6), True),
        (subprocess.CalledProcessError(1, "gs"), True),
        (OverflowError("too large"), True),
        (RuntimeError("Sizes of tensors must match"), True),
        (StorageError("s3://bucket is down"), False),
        (MemoryError(), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (torch.AcceleratorError("an illegal memory access"), False),
    ],
)
@pytest.mark.parametrize("where", ["decode_target", "encoder"])
def test_what_decoders_raise_is_the_samples_fault_and_what_machines_raise_is_not(
    error: Exception, blamed: bool, where: str, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    one = feed(corpora, "pictures", live=True)
    reader, row = RawReader(one, SOURCES, "cpu"), one.index().row(0)
    if where == "encoder":
        monkeypatch.setattr(SampleEncoder, "target", fail)
    else:
        monkeypatch.setattr(encode_module, where, fail)
        monkeypatch.setattr(live_module, where, fail)
    encode_one = partial(encode_rows, [row], load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48))
    if blamed:
        reason = rf"pictures/{row.key}: decoder error: {type(error).__name__}: "
        with pytest.raises(DataError, match=reason):
            reader.read_one(Drawn(row, 0, one.pair(row, 0)))
        ((_, found),) = encode_one()
        assert isinstance(found, DataError) and re.match(reason, str(found))
    else:
        with pytest.raises(type(error)):
            reader.read_one(Drawn(row, 0, one.pair(row, 0)))
        with pytest.raises(type(error)):
            list(encode_one())


def test_the_next_sample_is_decoded_while_one_is_encoded(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.load(corpora / "clips" / "raw" / INDEX_NAME)
    rows, begun = index.rows(range(4)), [threading.Event() for _ in range(5)]
    begun[4].set()  # the last one has none after it
    decode, encode, encoded = encode_module.decode_sample, SampleEncoder.target, iter(range(1, 5))

    def decoding(sample: RawSample, *args: Any) -> Any:
        begun[[row.key for row in rows].index(sample.key)].set()
        return decode(sample, *args)

    def encoding(self: SampleEncoder, frames: Any) -> Tensor:
        if len(frames) > 1:
            assert begun[next(encoded)].wait(20)
        return encode(self, frames)

    monkeypatch.setattr(encode_module, "decode_sample", decoding)
    monkeypatch.setattr(SampleEncoder, "target", encoding)
    found = list(encode_rows(rows, load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48)))
    assert [row.key for row, _ in found] == [row.key for row in rows]
    assert not any(isinstance(sample, DataError) for _, sample in found)


def test_a_corpus_of_which_nothing_can_be_read_ends_the_work(tmp_path: Path) -> None:
    damage = {f"train-{number:07d}": "clip" for number in range(24)}
    raw_corpus(tmp_path, "broken", damage, kind="video", frames=5)
    with pytest.raises(
        TooManyBadError, match=r"21 samples in a row can't be read, the last one because: .*readable clip"
    ):
        load(feed(tmp_path, "broken", live=True), 1, tmp_path / "q")


def tensors(batch: TrainingBatch) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(batch).items() if isinstance(value, Tensor)]


def test_actors_feed_two_ranks_with_the_planned_batches(tmp_path: Path, ray_cluster: None) -> None:
    """Ray Data from the plan to the ranks, with an actor that another rank may wait for and damaged samples.

    By the object store's own count of what was ever made in it, a micro-batch passes through it once: neither pictures
    nor a second copy of the latents.
    """
    before, stored = reserved("LiveEncoder"), plasma_bytes()
    raw_corpus(tmp_path, "large", DAMAGED, kind="video", frames=9, fitted="9x256x256")
    one = feed(tmp_path, "large", live=True, micro_batch=2, reference_dropout=0.0)
    shards = plan_dataset(one, 1, 4, world_size=2, pool=ActorPool(actors=2, cpus=0.25), read_ahead=1 << 16)

    def consume(rank: int) -> list[tuple[int, int, list[str], list[tuple[str, Tensor]]]]:
        loader = Loader(shards[rank], one, rank, 2, tmp_path / f"q{rank}", most_bad=1.0)
        return [
            (one.step, one.part, one.keys, [(name, tensor.clone()) for name, tensor in tensors(one.batch)])
            for one in loader
        ]

    with ThreadPoolExecutor(2) as ranks:  # both at once, as the ranks of a training ask
        got = list(ranks.map(consume, range(2)))
    sizes = [sum(tensor.nbytes for _, tensor in found) for micros in got for *_, found in micros]
    assert len(sizes) == 12 and min(sizes) > 250_000
    assert sum(sizes) <= plasma_bytes() - stored < 1.2 * sum(sizes)
    reader = RawReader(one, SOURCES, "cpu")
    bad = 0
    for rank, micros in enumerate(got):
        expected = [work.make() for work in reader.works(planned_rows(one, 1, 4, rank, 2))]
        assert [m[:3] for m in micros] == [(e.step, e.part, e.keys) for e in expected]
        for (_, _, _, found), made in zip(micros, expected, strict=True):
            assert [name for name, _ in found] == [name for name, _ in tensors(made.batch)]
            assert all(tensor.equal(getattr(made.batch, name)) for name, tensor in found)
        lines = (tmp_path / f"q{rank}").read_text().splitlines() if (tmp_path / f"q{rank}").exists() else []
        assert [json.loads(line)["key"] for line in lines] == [one.key for made in expected for one in made.bad]
        bad += len(lines)
    assert bad
    assert reserved("LiveEncoder") - before == {0.25: 2}
