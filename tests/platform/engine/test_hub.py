"""Where weights come from: folders and ids of the hub, and the shipped recipes, which begin with Wan's.

The hub is read as on a machine without a network: from its cache, laid out here as huggingface_hub lays it out.

Run: python -m pytest tests/platform/engine/test_hub.py
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from domainshuttle.model.spec import ModelSpec
from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.platform.commands.plan import print_plan
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, ModelSection, RunConfig
from domainshuttle.platform.console import console
from domainshuttle.platform.engine.deepspeed_config import deepspeed_configs
from domainshuttle.platform.engine.hub import resolve, resolve_all, weights_folder
from domainshuttle.platform.engine.initialization import blueprint, build_model
from domainshuttle.platform.engine.model_size import model_size
from domainshuttle.platform.engine.trained_parameters import trained_of
from domainshuttle.platform.generation.networks import networks_beside
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.weights_digest import ChangedError, Fingerprints
from domainshuttle.platform.run.weights_origin import WeightsOrigin

SIZE: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 48, "text_dim": 16, "freq_dim": 8,
}  # fmt: skip
WAN: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40,
    "ffn_dim": 13824, "text_dim": 4096, "freq_dim": 256, "in_channels": 16, "out_channels": 16,
    "patch_size": [1, 2, 2], "cross_attn_norm": True, "eps": 1e-6, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
OLD, NEW = "1" * 40, "2" * 40


class Hub:
    """The hub's cache: repositories, their commits, and what their branches are at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commit(self, repository: str, commit: str, branch: str = "main") -> Path:
        """The folder of a commit's files, which the branch is at from now on."""
        cached = self.folder / f"models--{repository.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True, exist_ok=True)
        (cached / "refs" / branch).write_text(commit)
        (files := cached / "snapshots" / commit).mkdir(parents=True)
        return files


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield Hub(tmp_path / "hub")


def wan(folder: Path, seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**SIZE)
    model.save_pretrained(folder)
    return model


def same(section: ModelSection, origin: str, model: WanTransformer3DModel, commit: str | None = None) -> bool:
    found = dict(
        blueprint(section, WeightsOrigin(origin, commit=commit) if commit else resolve(origin))
        .build()
        .named_parameters()
    )
    return all(found[name].equal(parameter) for name, parameter in model.named_parameters())


def identity_of(origin: str) -> str:
    return resolve(origin).identified(Fingerprints()).identity


def test_one_expert_of_a_repository_is_named_by_its_folder(hub: Hub) -> None:
    files = hub.commit("maker/moe", OLD)
    experts = {name: wan(files / name, seed) for seed, name in enumerate(("transformer", "transformer_2"))}
    for name, model in experts.items():
        origin = f"maker/moe/{name}"
        assert weights_folder(resolve(origin)) == files / name
        assert same(ModelSection(base=origin), origin, model)
    with pytest.raises(ConfigError, match="two experts: name one of maker/moe/transformer and maker/moe/transformer_2"):
        build_model(ModelSection(base="maker/moe"), resolve("maker/moe"))


def test_the_other_expert_is_loaded_at_the_runs_commit(hub: Hub, tmp_path: Path) -> None:
    """Samples of one expert generate with the other as it began, though the branch has moved since."""
    before = wan(hub.commit("maker/moe", OLD) / "transformer_2", 1)
    wan(hub.folder / "models--maker--moe" / "snapshots" / OLD / "transformer", 3)
    experts = "experts=[{name: high, base: maker/moe/transformer, low: 0.5}, "
    experts += "{name: low, base: maker/moe/transformer_2, high: 0.5}]"
    config = load_config("demo", [f"output={tmp_path}/runs", "model={}", experts, "engine.precision=float32"])
    run = Run.open(config)
    origins = resolve_all(run)
    assert {name: origin.commit for name, origin in origins.items() if origin.kind == "hub"} == {
        "base-high": OLD,
        "base-low": OLD,
    }
    assert origins["stage1-low"].kind == "folder"
    after = wan(hub.commit("maker/moe", NEW) / "transformer_2", 2)
    wan(hub.folder / "models--maker--moe" / "snapshots" / NEW / "transformer", 4)
    high = run.segment("base-high")

    def loaded(origins: dict[str, WeightsOrigin]) -> dict[str, torch.Tensor]:
        _, other = networks_beside(run, high, tmp_path / "snapshot", origins).folders
        return load_file(other / "diffusion_pytorch_model.safetensors")

    found = loaded(origins)
    assert all(found[name].equal(parameter) for name, parameter in before.named_parameters())
    # and anew where a later start of the driver begins with another commit
    found = loaded(resolve_all(run))
    assert all(found[name].equal(parameter) for name, parameter in after.named_parameters())


def test_files_of_the_hub_that_were_damaged_in_its_cache_are_refused(hub: Hub) -> None:
    """As huggingface_hub keeps them: links to files that are called by their SHA-256."""
    files = hub.commit("maker/wan", OLD) / "transformer"
    wan(files, 1)
    weights = files / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    stored = hub.folder / "models--maker--wan" / "blobs" / hashlib.sha256(content).hexdigest()
    stored.parent.mkdir()
    weights.rename(stored)
    weights.symlink_to(stored)
    section = ModelSection(base="maker/wan")
    first = build_model(section, resolve("maker/wan"))
    stored.write_bytes(content[:-64] + bytes(64))
    with pytest.raises(ChangedError, match=rf"is not the file that the hub gave.*Remove {stored}"):
        build_model(section, resolve("maker/wan"))
    stored.write_bytes(content)
    again = build_model(section, resolve("maker/wan"))
    assert all(one.equal(other) for one, other in zip(first.parameters(), again.parameters(), strict=True))


