"""An encoded corpus that grows: what is encoded again, what is kept, and that its history leaves no trace.

Run: python -m pytest tests/pipelines/encoding/test_growth.py
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from encoded_corpora import SAMPLES, SOURCES, KilledError, Ran, captioned, files, inline_actors, run, silent, write_raw
from faulty_s3 import QUICK, Proxy, serve_s3

from domainshuttle.pipelines.encoding.corpus import encode
from domainshuttle.pipelines.encoding.target import EncodingJob
from domainshuttle.pipelines.encoding.units import NOTE_SUFFIX
from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME, INDEX_NAME, WORK_NAME
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexRow, write_index
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.shards.tar import ShardWriter, read_members
from domainshuttle.pipelines.shards.tensors import EncodedSample
from domainshuttle.pipelines.storage import files as storage
from domainshuttle.pipelines.storage.files import list_dated, read_bytes, write_file
from domainshuttle.pipelines.storage.uri import join

ran = pytest.fixture(inline_actors)


def test_a_corpus_that_grew_in_steps_is_the_one_that_was_encoded_at_once(tmp_path: Path, ran: Ran) -> None:
    steps, once = tmp_path / "steps", tmp_path / "once"
    write_raw(steps, {"b": SAMPLES[:6]})
    assert (run(steps).encoded, ran.units) == (6, 2)
    write_raw(steps, {"b": SAMPLES[:9]})  # the end of a shard that grew
    second = run(steps)
    assert (second.encoded, second.copied, second.new, second.unchanged) == (3, 2, 3, 6)
    before = {path.name: path.stat().st_mtime_ns for path in (steps / "encoded").glob("*.tar")}
    write_raw(steps, {"a": SAMPLES[12:18], "b": SAMPLES[:9], "c": SAMPLES[18:]})  # also before it in order
    third = run(steps)
    assert (third.encoded, third.copied, third.captions) == (8, 0, 0)
    kept = {path.name: path.stat().st_mtime_ns for path in (steps / "encoded").glob("b-*.tar")}
    assert kept == before
    write_raw(once, {"a": SAMPLES[12:18], "b": SAMPLES[:9], "c": SAMPLES[18:]})
    run(once)
    assert files(steps) == files(once)
    assert len(list((steps / "encoded" / WORK_NAME).glob(f"*{NOTE_SUFFIX}"))) == 6
    # again: nothing is made
    ran.units = 0
    assert run(steps).unchanged == 17 and ran.units == 0


def test_a_sample_that_comes_first_shifts_the_others_and_encodes_none_of_them(tmp_path: Path, ran: Ran) -> None:
    write_raw(tmp_path, {"a": SAMPLES[1:10]})
    run(tmp_path)
    write_raw(tmp_path, {"a": SAMPLES[:10]})
    made = run(tmp_path)
    assert (made.encoded, made.copied, made.new) == (1, 9, 1)
    write_raw(tmp_path, {"other": SAMPLES[5:10], "names": SAMPLES[:5]})
    assert (again := run(tmp_path)).encoded == 0 and again.copied == 10 and again.unchanged == 10


def test_new_captions_encode_captions_alone(tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(tmp_path, {"a": SAMPLES[:6]})
    run(tmp_path)
    changed = [captioned(SAMPLES[0], "another one"), *SAMPLES[1:6]]
    scored = changed[1].info.model_copy(update={"scores": {"aesthetic": 5.0}})
    changed[1] = RawSample(changed[1].key, scored, changed[1].files)
    write_raw(tmp_path, {"a": changed})
    with monkeypatch.context() as patch:
        patch.setattr("domainshuttle.model.encoders.BlockDCTCodec.encode", None)  # nothing asks for it
        made = run(tmp_path)
    assert (made.encoded, made.captions, made.copied, made.changed) == (0, 1, 3, 2)
    once = tmp_path / "once"
    write_raw(once, {"a": changed})
    run(once)
    assert files(tmp_path) == files(once)
    assert Index.load(tmp_path / "encoded" / INDEX_NAME).row(1).scores == {"aesthetic": 5.0}


def test_another_text_encoder_leaves_latents(tmp_path: Path, ran: Ran) -> None:
    write_raw(tmp_path, {"a": SAMPLES[:6]})
    run(tmp_path)
    other = replace(SOURCES, text_len=20)
    with pytest.raises(DataError, match=r"text was .*:48, now .*:20.*--overwrite.*latents.*copied"):
        run(tmp_path, other)
    made = run(tmp_path, other, overwrite=True)
    assert (made.encoded, made.captions) == (0, 6)
    once = tmp_path / "once"
    write_raw(once, {"a": SAMPLES[:6]})
    run(once, other)
    assert files(tmp_path) == files(once)


def test_changed_and_removed_samples_lose_their_copies(tmp_path: Path, ran: Ran) -> None:
    write_raw(tmp_path, {"a": SAMPLES[:8]})
    run(tmp_path)
    other = RawSample(SAMPLES[1].key, SAMPLES[2].info, SAMPLES[2].files)  # other pictures under its name
    write_raw(tmp_path, {"a": [SAMPLES[0], other, *SAMPLES[3:8]]})
    made = run(tmp_path)
    assert (made.removed, made.changed, made.new, made.unchanged, made.encoded) == (1, 1, 0, 6, 1)
    held = {path.name for path in (tmp_path / "encoded").glob("*.tar")}
    assert held == set(Index.load(tmp_path / "encoded" / INDEX_NAME).codes("shard")[1])
    with pytest.raises(DataError, match=r"of 7 encoded samples 6 are not in the raw corpus any more.*--overwrite"):
        write_raw(tmp_path, {"a": SAMPLES[:1]})
        run(tmp_path)
    assert run(tmp_path, overwrite=True).removed == 6


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4])
def test_a_run_that_is_killed_anywhere_goes_on_where_it_was(tmp_path: Path, ran: Ran, most: int) -> None:
    write_raw(tmp_path, {"a": SAMPLES[:6]})
    run(tmp_path)
    before = files(tmp_path)
    whole = {"a": [captioned(SAMPLES[0], "new"), *SAMPLES[1:7]], "b": SAMPLES[8:17]}
    write_raw(tmp_path, whole)
    ran.units, ran.most = 0, most
    with pytest.raises(KilledError):
        run(tmp_path)
    assert before.items() <= files(tmp_path).items()  # the corpus of before stays until its successor is whole
    (tmp_path / "encoded" / "b-0000-0123456789ab-000000.tar").write_bytes(b"a kill between shard and note")
    ran.units, ran.most = 0, None
    made = run(tmp_path)
    assert ran.units == 5 - most
    assert (made.new, made.changed, made.unchanged) == (10, 1, 5)
    once = tmp_path / "once"
    write_raw(once, whole)
    run(once)
    assert files(tmp_path) == files(once)


def test_a_filter_is_counted_and_removes_nothing_unasked(tmp_path: Path, ran: Ran) -> None:
    write_raw(tmp_path, {"a": SAMPLES[:10]})
    rows = Index.load(tmp_path / "raw" / INDEX_NAME)
    where = "'human' in domains"
    count = len(rows.filter(where))
    assert 0 < count < 10
    made = run(tmp_path, where=where)
    assert (made.encoded, made.left_out) == (count, 10 - count)
    keys = Index.load(tmp_path / "encoded" / INDEX_NAME).column("key").tolist()
    assert keys == rows.filter(where).column("key").tolist()
    assert run(tmp_path).encoded == 10 - count
    with pytest.raises(DataError, match=rf"{10 - count} samples that are encoded would be removed.*--overwrite"):
        run(tmp_path, where=where)
    with pytest.raises(DataError, match="leaves none of the 10 samples"):
        run(tmp_path, where="frames > 1")


def test_a_damaged_or_missing_shard_is_made_again(tmp_path: Path, ran: Ran) -> None:
    write_raw(tmp_path, {"a": SAMPLES[:8]})
    run(tmp_path)
    whole = files(tmp_path)
    first, second = sorted((tmp_path / "encoded").glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:2000])
    assert run(tmp_path).encoded == 8
    assert files(tmp_path) == whole
    # a copy that would be taken over is compared with its checksum
    data = bytearray(first.read_bytes())
    at = Index.load(tmp_path / "encoded" / INDEX_NAME).row(1).members[1]
    data[at.offset + at.size - 1] ^= 1
    first.write_bytes(data)
    write_raw(tmp_path, {"a": SAMPLES[1:9]})
    made = run(tmp_path)
    assert (made.encoded, made.copied) == (2, 6)


def test_raw_bytes_that_are_not_those_of_the_index_are_quarantined(tmp_path: Path, ran: Ran) -> None:
    write_raw(tmp_path, {"a": SAMPLES[:8]})
    row = Index.load(tmp_path / "raw" / INDEX_NAME).row(3)
    shard = tmp_path / "raw" / row.shard
    data = bytearray(shard.read_bytes())
    member = next(one for one in row.members if one.extension == "jpg")
    data[member.offset + member.size - 20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"1 of 8 samples is bad.*checksum differs 1"):
        run(tmp_path)
    assert not (tmp_path / "encoded" / INDEX_NAME).exists()
    assert run(tmp_path, most_bad=0.2).bad == 1


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(storage, "LIMITS", replace(QUICK, attempts=12))
    with serve_s3() as proxy:
        yield proxy


def test_a_corpus_in_a_store_grows_there_as_on_a_disk(tmp_path: Path, ran: Ran, store: Proxy) -> None:
    place = store.uri("corpora/p")
    job = EncodingJob(CorpusSpec("p", "raw", join(place, "raw")), CorpusSpec("p", "encoded", join(place, "encoded")))
    store.fail("GET", *[None, (503, "SlowDown"), "reset", "cut"] * 4)
    store.fail("PUT", *[None, (503, "SlowDown"), (500, "InternalError")] * 3)
    for count, encoded in ((5, 5), (9, 4)):
        write_raw(tmp_path, {"a": SAMPLES[:count]})
        for name, *_ in list_dated(tmp_path / "raw"):
            write_file(tmp_path / "raw" / name, join(place, f"raw/{name}"))
        (made,) = encode([job], SOURCES, silent, samples_per_part=4)
        assert (made.encoded, made.bad, made.metadata.encoders) == (encoded, 0, made.metadata.encoders)
    run(tmp_path)
    stored = {name: read_bytes(join(place, f"encoded/{name}")) for name, *_ in list_dated(join(place, "encoded"))}
    assert stored == files(tmp_path)
    assert not store.faults["GET"] and not store.faults["PUT"]
    store.always = (503, "SlowDown")
    with pytest.raises(StorageError):
        encode([job], SOURCES, silent, samples_per_part=4)


def to_former_format(folder: Path) -> None:
    """Makes of an encoded corpus what versions until November 2026 made of the same raw one."""
    encoded, index = folder / "encoded", Index.load(folder / "encoded" / INDEX_NAME)
    metadata, rows = index.parts[0], index.rows(range(len(index)))
    written = []
    with ShardWriter(folder / "former", "part-000000", 1 << 30) as writer:
        for row in rows:
            sample = EncodedSample.from_members(row.key, read_members(encoded, row.shard, row.members))
            writer.write(row.key, sample.members())
            written.append(sample)
    made = [
        IndexRow.of(entry, sample.info, row.bucket, row.text_tokens, row.caption_tokens)
        for entry, sample, row in zip(writer.entries, written, rows, strict=True)
    ]
    work = folder / "former" / WORK_NAME
    work.mkdir()
    write_index(folder / "former" / INDEX_NAME, made, metadata)
    write_index(work / "part-000000.parquet", made, metadata)
    (work / "part-000000.done").touch()
    raw = Index.load(folder / "raw" / INDEX_NAME)
    recipe = {"recipe": f"{raw.digest} {sorted(metadata.encoders.items())}", "parts": 1, "format": 2}
    (work / "recipe.json").write_text(json.dumps(recipe))
    shutil.copy(encoded / EMPTY_CAPTION_NAME, folder / "former")
    shutil.rmtree(encoded)
    (folder / "former").rename(encoded)


def test_a_corpus_of_the_former_format_is_converted_or_refused(tmp_path: Path, ran: Ran) -> None:
    write_raw(tmp_path, {"a": SAMPLES[:8]})
    run(tmp_path)
    whole = files(tmp_path)
    to_former_format(tmp_path)
    write_raw(tmp_path, {"a": SAMPLES[:9]})  # of which it does not say what is still right
    with pytest.raises(DataError, match=r"encoded by an earlier version of other raw samples.*--overwrite"):
        run(tmp_path)
    write_raw(tmp_path, {"a": SAMPLES[:8]})
    recipe = tmp_path / "encoded" / WORK_NAME / "recipe.json"
    said = recipe.read_text()
    for damaged in ("", "{", "[]", "{}", said.replace("[(", "[").replace("', '", "")):
        recipe.write_text(damaged)
        with pytest.raises(DataError, match="without notes"):
            run(tmp_path)
    recipe.write_text(said)
    made = run(tmp_path)
    assert (made.encoded, made.captions, made.copied, made.unchanged) == (0, 0, 8, 8)
    assert files(tmp_path) == whole
    assert not list((tmp_path / "encoded" / WORK_NAME).glob("part-*"))
