"""Encoding and loading: raw samples to latents to the batches that the plan says.

Run: python -m pytest tests/pipelines/loading/test_encode_and_load.py
"""

import itertools
import json
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from encoded_corpora import inline_actors
from ray import cloudpickle
from ray_books import reserved

from domainshuttle.model.encoders import byte_umt5, load_text_encoder, load_video_encoder, pad_text
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.corpora.builder import PartJob, build_corpus, build_part
from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.corpora.survey import Survey
from domainshuttle.pipelines.encoding import corpus as encode_module
from domainshuttle.pipelines.encoding.actor import EncodingActor, Task
from domainshuttle.pipelines.encoding.corpus import encode
from domainshuttle.pipelines.encoding.sample_encoder import decode_sample, encode_rows, to_pixels
from domainshuttle.pipelines.encoding.target import EncodingJob
from domainshuttle.pipelines.encoding.units import Recipe, cut_units, read_note
from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME, INDEX_NAME, Parts
from domainshuttle.pipelines.index.spec import CorpusShare, CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexMetadata, read_metadata, write_index
from domainshuttle.pipelines.loading import ray_source as plan_source
from domainshuttle.pipelines.loading.buffers import Staging
from domainshuttle.pipelines.loading.encoded import EncodedReader, Located
from domainshuttle.pipelines.loading.loader import Loader
from domainshuttle.pipelines.loading.ray_source import PlanSource, WaitForConsumers, plan_dataset, unpacked
from domainshuttle.pipelines.loading.reader import Drawn, MicroBatch, Work
from domainshuttle.pipelines.plan.feed import EncoderSources, Feed, planned_rows
from domainshuttle.pipelines.plan.pairing import choose_references
from domainshuttle.pipelines.quarantine import BadSample
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.shards.tar import read_members
from domainshuttle.pipelines.shards.tensors import EncodedSample
from domainshuttle.pipelines.values import ActorPool

SOURCES = EncoderSources("block-dct", "byte-umt5", 48)
CONFIG = SpritesConfig(kind="image", samples=48, identities=72, side=48, seed=4)
BUCKETS = [parse_bucket("1x32x32")]


def silent(*_: Any) -> None:
    """No progress."""