def test_a_run_keeps_its_commit_when_the_branch_moves(hub: Hub) -> None:
    before = wan(hub.commit("maker/wan", OLD) / "transformer", 1)
    section, origin = ModelSection(base="maker/wan"), "maker/wan"
    commit, identity = resolve(origin).commit, identity_of(origin)
    assert (commit, identity) == (OLD, f"hub:maker/wan@{OLD}")
    after = wan(hub.commit("maker/wan", NEW) / "transformer", 2)
    assert same(section, origin, before, commit) and same(section, origin, after)
    assert identity_of(origin) != identity  # so that a checkpoint refuses it
    pinned = f"maker/wan@{OLD}"
    assert same(ModelSection(base=pinned), pinned, before)
    assert identity_of(pinned) == identity
    hub.commit("maker/wan", "3" * 40, branch="trial")
    assert resolve("maker/wan@trial").commit == "3" * 40


def test_a_configuration_is_checked_by_the_description_alone(hub: Hub) -> None:
    folder = hub.commit("maker/wan", OLD) / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WAN))
    size = model_size(ModelSection(base="maker/wan"))
    with torch.device("meta"):
        network = DomainShuttleTransformer3DModel(**size.transformer_config())
    shapes = {name: tuple(one.shape) for name, one in network.named_parameters()}
    assert size.parameter_shapes() == shapes == ModelSpec.preset("wan2.1-t2v-14b").parameter_shapes()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        blueprint(ModelSection(base="maker/wan"), resolve("maker/wan"))


@pytest.mark.parametrize("origin", ["./no/folder", "/weights/wan", "wan", "maker/wan@", "nobody/nothing", "a/b/../c"])
def test_an_origin_that_is_nowhere_is_one_clear_error(origin: str, hub: Hub) -> None:
    for ask in (resolve, lambda base: model_size(ModelSection(base=base))):
        with pytest.raises(ConfigError, match="is no folder, and"):
            ask(origin)


@pytest.fixture
def recipe(request: pytest.FixtureRequest, hub: Hub) -> RunConfig:
    """A shipped configuration, whose base is on the hub with its real size and no weights."""
    config = load_config(request.param)
    for base in {config.model.base, *(expert.base for expert in config.experts)} - {None}:
        owner, name, *folder = str(base).split("/")
        cached = hub.folder / f"models--{owner}--{name}" / "snapshots" / OLD
        files = cached if cached.exists() else hub.commit(f"{owner}/{name}", OLD)
        place = files.joinpath(*folder or ["transformer"])
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(WAN))
    return config


@pytest.mark.parametrize(
    ("recipe", "experts"), [("wan2.1-t2v-14b", [""]), ("wan2.2-t2v-a14b", ["-high", "-low"])], indirect=["recipe"]
)
def test_the_shipped_recipes_are_the_papers(
    recipe: RunConfig, experts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, steps, batches, learning rate, what is trained, losses, and the experts' ranges."""
    spec = ModelSpec.preset("wan2.1-t2v-14b")
    segments = Run(recipe).segments()
    assert [segment.name for segment in segments] == [f"stage{n}{expert}" for n in (1, 2) for expert in experts]
    for segment in segments:
        stage, first = segment.stage, segment.name.startswith("stage1")
        assert (stage.steps, stage.global_batch) == ((2000, 96) if first else (12000, 64))
        assert stage.learning_rate == 1e-5 and stage.references == 5
        assert stage.loss.cross_pair_weight == (0 if first else 0.1)
        assert len(stage.mixture) == (4 if first else 3) and not stage.weights
        frames = {bucket.frames for name in stage.mixture for bucket in recipe.corpora[name].parsed_buckets}
        assert frames == ({1} if first else {49, 81})
        selected = trained_of(model_size(recipe.model_of(segment.expert)), stage.trained)
        assert selected.trained_count == spec.parameters(stage.trained)
        assert selected.trained_count + selected.frozen_count == spec.parameters()
        parts = {name: name in selected.trained for name in (*selected.trained, *selected.frozen)}
        for name, trained in parts.items():
            if "_ref" in name or ".attn1." in name:
                assert trained, name
            elif name.startswith("patch_embedding"):
                assert trained == first, name
            else:
                assert not trained, name
        low, high = {"": (0.0, 1.0), "-high": (0.875, 1.0), "-low": (0.0, 0.875)}[segment.name[6:]]
        assert (segment.flow.low, segment.flow.high) == (low, high)
    assert set(deepspeed_configs(recipe)) == {"stage1", "stage2"}
    monkeypatch.setattr(console, "width", 200)
    print_plan(recipe)
    printed = capsys.readouterr().out
    trained = {f"{spec.parameters(segment.stage.trained) / 1e6:.2f} M" for segment in segments}
    assert all(text in printed for text in {*trained, *(segment.name for segment in segments)})
    assert "domainshuttle data index" in printed and "data build" not in printed  # they are the user's own shards
