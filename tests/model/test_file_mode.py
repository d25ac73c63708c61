"""Whoever may read the JSON of a folder may read its weights: python -m pytest tests/model/test_file_mode.py"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from domainshuttle.model.encoders import load_text_encoder, load_video_encoder
from domainshuttle.model.file_mode import save_tensors, umask
from domainshuttle.model.generation import DomainShuttlePipeline
from domainshuttle.model.sampling import make_scheduler
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.model.weight_files import write_shards


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    try:
        yield request.param
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_umask_is_read_without_changing_it_for_other_threads(mask: int) -> None:
    seen, ended = set(), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.add(umask())

    thread = threading.Thread(target=watch)
    thread.start()
    assert {umask() for _ in range(200)} == {mask}
    ended.set()
    thread.join()
    assert seen == {mask}


def test_tensors_have_the_mode_of_any_other_file(mask: int, tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors", {"of": "us"})
    (tmp_path / "plain").write_text("x")
    assert mode(tmp_path / "a.safetensors") == mode(tmp_path / "plain") == 0o666 & ~mask
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(3))


def test_a_folder_that_can_not_be_written_is_an_error_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(OSError, match="plain"):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "plain" / "a.safetensors")


def test_all_files_of_a_pipeline_and_of_a_network_have_the_mode_of_the_json_beside_them(
    mask: int, tmp_path: Path, make_model: Callable[..., DomainShuttleTransformer3DModel]
) -> None:
    model, text = make_model(text_dim=64), load_text_encoder("byte-umt5", 16)
    codec = load_video_encoder("block-dct")
    pipeline = DomainShuttlePipeline(model, make_scheduler("euler", 3.0), codec, text.model, text.tokenizer)  # type: ignore[arg-type]
    kept = tmp_path / "whole" / "kept.safetensors"
    kept.parent.mkdir()
    kept.write_bytes(b"a secret of another day")
    kept.chmod(0o600)
    os.utime(kept, (1_000_000_000, 1_000_000_000))
    pipeline.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "network", max_shard_size="20KB")
    codec.save_pretrained(tmp_path / "codec")
    written = [path for path in tmp_path.rglob("*.safetensors") if path != kept]
    assert len(written) > 5
    assert {mode(path) for path in [*written, *tmp_path.rglob("*.json")]} == {0o666 & ~mask}
    assert mode(kept) == 0o600
    assert len(DomainShuttleTransformer3DModel.from_pretrained(tmp_path / "network").state_dict()) > 10


def test_the_bytes_of_written_weights_are_those_of_every_version(tmp_path: Path) -> None:
    """Digests of weights cover a file's header too: with another space, a stage that is exported again would be refused
    by the checkpoints that began with it."""
    tensors = {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    order = [(name, tuple(one.shape), one.dtype) for name, one in tensors.items()]
    (path,) = write_shards(tmp_path, order, tensors.__getitem__, 1 << 20)
    header = (
        b'{"__metadata__": {"format": "pt"}, "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, '
        b'"a": {"dtype": "BF16", "shape": [3], "data_offsets": [24, 30]}}'
    )
    header += b" " * (-len(header) % 8)
    data = tensors["b"].numpy().tobytes() + tensors["a"].view(torch.int16).numpy().tobytes()
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + data