def job_of(name: str, raw: Path, encoded: Path) -> EncodingJob:
    return EncodingJob(CorpusSpec(name, "raw", str(raw)), CorpusSpec(name, "encoded", str(encoded)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """Encoded in this process; what a cluster's actors make of it is compared with this."""
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus("pictures", CONFIG, BUCKETS, folder / "raw", silent, samples_per_part=16)
    with pytest.MonkeyPatch.context() as monkeypatch:
        inline_actors(monkeypatch)
        job = job_of("pictures", folder / "raw", folder / "encoded")
        encode([job], SOURCES, silent, ActorPool(), samples_per_part=16)
    return folder


def feed(corpus: Path, **changes: Any) -> Feed:
    base = Feed(
        shares=(CorpusShare("pictures", str(corpus / "encoded" / INDEX_NAME), 1.0),),
        seed=9,
        global_batch=8,
        micro_batch=2,
        text_len=48,
        references=3,
        paired=True,
    )
    return replace(base, **changes)


def load(corpus: Path, one: Feed, steps: int, tmp_path: Path, rank: int = 0, world: int = 1) -> list[MicroBatch]:
    rows = [planned_rows(one, 0, steps, rank, world)]
    return list(Loader(rows, one, rank, world, tmp_path / f"q{rank}.jsonl"))


def test_an_index_that_is_written_anew_while_a_run_reads_it_is_refused(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoded"
    shutil.copytree(corpus / "encoded", folder)
    one = feed(corpus, shares=(CorpusShare("pictures", str(folder / INDEX_NAME), 1.0),))
    loader = Loader([planned_rows(one, 0, 1, 0, 1)], one, 0, 1, tmp_path / "q.jsonl")
    assert len(list(loader)) == 4
    # as a task of Ray Data would plan that starts after the change, on another node
    rows = Index.load(folder / INDEX_NAME)
    write_index(folder / INDEX_NAME, rows.table.slice(1), rows.parts[0])
    later = replace(one, text_dropout=1e-9)  # another feed: nothing of it is loaded yet
    with pytest.raises(DataError, match="was written anew while the run reads it"):
        list(Loader([planned_rows(later, 0, 1, 0, 1)], one, 0, 1, tmp_path / "q.jsonl"))


def test_encoded_samples_are_what_the_encoders_give(corpus: Path) -> None:
    raw, encoded = Index.load(corpus / "raw" / INDEX_NAME), Index.load(corpus / "encoded" / INDEX_NAME)
    assert encoded.column("key").tolist() == raw.column("key").tolist()
    assert encoded.column("sample_id").tolist() == raw.column("sample_id").tolist()
    video, text = load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48)
    row = raw.row(7)
    sample = RawSample.from_members(row.key, read_members(row.folder, row.shard, row.members))
    target, references = decode_sample(sample, BUCKETS[0])
    ((_, found),) = encode_rows([row], video, text)
    assert not isinstance(found, DataError)
    latents = video.encode(to_pixels(target))[0]
    torch.testing.assert_close(torch.from_numpy(found.target).view(torch.bfloat16), latents.bfloat16())
    reference = video.encode(to_pixels(references[1][None]))[0, :, 0]
    torch.testing.assert_close(torch.from_numpy(found.references[1]).view(torch.bfloat16), reference.bfloat16())
    assert found.text.shape[0] == len(sample.info.caption.encode()) + 1


def test_a_second_run_makes_nothing_anew_and_other_encoders_remove_nothing_unasked(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_actors(monkeypatch)
    shard = next((corpus / "encoded").glob("*.tar"))
    before = shard.stat().st_mtime_ns
    job = job_of("pictures", corpus / "raw", corpus / "encoded")
    (made,) = encode([job], SOURCES, silent, ActorPool(), samples_per_part=16)
    metadata, bad = made.metadata, made.bad
    assert shard.stat().st_mtime_ns == before
    assert bad == 0
    assert metadata.encoders["video"].startswith("block-dct:")
    # other encoders would take the whole corpus's place: only when that is wanted
    with pytest.raises(DataError, match=r"is a whole encoded corpus.*text was .*:48, now .*:40.*--overwrite"):
        encode([job], replace(SOURCES, text_len=40), silent, samples_per_part=16)
    assert shard.stat().st_mtime_ns == before and read_metadata(corpus / "encoded" / INDEX_NAME) == metadata


def test_a_node_with_other_encoders_encodes_nothing(corpus: Path, tmp_path: Path) -> None:
    """An actor finds other weights, configuration or tokenizer than those that the corpus is to name."""
    raw = Index.load(corpus / "raw" / INDEX_NAME)
    made_by = dict(Index.load(corpus / "encoded" / INDEX_NAME).parts[0].encoders)
    recipe = Recipe(made_by, None)
    (unit, *_) = cut_units(raw, recipe, 64, 1 << 30)
    task = Task(0, str(tmp_path / "encoded"), unit.name, raw.rows(unit.rows), {}, recipe, 1 << 30)
    batch = {"task": np.array([cloudpickle.dumps(task)], object)}
    for kind in ("video", "text", None):
        encoders = {**made_by, **({kind: "another"} if kind else {})}
        told = [json.loads(str(one["told"][0])) for one in EncodingActor(encoders, SOURCES, "cpu")(batch)]
        fault = told[-1].get("fault", "")
        assert (f"encoders.{kind} is" in fault and "give all nodes the same files" in fault) if kind else not fault
        assert (read_note(tmp_path / "encoded", unit.name) is None) == bool(kind)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"), "CUDA error: an illeg"),
        (StorageError("s3://b/x: the store is down"), "s3://b/x: the store is down"),
        (RuntimeError("a mistake of ours"), None),
    ],
)
def test_what_fails_on_a_node_is_told_with_its_name_and_a_mistake_is_a_traceback(
    error: Exception, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: EncodingActor, task: Task) -> Any:
        raise error

    monkeypatch.setattr(EncodingActor, "__init__", lambda self: setattr(self, "fault", ""))
    monkeypatch.setattr(EncodingActor, "make", fails)
    task = Task(0, "f", "u", [], {}, Recipe({}, None), 1)
    calls = EncodingActor()({"task": np.array([cloudpickle.dumps(task)], object)})  # type: ignore[call-arg]
    if said is None:
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            next(calls)
        return
    (told,) = [json.loads(str(one["told"][0])) for one in calls]
    assert told["fault"].startswith(f"on node {socket.gethostname()}: {said}") and "\n" not in told["fault"]
    assert told["of_machine"] is True


def test_actors_reserve_what_they_are_told_and_alone_load_encoders(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError("the head node is small")

    monkeypatch.setattr(encode_module, "load_encoders", refuse)
    before = reserved("EncodingActor")
    job = job_of("pictures", corpus / "raw", tmp_path / "encoded")
    (made,) = encode([job], SOURCES, silent, ActorPool(actors=2, cpus=0.25), samples_per_part=12)
    metadata = made.metadata
    assert reserved("EncodingActor") - before == {0.25: 2}
    assert metadata.encoders == read_metadata(corpus / "encoded" / INDEX_NAME).encoders
    name = EMPTY_CAPTION_NAME
    assert (tmp_path / "encoded" / name).read_bytes() == (corpus / "encoded" / name).read_bytes()
    same = Index.load(corpus / "encoded" / INDEX_NAME).column("checksum").tolist()
    assert Index.load(tmp_path / "encoded" / INDEX_NAME).column("checksum").tolist() == same
    with pytest.raises(DataError, match=r"the encoders can't be loaded: no encoder at \./nowhere"):
        encode([job], replace(SOURCES, text="./nowhere"), silent)


def test_parts_of_another_recipe_are_cleared(tmp_path: Path) -> None:
    first = Parts(tmp_path, 2, "one")
    first.begin()
    source = SpritesBuilder(CONFIG, "pictures")
    survey = Survey(tmp_path / "survey", tuple(source.pieces()))
    survey.take(0, source)
    build_part(first, 0, PartJob("pictures", CONFIG, survey, BUCKETS, 1 << 20), survey.select(None)[0][:4])
    assert first.missing() == [1]
    with pytest.raises(DataError, match="1 of 2 parts"):
        first.merge(IndexMetadata(corpus="pictures", stage="raw"))
    again = Parts(tmp_path, 2, "one")
    again.begin()
    assert again.missing() == [1]
    other = Parts(tmp_path, 2, "two")
    other.begin()
    assert other.missing() == [0, 1]
    assert not list(tmp_path.glob("*.tar"))


def test_too_many_bad_samples_end_the_work(tmp_path: Path) -> None:
    parts = Parts(tmp_path, 1, "x")
    parts.begin()
    parts.finish(0, [], [BadSample("s", "a.tar", "k", "corrupt")], IndexMetadata(corpus="c", stage="raw"))
    with pytest.raises(DataError, match="1 of 1 sample is bad, at most 5% may be"):
        parts.merge(IndexMetadata(corpus="c", stage="raw"))
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["reason"] == "corrupt"


def test_damaged_raw_samples_go_to_quarantine(corpus: Path) -> None:
    video, text = load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48)
    index = Index.load(corpus / "raw" / INDEX_NAME)
    good, bad = index.row(0), index.row(1)
    # the picture's bytes are said to be elsewhere in the shard
    shifted = tuple(m if m.extension == "json" else replace(m, offset=m.offset + 700) for m in bad.members)
    results = list(encode_rows([good, replace(bad, members=shifted)], video, text))
    reasons = {row.key: one for row, one in results if isinstance(one, DataError)}
    assert list(reasons) == [bad.key]
    assert bad.key in str(reasons[bad.key])


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 2), (4, 2), (8, 1)])
def test_every_world_trains_the_planned_batch(corpus: Path, world: int, micro: int) -> None:
    one = feed(corpus, micro_batch=micro)
    plan = one.plan()
    tables = [planned_rows(one, 3, 6, rank, world).to_pylist() for rank in range(world)]
    for step in (3, 4, 5):
        rows = Counter(row for table in tables for entry in table if entry["step"] == step for row in entry["rows"])
        assert rows == Counter(plan[step].rows.tolist())
    assert all(len(table) == 3 * one.accumulation(world) for table in tables)


