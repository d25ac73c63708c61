"""A whole model from a checkpoint's shards and the frozen weights it names.

Run: python -m pytest tests/platform/generation/test_export.py (with a trained run: -m slow)
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from running import in_process, weights
from safetensors.torch import load_file, save_file

from domainshuttle.model.lora import LORA_FILE, LORA_FOLDER, LoraWeights
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import sample_id
from domainshuttle.pipelines.shards.tar import Member
from domainshuttle.platform.checkpoint.backend import describe
from domainshuttle.platform.checkpoint.resume import IncompatibleError, require_fit
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.engine.initialization import blueprint, build_model
from domainshuttle.platform.engine.trained_parameters import select_trained
from domainshuttle.platform.generation.export import _main_bucket, export_lora, export_run
from domainshuttle.platform.run.folder import Run, find_run
from domainshuttle.platform.run.weights_origin import WeightsOrigin

NAME = "stage2-step00000003"
FILE = Path("transformer") / "diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def run(tiny_yaml: Path, tmp_path: Path) -> Run:
    made = Run.open(load_config(str(tiny_yaml), [f"output={tmp_path / 'runs'}"]))
    stage1 = made.segment("stage1")
    build_model(made.config.model, WeightsOrigin(None, 3)).save_pretrained(stage1.weights)
    stage1.finish(4)
    return made


def test_a_stage_whose_corpora_are_mixed_by_their_counts_is_exported(tiny_yaml: Path, tmp_path: Path) -> None:
    run = Run.open(load_config(str(tiny_yaml), [f"output={tmp_path}", "stages.stage1.mixture=[clips, pictures]"]))
    stage1 = run.segment("stage1")
    build_model(run.config.model, WeightsOrigin(None, 3)).save_pretrained(stage1.weights)
    stage1.finish(4)
    export_run(run, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "generation.json").read_text())
    bucket = run.config.corpora["clips"].parsed_buckets[0]
    assert (settings["frames"], settings["height"], settings["width"]) == (bucket.frames, bucket.height, bucket.width)


def begun_with(run: Run) -> Tensors:
    return load_file(run.segment("stage1").weights / "diffusion_pytorch_model.safetensors")


def save(run: Run, kinds: tuple[str, ...] = ("master",), base: str | None = None) -> dict[str, Tensors]:
    """A checkpoint of stage2 of two ranks, written by hand; returns its values of each kind."""
    segment, store = run.segment("stage2"), CheckpointStore.of(run.config)
    outline = blueprint(run.config.model, WeightsOrigin(None, 0)).outline
    shapes = {n: tuple(outline.get_parameter(n).shape) for n in select_trained(outline, segment.stage.trained).trained}
    generator = torch.Generator().manual_seed(5)
    values = {kind: {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for kind in kinds}
    folder, files = store.place.local(NAME) / "zero", {}
    folder.mkdir(parents=True)
    header = {"layout": 1, "ranks": 2, "steps": 3, "kinds": sorted(kinds), "shapes": shapes}
    for rank in range(2):
        parts = {}
        for kind, tensors in values.items():
            for name, tensor in tensors.items():
                halves = torch.chunk(tensor.flatten(), 2)
                if rank < len(halves):
                    parts[f"{kind}/{name}"] = halves[rank].clone()
        path = folder / f"rank-{rank:05d}-of-00002.safetensors"
        save_file(parts, path, {"state": json.dumps(header)})
        files[f"zero/{path.name}"] = describe(path)
    identity = WeightsOrigin(segment.origin).identified(run.fingerprints).identity
    state = TrainingState(
        "stage2", 3, segment.seed, 2, run.config.digest(), {"seed": 1}, {}, {}, base or identity, origin=segment.origin
    )
    write_manifest(store.place, state, NAME, files)
    return values


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("kinds", [("master",), ("master", "ema")])
def test_what_is_trained_is_the_shards_and_the_rest_what_it_began_with(
    run: Run, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    values, before = save(run, kinds), begun_with(run)
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

    values = save(run)
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


def test_adapters_leave_merged_into_a_pipeline_and_alone(tmp_path: Path, tiny_yaml: Path) -> None:
    """Two stages of adapters, one after the other: alone they are one adapter on the weights below both."""
    lora = "{lora: {rank: 2, alpha: 3, targets: [attn1.to_*]}, parameters: [domain_embedding_ref*]}"
    stages = [f"stages.{name}.trained={lora}" for name in ("stage1", "stage2")]
    made = Run.open(load_config(str(tiny_yaml), [f"output={tmp_path / 'runs'}", *stages]))
    stage1 = made.segment("stage1")
    build_model(made.config.model, WeightsOrigin(None, 3)).save_pretrained(stage1.weights)
    width = made.config.model.size["num_attention_heads"] * made.config.model.size["attention_head_dim"]
    a, b = torch.randn(3, width), torch.randn(width, 3)
    LoraWeights({"blocks.0.attn1.to_q": (a, b)}).save(stage1.weights / LORA_FOLDER)
    stage1.finish(4)
    values, before = save(made)["master"], begun_with(made)
    in_process("export", made.folder, tmp_path / "whole", "--checkpoint", NAME)
    whole = load_file(tmp_path / "whole" / FILE)
    assert whole.keys() == before.keys()
    for name, value in whole.items():
        own = f"{name.removesuffix('.weight')}.lora_A.weight"
        if own in values and name.endswith(".weight"):
            added = 1.5 * values[own.replace("lora_A", "lora_B")] @ values[own]
            torch.testing.assert_close(value, before[name] + added)
        else:
            assert torch.equal(value, values.get(name, before[name])), name
    printed = in_process("export", made.folder, tmp_path / "alone", "--checkpoint", NAME, "--lora")
    told = " ".join(printed.split())
    assert "stage2, a LoRA of rank 5 of" in told and "what was trained beside it (domain_embedding_ref*)" in told
    alone = load_file(tmp_path / "alone" / LORA_FILE)
    key = "transformer.blocks.0.attn1.to_q.lora"
    trained = [values[f"blocks.0.attn1.to_q.lora_{kind}.weight"] for kind in "AB"]
    assert torch.equal(alone[f"{key}_A.weight"], torch.cat([a, trained[0]]))
    torch.testing.assert_close(alone[f"{key}_B.weight"], torch.cat([b, 1.5 * trained[1]], 1))
    assert torch.equal(
        load_file(tmp_path / "whole" / LORA_FOLDER / LORA_FILE)[f"{key}_A.weight"], alone[f"{key}_A.weight"]
    )
    with pytest.raises(ConfigError, match="is not empty"):
        export_lora(made, tmp_path / "alone", checkpoint=NAME)
    export_lora(made, tmp_path / "alone", checkpoint=NAME, overwrite=True)


def test_a_stage_without_adapters_has_none_to_export(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no adapters \(trained.lora\); no stage trains them"):
        export_lora(run, tmp_path / "alone", "stage1")
    save(run)
    with pytest.raises(ConfigError, match="stage stage2 does not train any"):
        export_lora(run, tmp_path / "alone", checkpoint=NAME)


def test_what_can_not_be_exported_is_said(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--checkpoint stage2-step00000009: .* There are: none"):
        export_run(run, tmp_path / "new", checkpoint="stage2-step00000009")
    save(run, base="of others")
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
