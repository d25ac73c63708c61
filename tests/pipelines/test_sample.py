"""The sample's schema and its two forms. Run: pytest tests/pipelines/test_sample.py"""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import (
    RawSample,
    Reference,
    SampleInfo,
    Subject,
    check_extension,
    check_key,
    safe_key,
    sample_id,
)
from domainshuttle.pipelines.shards.tensors import EncodedSample, tensor_views


def make_info(**changes: object) -> SampleInfo:
    values: dict[str, object] = {
        "caption": "a cat and a dog — two friends",
        "source": "uno",
        "kind": "image",
        "frames": 1,
        "size": (48, 64),
        "subjects": [Subject(id=0, word="cat", domain=1), Subject(id=1, word="dog", domain=-1)],
        "references": [
            Reference(file="ref0.jpg", subject=1, origin="photo", size=(10, 20)),
            Reference(file="ref1.png", subject=0, origin="edited", size=(30, 20)),
        ],
        "scores": {"aesthetic": 4.5},
    }
    return SampleInfo.model_validate({**values, **changes})


def make_encoded(key: str = "k0", seed: int = 0) -> EncodedSample:
    random = np.random.default_rng(seed)
    shapes = [(16, 2, 8, 8), (16, 8, 8), (16, 8, 8), (7, 32)]
    arrays = [torch.from_numpy(random.normal(size=shape)).bfloat16().view(torch.uint16).numpy() for shape in shapes]
    return EncodedSample(key, make_info(), arrays[0], arrays[1:3], arrays[3])


def test_sample_id_is_frozen() -> None:
    """Noise, pairing and checkpoints hang on it, so it must never change."""
    assert sample_id("uno", "0001") == -523153491529150032
    assert sample_id("uno", "0001") != sample_id("un", "o0001")
    ids = [sample_id("uno", str(number)) for number in range(1000)]
    assert len(set(ids)) == 1000
    assert min(ids) < 0 < max(ids) and all(-(2**63) <= value < 2**63 for value in ids)


@pytest.mark.parametrize(
    "key", ["", "..", "../x", "/etc/passwd", "a/b", "a.b", "-a", "a b", "é", "a\n", "a\0", "k" * 81]
)
def test_odd_keys_are_errors_and_can_be_made_safe(key: str) -> None:
    with pytest.raises(DataError, match="sample key"):
        check_key(key)
    assert check_key(safe_key(key)) == safe_key(key)
    assert safe_key(key) != safe_key(key + "!")


def test_a_safe_key_stays() -> None:
    assert safe_key("clip_01-a") == "clip_01-a"


@pytest.mark.parametrize("extension", ["", ".", "a..b", "../jpg", "a/b", "JPG", "jpg ", ".jpg", "a" * 20, "jpg\n"])
def test_odd_extensions_are_errors(extension: str) -> None:
    with pytest.raises(DataError, match="member extension"):
        check_extension(extension)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"subjects": [Subject(id=1, word="cat", domain=0)]}, "subject ids"),
        ({"subjects": [Subject(id=0, word="cat", domain=0)]}, "names subject 1"),
        ({"subjects": [{"id": 0, "word": "cat", "domain": 5}]}, "domain"),
        ({"subjects": [{"id": 0, "word": "cat", "domain": -2}]}, "domain"),
        ({"frames": 5}, "an image with 5 frames"),
        ({"frames": 0}, "frames"),
        ({"size": (0, 5)}, "size"),
        ({"scores": {"q": float("nan")}}, "scores"),
        ({"fps": 0}, "fps"),
        ({"fps": 0.0001}, "fps"),
        ({"fps": 1e4}, "fps"),
        ({"colour": "red"}, "colour"),
        ({"references": [{"file": "../ref0.jpg", "subject": 0, "origin": "photo", "size": (1, 1)}]}, "reference file"),
        ({"references": [{"file": "ref0.jpg", "subject": 0, "origin": "drawn", "size": (1, 1)}]}, "origin"),
        ({"references": [Reference(file="ref0.jpg", subject=0, origin="photo", size=(1, 1))] * 2}, "each once"),
    ],
)
def test_a_wrong_description_is_refused_by_field(changes: dict[str, object], expected: str) -> None:
    data = json.loads(make_info().to_json()) | json.loads(
        json.dumps(changes, default=lambda model: model.model_dump(mode="json"))
    )
    with pytest.raises(DataError, match=expected) as caught:
        SampleInfo.from_json(json.dumps(data).encode(), "k0.json")
    assert "k0.json" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not a valid sample description"):
        SampleInfo.from_json(data)