def test_ray_hands_every_rank_its_own_rows_in_order(corpus: Path, ray_cluster: None) -> None:
    one = feed(corpus)
    shards = plan_dataset(one, 2, 75, world_size=2)
    import ray

    @ray.remote(num_cpus=0)
    def consume(shard: Any) -> list[dict[str, Any]]:
        return [row for table in shard for row in table.to_pylist()]

    got = ray.get([consume.remote(shard) for shard in shards])
    for rank, rows in enumerate(got):
        assert rows == planned_rows(one, 2, 75, rank, 2).to_pylist()


def test_a_plan_that_is_held_back_comes_whole_while_its_loop_rests(
    corpus: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_source, "_PLAN_AHEAD", 1)
    one = feed(corpus)
    (blocks,) = plan_dataset(one, 0, 400, world_size=1)
    assert blocks.iterator.get_context().custom_execution_callback_classes == [WaitForConsumers]
    tables = iter(blocks)
    rows = next(tables).to_pylist()  # the rank's own
    assert len(rows) == 200 * one.accumulation(1)
    rows += [row for table in tables for row in table.to_pylist()]
    assert rows == planned_rows(one, 0, 400, 0, 1).to_pylist()


@pytest.mark.parametrize(
    ("operators", "rests"), [([], True), ([(1, True), (0, False)], True), ([(1, True), (2, False)], False)]
)
def test_ray_datas_loop_rests_while_no_task_may_hand_over(
    operators: list[tuple[int, bool]], rests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Operator:
        tasks: int
        _in_task_output_backpressure: bool

        def get_active_tasks(self) -> list[None]:
            return [None] * self.tasks

    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    WaitForConsumers().on_execution_step(SimpleNamespace(_topology=dict.fromkeys(Operator(*one) for one in operators)))
    assert bool(slept) == rests


def test_a_batch_has_the_tensors_of_its_samples(corpus: Path, tmp_path: Path) -> None:
    one = feed(corpus, global_batch=4, micro_batch=4)
    (micro,) = load(corpus, one, 1, tmp_path)
    batch, index = micro.batch, one.index()
    planned = one.plan()[0]
    rows = index.rows(planned.rows)
    assert micro.keys == [f"pictures/{row.key}" for row in rows]
    assert batch.sample_ids.tolist() == [row.sample_id for row in rows]
    raw = {row.key: row for row in Index.load(corpus / "raw" / INDEX_NAME).rows(range(48))}
    video, text = load_video_encoder("block-dct"), load_text_encoder("byte-umt5", 48)
    for number, (row, epoch) in enumerate(zip(rows, planned.epochs, strict=True)):
        source = raw[row.key]
        sample = RawSample.from_members(row.key, read_members(source.folder, source.shard, source.members))
        target, pictures = decode_sample(sample, BUCKETS[0])
        torch.testing.assert_close(batch.latents[number], video.encode(to_pixels(target))[0].bfloat16())
        words = pad_text(text.encode([sample.info.caption]), 48)[0].bfloat16()
        torch.testing.assert_close(batch.text[number], words, atol=0.02, rtol=0.02)
        pairing = choose_references(
            row.reference_subjects, row.reference_origins, 9, int(epoch), row.sample_id, 3, step=planned.draw
        )
        for prefix, chosen in (("", pairing.set_a), ("paired_", pairing.set_b)):
            mask = getattr(batch, f"{prefix}reference_mask")[number]
            assert int(mask.sum()) == len(chosen)
            for slot, picture in enumerate(chosen):
                expected = video.encode(to_pixels(pictures[picture][None]))[0, :, 0].bfloat16()
                torch.testing.assert_close(getattr(batch, f"{prefix}references")[number, slot], expected)
                subject = sample.info.references[picture].subject
                assert getattr(batch, f"{prefix}reference_subjects")[number, slot] == subject
                wanted = sample.info.subjects[subject].domain
                assert getattr(batch, f"{prefix}reference_domains")[number, slot] == wanted


def test_dropout_leaves_out_references_and_captions(corpus: Path, tmp_path: Path) -> None:
    one = feed(corpus, reference_dropout=0.5, text_dropout=0.5, global_batch=12, micro_batch=12, paired=False)
    micros = list(load(corpus, one, 16, tmp_path))
    shown = [micro.batch.reference_mask.any(1) for micro in micros]
    assert all(bool(mask.any()) == bool(mask.all()) for mask in shown)  # drawn once a step
    dropped = (~torch.cat(shown)).float().mean()
    empty = load_text_encoder("byte-umt5", 48).encode([""])[0].bfloat16()
    no_text = torch.tensor(
        [bool((text[len(empty) :] == 0).all()) for micro in micros for text in micro.batch.text]
    ).float()
    assert 0.25 < float(dropped) < 0.75
    assert 0.25 < float(no_text.mean()) < 0.75
    assert not any(micro.batch.has_pairs for micro in micros)


def test_reading_ahead_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    one = feed(corpus, micro_batch=8)
    rows = planned_rows(one, 0, 5, 0, 1)
    loaders = [
        Loader([rows], one, 0, 1, tmp_path / "q", read_ahead=size, threads=threads)
        for size, threads in ((0, 1), (1 << 30, 3))
    ]
    for first, second in zip(*loaders, strict=True):
        assert first.keys == second.keys
        assert first.batch.latents.equal(second.batch.latents)
        assert first.batch.references.equal(second.batch.references)


def test_rows_of_another_rank_or_out_of_order_are_refused(corpus: Path, tmp_path: Path) -> None:
    one = feed(corpus)
    wrong = [planned_rows(one, 0, 2, 1, 2)]
    with pytest.raises(DataError, match="rank 0 was handed step 0, part 0 of rank 1"):
        list(Loader(wrong, one, 0, 2, tmp_path / "q"))
    gap = [planned_rows(one, 0, 1, 0, 1), planned_rows(one, 2, 3, 0, 1)]
    with pytest.raises(DataError, match="the plan's order was lost"):
        list(Loader(gap, one, 0, 1, tmp_path / "q"))


def test_a_bad_sample_is_quarantined_and_substituted(corpus: Path, tmp_path: Path) -> None:
    one = feed(corpus, global_batch=48, micro_batch=48)
    broken = one.plan()[0].rows[5]
    index = one.index()
    victim = index.row(int(broken))
    source = EncodedReader(one, Staging())

    def damaged(drawn: Drawn) -> Located:
        if drawn.row.key == victim.key:
            members = tuple(replace(m, size=m.size // 2) for m in drawn.row.members)
            drawn = replace(drawn, row=replace(drawn.row, members=members))
        return source.locate(drawn)

    source.read = damaged
    rows = [planned_rows(one, 0, 1, 0, 1)]
    (micro,) = list(Loader(rows, one, 0, 1, tmp_path / "q.jsonl", source=source))
    assert micro.batch.batch_size == 48
    assert f"pictures/{victim.key}" not in micro.keys
    (line,) = (tmp_path / "q.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == victim.key


def test_a_batch_that_does_not_divide_is_refused(corpus: Path) -> None:
    with pytest.raises(DataError, match="choose a multiple of 6"):
        feed(corpus).accumulation(3)


def test_wans_encoders_from_a_folder_encode_the_same_samples(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real classes, tiny, saved on disk as a diffusers folder has them, through the same function."""
    inline_actors(monkeypatch)
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(tmp_path / "vae")
    model, tokenizer = byte_umt5(seed=2)
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sources = EncoderSources(str(tmp_path), str(tmp_path), 32)
    job = job_of("pictures", corpus / "raw", tmp_path / "encoded")
    (made,) = encode([job], sources, silent, ActorPool(actors=1), samples_per_part=48)
    metadata, bad = made.metadata, made.bad
    assert bad == 0
    assert str(tmp_path) in metadata.encoders["video"]
    with pytest.raises(DataError, match="encoders"):
        Index.concat([Index.load(tmp_path / "encoded" / INDEX_NAME), Index.load(corpus / "encoded" / INDEX_NAME)])
    row = Index.load(tmp_path / "encoded" / INDEX_NAME).row(11)
    sample = EncodedSample.from_members(row.key, read_members(row.folder, row.shard, row.members))
    raw = Index.load(corpus / "raw" / INDEX_NAME).row(11)
    original = RawSample.from_members(raw.key, read_members(raw.folder, raw.shard, raw.members))
    target, _ = decode_sample(original, BUCKETS[0])
    expected = load_video_encoder(str(tmp_path)).encode(to_pixels(target))[0]
    found = torch.from_numpy(sample.target).view(torch.bfloat16).float()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_few_tasks_make_the_blocks_of_a_long_run_one_row_each(corpus: Path) -> None:
    one = feed(corpus)
    source = PlanSource(one, 7, 100_000, world_size=4)
    tasks = source.get_read_tasks(1)
    assert len(tasks) < 30
    blocks = list(itertools.islice(tasks[0](), 8))
    assert {len(block) for block in blocks} == {1}
    for number, block in enumerate(blocks):
        chunk, rank = divmod(number, 4)
        first = 7 + 32 * chunk
        assert unpacked(block).to_pylist() == planned_rows(one, first, first + 32, rank, 4).to_pylist()
    # of ranks that share their samples, neighbours are handed the same
    shared = list(itertools.islice(PlanSource(one, 7, 9, world_size=4, sharing=2).get_read_tasks(1)[0](), 4))
    for rank, block in enumerate(shared):
        assert unpacked(block).to_pylist() == planned_rows(one, 7, 9, rank // 2, 2).to_pylist()
    # an actor of the live encoders takes a micro-batch at a time
    single = PlanSource(one, 0, 2, world_size=2, steps_per_block=None).get_read_tasks(1)[0]()
    assert [(row["step"], row["rank"]) for block in single for row in unpacked(block).to_pylist()] == [
        (step, rank) for step in range(2) for _ in range(one.accumulation(2)) for rank in range(2)
    ]


def test_reading_ahead_holds_the_bytes_it_is_allowed_and_one_batch_more(corpus: Path, tmp_path: Path) -> None:
    one = feed(corpus, micro_batch=4)
    reader = EncodedReader(one, Staging())
    held = most = 0

    class Counted:
        """Counts the bytes of batches that were made and not yet taken."""

        def works(self, table: Any) -> Iterator[Work[Any]]:
            for work in reader.works(table):
                yield replace(work, make=partial(self.make, work))

        def make(self, work: Work[Any]) -> MicroBatch[Any]:
            nonlocal held, most
            made = work.make()
            tensors = [value for value in vars(made.batch).values() if isinstance(value, torch.Tensor)]
            size = sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.bfloat16)
            assert size <= work.size
            held += work.size
            most = max(most, held)
            return made

    size = next(reader.works(planned_rows(one, 0, 1, 0, 1))).size
    rows = [planned_rows(one, 0, 8, 0, 1)]
    for _ in Loader(rows, one, 0, 1, tmp_path / "q", read_ahead=3 * size, threads=1, source=Counted()):
        time.sleep(0.05)  # until what may be read ahead is
        held -= size
    assert 3 * size <= most <= 4 * size


def test_without_dropout_of_captions_their_empty_one_is_not_needed(corpus: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(corpus / "encoded", copied)
    (copied / EMPTY_CAPTION_NAME).unlink()
    one = feed(corpus, shares=(CorpusShare("pictures", str(copied / INDEX_NAME), 1.0),))
    own = next(iter(Loader([planned_rows(one, 0, 1, 0, 1)], one, 0, 1, tmp_path / "q")))
    whole = next(iter(Loader([planned_rows(one, 0, 1, 0, 1)], feed(corpus), 0, 1, tmp_path / "q")))
    assert own.batch.text.equal(whole.batch.text)
    with pytest.raises(DataError, match="empty_caption"):
        Loader([], replace(one, text_dropout=0.1), 0, 1, tmp_path / "q")
