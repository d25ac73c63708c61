"""Ablations: .venv/bin/python -m pytest tests/platform/commands/test_ablation.py (with training: -m nightly)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from PIL import Image
from running import cli

from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.platform.commands.ablation import Plan, load_ablation, run_ablation, write_base
from domainshuttle.platform.commands.ablation_report import VariantResult, count_parameters, draw, read_result
from domainshuttle.platform.commands.ablation_steps import steps_of
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.engine.initialization import blueprint, build_model
from domainshuttle.platform.evaluation.statistics import estimate
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.weights_origin import WeightsOrigin


@pytest.fixture
def shipped(tmp_path: Path) -> Plan:
    return load_ablation("demo", [f"output={tmp_path}/runs", f"data={tmp_path}/data"])


def test_the_shipped_variants_differ_only_in_what_they_take_away(shipped: Plan) -> None:
    full = shipped.variants["full"].flattened()
    ablation = {"projections": "model.ablation.reference_projections", "adaln": "model.ablation.domain_adaln"}
    rope, weight = "model.ablation.reference_rope", "stages.stage2.loss.cross_pair_weight"
    expected = {
        "concatenation": {ablation["projections"]: "shared", ablation["adaln"]: False, rope: "frames", weight: 0.0},
        "own-qkv": {ablation["adaln"]: False, rope: "frames", weight: 0.0},
        "domain-mot": {rope: "frames", weight: 0.0},
        "dual-rope": {weight: 0.0},
        "full": {},
        "shared-qkv": {ablation["projections"]: "shared"},
        "no-domain-adaln": {ablation["adaln"]: False},
        "naive-rope": {rope: "frames"},
    }
    assert list(shipped.variants) == list(expected)
    for name, config in shipped.variants.items():
        changed = {key: value for key, value in config.flattened().items() if full.get(key) != value}
        changed.pop("name", None)
        # a variant without parameters of references can't name them among the trained ones
        trained = [changed.pop(key) for key in list(changed) if key.endswith(".trained")]
        assert all(not any("_ref" in pattern for pattern in patterns) for patterns in trained)
        assert bool(trained) == (name == "concatenation")
        assert changed == expected[name]
        assert (config.name, config.tracking.experiment) == (name, "ablation-demo")
        assert [stage.name for stage in config.stages] == ["stage1", "stage2"]
        assert config.model.base == str(shipped.base) and not config.model.size
    assert shipped.shared is not None
    assert [stage.name for stage in shipped.shared.stages] == ["base"] and shipped.shared.model.base is None


def test_every_variant_begins_with_the_same_network_and_trains_what_it_names(shipped: Plan) -> None:
    """The base is a Wan that diffusers reads; references begin as copies of its video branch, or have nothing."""
    assert shipped.shared is not None
    plain = build_model(shipped.shared.model, WeightsOrigin(None, 3))
    torch.nn.init.normal_(plain.proj_out.weight, std=0.1)
    plain.save_pretrained(shipped.folder / "trained")
    write_base(shipped.folder / "trained", shipped.base)
    assert not any("_ref" in name for name, _ in plain.named_parameters())
    latents, time, text = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 48, 64)
    nothing = torch.zeros(1, 0, 16, 8, 8), torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)
    with torch.no_grad():
        expected = WanTransformer3DModel.from_pretrained(shipped.base)(latents, time, text).sample
    counts = {}
    for name, config in shipped.variants.items():
        model = blueprint(config.model, WeightsOrigin(config.model.base)).build()
        assert model.config.text_len == 48
        with torch.no_grad():
            torch.testing.assert_close(model(latents, time, text, *nothing).sample, expected, rtol=1e-4, atol=1e-4)
        values = dict(model.named_parameters())
        for parameter in values:
            if parameter.endswith("to_q_ref.weight"):
                assert torch.equal(values[parameter], values[parameter.replace("_ref", "")])
        counts[name] = count_parameters(config)
    total = {name: parameters for name, (parameters, _) in counts.items()}
    assert total["concatenation"] == sum(p.numel() for p in plain.parameters()) < total["own-qkv"] < total["full"]
    assert total["full"] == total["domain-mot"] == total["dual-rope"] == total["naive-rope"]
    assert total["own-qkv"] == total["no-domain-adaln"] and total["shared-qkv"] < total["full"]
    assert all(0 < trained < parameters for parameters, trained in counts.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"variants": {"a": {"stages.stage1.stepps": 3}}}, r"(?s)variant 'a' of .*unknown key; did you mean 'steps'"),
        ({"variants": {}}, "variants"),
        ({"shared": {"stages": ["stage1"]}}, r"shared.stages=\['stage1'\] must be the first"),
        ({"variants": {"base": {}}}, "can't be called 'base'"),
        ({"config": "no-such"}, "no configuration 'no-such'"),
    ],
)
def test_a_mistake_in_the_file_is_named(content: dict[str, object], message: str, tmp_path: Path) -> None:
    good = {"name": "mine", "config": "demo", "shared": {"stages": ["base"]}, "variants": {"a": {}}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**good, **content}))
    with pytest.raises(ConfigError, match=message):
        load_ablation(str(path))
    with pytest.raises(ConfigError, match=r"no ablation 'dmo': .* one that ships: demo"):
        load_ablation("dmo")


@pytest.mark.parametrize("change", ["stages.base.steps=999", "seed=8"])
def test_figures_of_another_configuration_are_not_taken(change: str, tmp_path: Path) -> None:
    place = f"output={tmp_path}/runs"
    plan = load_ablation("demo", [place])
    assert plan.shared is not None
    Run.open(plan.shared)
    message = (
        rf"run 'base' of the ablation in {tmp_path} was begun with another configuration: .*{change.split('=')[1]}"
    )
    with pytest.raises(ConfigError, match=message):
        run_ablation("demo", [place, change], [])


def test_a_row_is_better_only_where_cases_and_every_seed_say_so() -> None:
    random = np.random.default_rng(0)
    before, noise = random.random(60), 0.05 * random.standard_normal((4, 60))
    old = {f"a-seed{n}": {"up": before, "one": before, "same": before} for n in (1, 2)}
    new = {
        "b-seed1": {"up": before + 0.1 + noise[0], "one": before + 0.3, "same": before + noise[2]},
        "b-seed2": {"up": before + 0.2 + noise[1], "one": before - 0.1, "same": before + noise[3]},
    }
    up, one, same = steps_of({"a": old, "b": new})
    assert (up.before, up.row, up.metric, up.verdict, up.text) == ("a", "b", "up", 1, "more")
    assert up.by_seed == pytest.approx([0.1, 0.2], abs=0.02)
    assert up.comparison.difference.mean == pytest.approx(np.mean(up.by_seed))
    assert one.comparison.verdict == 1 and one.verdict == 0 and one.text == "the seeds disagree"
    assert same.verdict == 0 and same.text == "no difference shown"
    # the seeds are averaged in a case: the interval is that of 60 differences, not of 120
    both = (noise[0] + noise[1]) / 2 + 0.15
    assert (up.comparison.difference.low, up.comparison.difference.high) == pytest.approx(
        (estimate(both).low, estimate(both).high)
    )
    assert up.comparison.difference.cases == 60
    turned = steps_of({"b": new, "a": old})[0]
    assert turned.verdict == -1 and turned.text == "less"
    unknown = {"c-seed1": {"up": np.full(60, np.nan)}, "c-seed2": {"up": before}}
    assert steps_of({"a": old, "c": unknown}) == []


def test_the_rows_have_two_seeds_and_a_base_of_several_shapes(tmp_path: Path) -> None:
    plan = load_ablation("rows", [f"output={tmp_path}/runs", f"data={tmp_path}/data"])
    assert list(plan.rows) == ["concatenation", "own-qkv", "domain-mot", "dual-rope", "full"]
    assert [run for runs in plan.rows.values() for run in runs] == list(plan.variants)
    for name, (first, second) in plan.rows.items():
        one, other = plan.variants[first], plan.variants[second]
        assert (first, second) == (f"{name}-seed{one.seed}", f"{name}-seed{other.seed}") and one.seed != other.seed
        changed = {key for key, value in one.flattened().items() if other.flattened()[key] != value}
        assert changed == {"name", "seed"}
    assert plan.shared is not None
    (base,) = plan.shared.stages
    buckets = [parse_bucket(text)
               for name in base.mixture for text in plan.shared.corpora[name].buckets]  # fmt: skip
    for config in (plan.shared, *plan.variants.values()):
        corpora = [corpus.build for corpus in config.corpora.values()]
        drawn = {(one.identities, one.held_out, one.seed) for one in corpora}  # type: ignore[union-attr]
        assert drawn == {(608, 128, 1)}
    # where DualRoPE puts references of the largest group, the base has looked: heights and widths of every position
    (variant,) = {bucket for name in plan.variants["full-seed1"].stages[-1].mixture
                  for bucket in plan.variants["full-seed1"].corpora[name].buckets}  # fmt: skip
    height, width = parse_bucket(variant).height, parse_bucket(variant).width
    assert len({(one.height, one.width) for one in buckets}) >= 4
    assert max(one.height for one in buckets) >= 3 * height and max(one.width for one in buckets) >= 3 * width


def test_the_picture_has_a_row_a_variant(tmp_path: Path) -> None:
    results = [VariantResult(f"v{n}", 32, 0.2 * n, 0.1, 0.0625, 1.0 / n, 1000, 500, 0.1) for n in (1, 2, 3)]
    assert results[1].error == pytest.approx((0.4 * 0.6 / 32) ** 0.5)
    few, many = (Image.open(draw(results[:n], tmp_path / f"{n}.png")).height for n in (1, 3))
    assert many > few


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_two_variants_are_trained_compared_and_not_trained_again(tiny_yaml: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(tiny_yaml.read_text())
    base = {**config["stages"][0], "name": "base", "references": 0}
    stages = [base, *({**stage, "steps": 4} for stage in config["stages"])]
    stages[1]["trained"] = ["patch_embedding*", "blocks.*.attn1.*"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**config, "stages": stages}))
    ablation = {
        "name": "two",
        "config": "tiny.yaml",
        "set": {
            "output": f"{tmp_path}/out/runs",
            "data": f"{tmp_path}/data",
            "stages.stage2.trained": ["patch_embedding*", "blocks.*.attn1.*"],
        },
        "shared": {"stages": ["base"]},
        "variants": {"full": {}, "shared-qkv": {"model.ablation.reference_projections": "shared"}},
    }
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(ablation))
    printed = cli("ablate", path, "--only", "full")
    assert "Left: shared-qkv" in printed
    printed = cli("ablate", path)
    assert "Variant full is done" in printed and "Left:" not in printed
    plan = load_ablation(str(path))
    results = {name: read_result(plan, name) for name in plan.variants}
    assert all(result is not None and result.clips == 8 and result.loss > 0 for result in results.values())
    assert all(Run(variant).segments()[-1].finished for variant in plan.variants.values())
    assert json.loads((plan.base / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    page = (plan.folder / "ablation.html").read_text()
    for needed in ("shared-qkv", "model.ablation.reference_projections", "Evaluation"):
        assert needed in page
    assert (plan.folder / "ablation.png").exists()
    # judged anew, and not trained anew
    attempts = {name: Ledger(Run(variant).ledger_path).summary().attempts for name, variant in plan.variants.items()}
    assert "Variant full is done" not in cli("ablate", path, "--set", "evaluation.groups=1")
    plan = load_ablation(str(path), ["evaluation.groups=1"])
    assert all(read_result(plan, name).clips == 4 for name in plan.variants)  # type: ignore[union-attr]
    for name, variant in plan.variants.items():
        assert Ledger(Run(variant).ledger_path).summary().attempts == attempts[name] > 0