def test_a_raw_sample_keeps_its_bytes() -> None:
    sample = RawSample("k0", make_info(), {"png": b"target", "ref0.jpg": b"r0", "ref1.png": b"r1"})
    again = RawSample.from_members("k0", sample.members())
    assert again == sample
    assert again.target == b"target" and again.target_extension == "png"
    assert next(iter(sample.members())) == "json"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"png": b"", "ref0.jpg": b""}, "missing reference"),
        ({"ref0.jpg": b"", "ref1.png": b""}, "target files"),
        ({"mp4": b"", "ref0.jpg": b"", "ref1.png": b""}, "target files"),
        ({"png": b"", "jpg": b"", "ref0.jpg": b"", "ref1.png": b""}, "target files"),
        ({"png": b"", "npy": b"", "ref0.jpg": b"", "ref1.png": b""}, "target files"),
    ],
)
def test_a_raw_sample_has_its_files_and_no_others(files: dict[str, bytes], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        RawSample("k0", make_info(), files)


def test_an_encoded_sample_round_trips_bit_for_bit_without_a_copy() -> None:
    sample = make_encoded()
    data = sample.to_bytes()
    again = EncodedSample.from_bytes("k0", sample.info, data)
    for name, array in sample.tensors().items():
        np.testing.assert_array_equal(again.tensors()[name], array)
    assert np.shares_memory(again.target, np.frombuffer(data, np.uint8))
    assert make_encoded().to_bytes() == data != make_encoded(seed=1).to_bytes()
    assert EncodedSample.from_members("k0", sample.members()).info == sample.info


def test_views_of_references_are_kept_under_their_numbers() -> None:
    plain = make_encoded()
    views = {1: plain.references[0] + np.uint16(1)}
    sample = EncodedSample(plain.key, plain.info, plain.target, plain.references, plain.text, views)
    loaded = safetensors.torch.load(sample.to_bytes())
    assert set(loaded) == {*safetensors.torch.load(plain.to_bytes()), "view.1"}
    np.testing.assert_array_equal(loaded["view.1"].view(torch.uint16).numpy(), views[1])
    again = EncodedSample.from_members("k0", sample.members())
    assert list(again.views) == [1]
    np.testing.assert_array_equal(again.views[1], views[1])
    with pytest.raises(DataError, match=r"views of references \[2\], but it has 2 references"):
        EncodedSample(plain.key, plain.info, plain.target, plain.references, plain.text, {2: views[1]})
    with pytest.raises(DataError, match="rank 3"):
        EncodedSample(plain.key, plain.info, plain.target, plain.references, plain.text, {0: plain.target})
    stranger = safetensors.torch.save({**loaded, "view.2": loaded["view.1"].clone()})
    with pytest.raises(DataError, match=r"tensors .*view\.2.*expected"):
        EncodedSample.from_bytes("k0", plain.info, stranger)


def test_the_safetensors_library_reads_what_we_write_and_we_read_what_it_writes() -> None:
    sample = make_encoded()
    tensors = safetensors.torch.load(sample.to_bytes())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    np.testing.assert_array_equal(tensors["target"].view(torch.uint16).numpy(), sample.target)
    again = EncodedSample.from_bytes("k0", sample.info, safetensors.torch.save(tensors, {"by": "test"}))
    np.testing.assert_array_equal(again.references[1], sample.references[1])
    # the loader's way, without a copy
    torch.testing.assert_close(torch.from_numpy(again.text.copy()).view(torch.bfloat16), tensors["text"])


def test_a_cut_or_corrupt_safetensors_is_refused_at_every_length() -> None:
    sample = make_encoded()
    data = sample.to_bytes()
    for length in (0, 4, 8, 20, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(DataError):
            EncodedSample.from_bytes("k0", sample.info, data[:length])


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"not json",
        b"[" * 20000,
        json.dumps({"target": {"dtype": "BF16", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"target": {"dtype": "BF16", "shape": [-2, -2], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"target": {"dtype": "BF16", "shape": [4], "data_offsets": [8, 0]}}).encode(),
        json.dumps({"target": {"dtype": "object", "shape": [4], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"target": {"shape": [4]}}).encode(),
        json.dumps({"target": {"dtype": "BF16", "shape": [1] * 70 + [4], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"target": {"dtype": "BF16", "shape": [10**23, 0], "data_offsets": [0, 0]}}).encode(),
        json.dumps({"target": {"dtype": "BF16", "shape": [4.0], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"target": {"dtype": "BF16", "shape": [True, 4], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"target": {"dtype": "BF16", "shape": "4", "data_offsets": [0, 8]}}).encode(),
        b'{"target": {"dtype": "BF16", "shape": [1e999], "data_offsets": [0, 8]}}',
        b'{"target": {"dtype": "BF16", "shape": [4], "data_offsets": [0, Infinity]}}',
        b'{"target": {"dtype": "BF16", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}',
    ],
)
def test_a_hostile_safetensors_header_is_refused(header: bytes) -> None:
    with pytest.raises(DataError):
        tensor_views(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(DataError, match="cut short"):
        tensor_views((10**10).to_bytes(8, "little") + header)


def test_wrong_shapes_dtypes_and_counts_are_refused() -> None:
    good = make_encoded()
    with pytest.raises(DataError, match="16 channels"):
        EncodedSample("k0", good.info, good.target[:15], good.references, good.text)
    with pytest.raises(DataError, match="rank 3"):
        EncodedSample("k0", good.info, good.target, [good.target, good.target], good.text)
    with pytest.raises(DataError, match="1 reference latents"):
        EncodedSample("k0", good.info, good.target, good.references[:1], good.text)
    with pytest.raises(DataError, match="float32"):
        EncodedSample("k0", good.info, good.target.astype(np.float32), good.references, good.text)
    floats = safetensors.torch.save({name: torch.zeros(array.shape) for name, array in good.tensors().items()})
    with pytest.raises(DataError, match="expected BF16"):
        EncodedSample.from_bytes("k0", good.info, floats)
    with pytest.raises(DataError, match=r"tensors .*expected"):
        EncodedSample.from_bytes("k0", good.info, safetensors.torch.save({"target": torch.zeros(1)}))
