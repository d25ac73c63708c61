"""A whole model from a checkpoint's shards and the frozen weights it names.

Run: python -m pytest tests/platform/generation/test_export.py (with a trained run: -m slow)
"""

import json
import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from running import in_process, weights
from safetensors.torch import load_file
from written_checkpoint import NAME, Tensors, begun_with, save_checkpoint

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import sample_id
from domainshuttle.pipelines.shards.tar import Member
from domainshuttle.platform.checkpoint.resume import IncompatibleError, require_fit
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.engine.initialization import build_model
from domainshuttle.platform.generation import export as export_module
from domainshuttle.platform.generation.export import _main_bucket, export_run
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.weights_origin import WeightsOrigin

FILE = Path("transformer") / "diffusion_pytorch_model.safetensors"


def test_a_stage_whose_corpora_are_mixed_by_their_counts_is_exported(tiny_yaml: Path, tmp_path: Path) -> None:
    own = [f"data={tmp_path}/none", f"output={tmp_path}"]  # others may have made the corpora of the tiny file
    run = Run.open(load_config(str(tiny_yaml), [*own, "stages.stage1.mixture=[clips, pictures]"]))
    stage1 = run.segment("stage1")
    build_model(run.config.model, WeightsOrigin(None, 3)).save_pretrained(stage1.weights)
    stage1.finish(4)
    export_run(run, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "generation.json").read_text())
    bucket = run.config.corpora["clips"].parsed_buckets[0]
    assert (settings["frames"], settings["height"], settings["width"]) == (bucket.frames, bucket.height, bucket.width)


def test_a_store_that_does_not_answer_keeps_no_export(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corpora give the default size of clips alone: where nobody is, the largest bucket is taken, with a word."""
    monkeypatch.setattr(export_module, "CORPORA_SECONDS", 0.5)
    nobody = "s3://key:secret@bucket/data?region=us-east-1&endpoint_override=http://127.0.0.1:9"
    object.__setattr__(run.config, "data", nobody)
    began = time.monotonic()
    assert _main_bucket(run.config, run.segment("stage1")) == run.config.corpora["pictures"].parsed_buckets[0]
    assert time.monotonic() - began < 5
    printed = " ".join(capsys.readouterr().out.split())
    assert "The corpora of stage stage1 can't be read, so clips are made in its largest bucket, 1x32x32" in printed
    assert "s3://bucket/data" in printed and "secret" not in printed


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("kinds", [("master",), ("master", "ema")])
def test_what_is_trained_is_the_shards_and_the_rest_what_it_began_with(
    run: Run, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    values, before = save_checkpoint(run, kinds), begun_with(run)
    taken = values[kinds[-1]]  # the moving average where one is kept
    assert 0 < len(taken) < len(before)
    assert export_run(run, tmp_path / "half-way", checkpoint=NAME) == NAME
    same(load_file(tmp_path / "half-way" / FILE), before | taken)
    export_run(run, tmp_path / "masters", checkpoint=NAME, averaged=False)
    same(load_file(tmp_path / "masters" / FILE), before | values["master"])
    assert not list(tmp_path.glob(".*"))  # nothing of the work is left
    # and of a run that was moved the frozen weights are those beside it
    moved = run.folder.rename(tmp_path / "moved")
    export_run(find_run(moved), tmp_path / "again", checkpoint=str(moved / "checkpoints" / NAME))
    same(load_file(tmp_path / "again" / FILE), before | taken)


def test_a_new_run_can_begin_with_it_as_the_error_advises(run: Run, tmp_path: Path, tiny_yaml: Path) -> None:
    class OtherOrder:
        """As a feed whose data order is another."""

        def plan(self) -> "OtherOrder":
            return self

        def check(self, _: object) -> None:
            raise DataError("the data order is not the one this run began with: restore what changed")

    values = save_checkpoint(run)
    segment, checkpoint = run.segment("stage2"), CheckpointStore.of(run.config).read(NAME)
    origin = WeightsOrigin(segment.origin).identified(run.fingerprints)
    with pytest.raises(IncompatibleError) as raised:
        require_fit(checkpoint, segment, origin, None, OtherOrder())  # type: ignore[arg-type]
    command, overrides = re.findall(
        r"domainshuttle (export .*?), and instead of --resume (.*?) and a name", str(raised.value)
    )[0]
    folder = tmp_path / "exported"
    printed = in_process(*shlex.split(command.replace("FOLDER", str(folder))))
    assert f"Exported {NAME}" in printed
    given = [text for text in shlex.split(overrides.replace("FOLDER", str(folder))) if text != "--set"]
    config = load_config(str(tiny_yaml), ["name=from-it", *given])
    model = build_model(config.model, WeightsOrigin(config.model.base))
    same(dict(model.state_dict()), begun_with(run) | values["master"])


def test_the_settings_are_those_of_the_bucket_of_most_steps(tiny_yaml: Path, tmp_path: Path) -> None:
    config = load_config(
        str(tiny_yaml),
        [f"data={tmp_path}/data", f"output={tmp_path}/runs", "stages.1.mixture=[pictures, clips]",
         "corpora.pictures.buckets=[1x64x64, 1x32x32]", "corpora.clips.buckets=[9x32x32, 5x32x32]",
         "stages.1.global_batch=2", "stages.1.micro_batch=1"],
    )  # fmt: skip
    segment = Run(config).segment("stage2")
    # the corpora are not here: the largest; where they are, what most samples are of
    assert str(_main_bucket(config, segment)) == "9x32x32"
    for name, rows in {"pictures": {"1x64x64": 3, "1x32x32": 2}, "clips": {"9x32x32": 2, "5x32x32": 7}}.items():
        place = Path(config.corpus(name).folder)
        place.mkdir(parents=True)
        found = [
            IndexRow(
                source=name, shard="a.tar", key=f"{bucket}-{number}", sample_id=sample_id(name, f"{bucket}-{number}"),
                members=(Member("json", 0, 1),), kind="video", frames=9, height=64, width=64, fps=8.0, bucket=bucket,
                subjects=(), domains=(), reference_subjects=(), reference_origins=(), caption_length=1, scores={},
                checksum=1, text_tokens=1,
            )
            for bucket, count in rows.items() for number in range(count)
        ]  # fmt: skip
        write_index(place / "index.parquet", found, IndexMetadata(corpus=name, stage="encoded"))
    assert str(_main_bucket(config, segment)) == "5x32x32"


def test_what_can_not_be_exported_is_said(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--checkpoint stage2-step00000009: .* There are: none"):
        export_run(run, tmp_path / "new", checkpoint="stage2-step00000009")
    save_checkpoint(run, base="of others")
    with pytest.raises(ConfigError, match="comes from the weights of others"):
        export_run(run, tmp_path / "new", checkpoint=NAME)
    with pytest.raises(ConfigError, match="--stage and --checkpoint"):
        export_run(run, tmp_path / "new", "stage1", checkpoint=NAME)
    shard = next((run.checkpoints / NAME / "zero").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        export_run(run, tmp_path / "new", checkpoint=NAME)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_last_checkpoint_of_a_stage_is_what_the_stage_exported(
    unbroken: tuple[RunConfig, str], tmp_path: Path
) -> None:
    config, _ = unbroken
    newest = CheckpointStore.of(config).newest("stage2")
    assert newest is not None
    in_process("export", config.run_folder, tmp_path / "last", "--checkpoint", newest.name)
    found, expected = load_file(tmp_path / "last" / FILE), weights(config, "stage2")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], atol=0, rtol=2**-8, err_msg=name)
