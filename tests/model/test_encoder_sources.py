"""What the files of an encoder are known by: everything that changes what it gives, and nothing else.

Run: python -m pytest tests/model/test_encoder_sources.py
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from domainshuttle.model.encoder_sources import encoder_files, files_digest
from domainshuttle.model.encoders import byte_umt5, load_text_encoder, load_video_encoder


def digests(folder: Path) -> tuple[str, str]:
    video, text = encoder_files(str(folder), "video"), encoder_files(str(folder), "text")
    return files_digest(video), files_digest(text)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A folder with a small VAE, a UMT5 and a tokenizer, as diffusers' pipelines have them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(tmp_path / "vae")
    byte_umt5()[0].save_pretrained(tmp_path / "text_encoder")
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "cat": 2, "dog": 3}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def identities(folder: Path) -> tuple[str, str]:
    return load_video_encoder(str(folder)).identity, load_text_encoder(str(folder), 16).identity


def test_what_changes_the_outcome_changes_digest_and_identity(pipeline: Path) -> None:
    before, named = digests(pipeline), identities(pipeline)
    assert digests(pipeline) == before and identities(pipeline) == named
    # statistics by which latents are normalised are no weights
    edit(pipeline / "vae" / "config.json", latents_mean=[0.5] * 16)
    after, renamed = digests(pipeline), identities(pipeline)
    assert after[0] != before[0] and after[1] == before[1]
    assert renamed[0] != named[0] and renamed[1] == named[1]
    # a vocabulary in which two words changed places
    words = pipeline / "tokenizer" / "tokenizer.json"
    text = json.loads(words.read_text())
    text["model"]["vocab"] |= {"cat": 3, "dog": 2}
    words.write_text(json.dumps(text))
    assert digests(pipeline)[1] != before[1] and identities(pipeline)[1] != named[1]
    # one value of one tensor
    weights = pipeline / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    middle = digests(pipeline)[1]
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})
    assert digests(pipeline)[1] != middle


def test_what_changes_nothing_changes_no_digest(pipeline: Path) -> None:
    before, named = digests(pipeline), identities(pipeline)
    edit(pipeline / "vae" / "config.json", _diffusers_version="9.9", _name_or_path="elsewhere")
    edit(pipeline / "text_encoder" / "config.json", transformers_version="9.9")
    (pipeline / "text_encoder" / "README.md").write_text("read me")
    weights = pipeline / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, weights.with_name("model-00001-of-00002.safetensors"))
    save_file({name: tensors[name] for name in names[5:]}, weights.with_name("model-00002-of-00002.safetensors"))
    weights.unlink()
    assert digests(pipeline) == before
    whole = {name: f"model-0000{1 + (number >= 5)}-of-00002.safetensors" for number, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": whole}
    weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    assert identities(pipeline) == named


def test_encoders_that_are_not_here_have_no_files(tmp_path: Path) -> None:
    assert encoder_files("block-dct", "video") == encoder_files("byte-umt5", "text") == []
    assert encoder_files(str(tmp_path / "none"), "video") == encoder_files("no-one/has-this", "text") == []
    assert encoder_files(str(tmp_path), "video") == []
