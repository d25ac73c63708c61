"""Values that can't be trained with are refused with their key, and what is typed is read as it is meant.

Run: python -m pytest tests/platform/config/test_values.py
"""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from running import in_process

from domainshuttle.platform.config.loading import load_config, read_config, read_mapping
from domainshuttle.platform.config.schema import ConfigError, ModelSection, RunConfig
from domainshuttle.platform.driver.preflight import require_model

FULL = """
name: full
seed: 1
data: /data
output: /runs
model:
  size: {patch_size: [1, 2, 2], num_attention_heads: 4, attention_head_dim: 32, in_channels: 16, out_channels: 16,
         text_dim: 64, freq_dim: 64, ffn_dim: 384, num_layers: 4, cross_attn_norm: true, eps: 1e-6, max_references: 5,
         num_domains: 5, text_len: 48, boundary: 0.5}
encoders: {text_len: 48, tile_above: 600000, live: {actors: 1, cpus: 1, gpus: 0}}
corpora:
  clips:
    build: {builder: sprites, kind: video, samples: 8, identities: 72, held_out: 8, seed: 1, side: 96, frames: 9,
            fps: 8, references_per_subject: 3, two_subjects: 0.2, cross_domain: 0.2}
    buckets: [5x64x64, 9x64x64]
    fps: 8
  pairs:
    build: {builder: uno, folder: /pairs, samples: 8, seed: 1, least_score: 3.5}
    buckets: [1x64x64]
  masks:
    build: {builder: opens2v, folder: /masks, samples: 8, seed: 1, least_aesthetic: 4, least_area: 0.03,
            most_overlap: 0.8, most_subjects: 6, least_text_similarity: 0.6, least_image_similarity: 0.6,
            most_image_similarity: 0.9}
    buckets: [9x64x64]
  people: {build: {builder: nano-consistent, folder: /x, other_outputs: 2}, buckets: [1x64x64]}
  boxes: {build: {builder: phantom-data, folder: /x, most_cut: 0.3, least_score: 0.5}, buckets: [9x64x64]}
  edits:
    build: {builder: ditto, folder: /x, source_frames: 2}
    buckets: [9x64x64]
    pair:
      {models: {detector: /d, segmenter: /s, dino: /v, clip: /c}, frames: 4, other_clips: 4,
       pictures: 3, least_pictures: 1, least_detection: 0.3, most_found: 6,
       same_overlap: 0.8, least_mask: 0.8, least_area: 0.01, most_area: 0.9, least_side: 64, least_dino: 0.45,
       most_dino: 0.97, least_clip: 0.7, least_quality: 3,
       quality: {url: "http://x/v1", model: m, at_once: 4, requests_per_minute: 60, tokens_per_minute: 1000,
                 most_cost: 5, price_in: 1, price_out: 2, answers: 3, answer_tokens: 100, temperature: 0.5, seed: 1,
                 timeout: 10, patience: 20}}
labels:
  labeller: endpoint
  endpoint: {url: "http://node:8000/v1", model: m, at_once: 2, requests_per_minute: 60, tokens_per_minute: 6000,
             most_cost: 5, price_in: 1, price_out: 2, answers: 2, answer_tokens: 64, temperature: 0.5, seed: 1,
             timeout: 5, patience: 60}
  actors: {actors: 1, cpus: 1, gpus: 1}
  readers: {actors: 2, cpus: 1, gpus: 0}
  frames: 2
  side: 256
  least_score: 2
  answer_tokens: 64
  most_failed: 0.5
experts: [{name: high, low: 0.5, high: 1}, {name: low, low: 0, high: 0.6}]
stages:
  - {name: one, mixture: {clips: 1}, steps: 2, gpu_hours: 3, global_batch: 8, micro_batch: 2, learning_rate: 1e-4,
     final_learning_rate: 1e-5, warmup_steps: 1, betas: [0.9, 0.99], weight_decay: 0.1, gradient_clipping: 1,
     trained: ["*"], references: 2, reference_dropout: 0.1, text_dropout: 0.1,
     flow: {shift: 3, low: 0, high: 1}, loss: {cross_pair_weight: 0.1}}
  - {name: two, mixture: {clips: 1}, samples: 16, global_batch: 8, micro_batch: 2,
     trained: {lora: {rank: 2, alpha: 4, targets: [to_q]}}}
budget_gpu_hours: 5
loader: {most_bad: 0.1, read_ahead: 1000, threads: 2}
guard: {spike_factor: 5, window: 3, rollback_after: 2, most_rollbacks: 2, hang_seconds: 1000}
cluster: {workers: [1, 2], resize_seconds: 5, cpus_per_worker: 1, gpus_per_worker: 1, max_failures: 2,
          encoding: {actors: 1, cpus: 1, gpus: 1}, dashboard_port: 8265}
engine: {persistent_parameters: 5, ema: 0.9, sequence_parallel: 1, activations: {mode: every, every: 2}}
checkpoint: {every: 2, keep: 2, keep_every: 4, keep_best: 1, timeout: 60, max_failed: 2}
tracking: {every: 1, hooks: [{command: [page], timeout: 5, retries: 2}]}
generation: {steps: 4, guidance: 2, shift: 3, fps: 8}
evaluation: {corpus: clips, candidates: 2, groups: 2}
sampling: {every: 2, cases: 2, cpus: 1, gpus: 1, timeout: 60}
"""
MAY_BE_ZERO = {
    "seed", "model.size.boundary", "model.size.max_references", "encoders.live.cpus", "encoders.live.gpus",
    "corpora.clips.build.held_out", "corpora.clips.build.seed", "corpora.clips.build.two_subjects",
    "corpora.clips.build.cross_domain", "corpora.pairs.build.seed", "corpora.pairs.build.least_score",
    "corpora.people.build.other_outputs", "corpora.boxes.build.most_cut", "corpora.boxes.build.least_score",
    "corpora.masks.build.seed", "corpora.masks.build.least_aesthetic", "corpora.masks.build.least_area",
    "corpora.masks.build.most_overlap", "corpora.masks.build.least_text_similarity",
    "corpora.masks.build.least_image_similarity", "corpora.masks.build.most_image_similarity",
    "labels.endpoint.price_in", "labels.endpoint.price_out", "labels.endpoint.temperature", "labels.endpoint.seed",
    "labels.actors.cpus", "labels.actors.gpus", "labels.readers.cpus", "labels.readers.gpus", "labels.most_failed",
    "experts.0.low", "experts.1.low", "stages.0.warmup_steps", "stages.0.betas.0",
    "stages.0.betas.1", "stages.0.weight_decay", "stages.0.references", "stages.0.reference_dropout",
    "stages.0.text_dropout", "stages.0.flow.low", "stages.0.loss.cross_pair_weight", "loader.most_bad",
    "loader.read_ahead", "guard.most_rollbacks", "cluster.resize_seconds", "cluster.gpus_per_worker",
    "cluster.max_failures", "cluster.encoding.cpus", "cluster.encoding.gpus", "engine.persistent_parameters",
    "checkpoint.keep_best", "sampling.gpus", "tracking.hooks.0.retries",
    "corpora.edits.build.source_frames",
    "corpora.edits.pair.least_area", "corpora.edits.pair.least_clip", "corpora.edits.pair.least_detection",
    "corpora.edits.pair.least_dino", "corpora.edits.pair.least_mask", "corpora.edits.pair.least_quality",
    "corpora.edits.pair.most_area", "corpora.edits.pair.most_dino", "corpora.edits.pair.other_clips",
    "corpora.edits.pair.same_overlap", "corpora.edits.pair.quality.price_in", "corpora.edits.pair.quality.price_out",
    "corpora.edits.pair.quality.seed", "corpora.edits.pair.quality.temperature",
}  # fmt: skip
"""Of every number, those for which nothing is a sensible amount."""
NO_NUMBER = ("x", "true", "yes", "[1]", "{a: 1}", "12:30", "1,5", "2026-01-01", "5%", "0x", "1e", "--1", "010", "-07")


_FULL = read_mapping(FULL, "full.yaml")


def full() -> dict[str, Any]:
    return copy.deepcopy(_FULL)


def numbers(typed: Any, content: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where a configuration has numbers that were typed."""
    if isinstance(typed, dict | list):
        for key in typed if isinstance(typed, dict) else range(len(typed)):
            yield from numbers(typed[key], content[key], (*path, key))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield path


NUMBERS = sorted(numbers(full(), RunConfig.model_validate(full()).model_dump()), key=str)


def faults(path: tuple[str | int, ...], value: Any) -> list[str]:
    """The keys at fault when one value of the full configuration is another."""
    content = target = full()
    for part in path[:-1]:
        target = target[part]  # type: ignore[index]
    target[path[-1]] = value  # type: ignore[index]
    try:
        RunConfig.model_validate(content)
    except ValidationError as error:
        return [".".join(str(one) for one in e["loc"] if not str(one).startswith("<")) for e in error.errors()]
    return []


def test_the_full_configuration_has_every_number_there_is() -> None:
    """So that the tests below walk all of them."""
    schema = RunConfig.model_json_schema()
    declared = {(section, field) for section, content in {**schema["$defs"], "RunConfig": schema}.items()
                for field, one in content.get("properties", {}).items() if "number" in json.dumps(one)
                or '"integer"' in json.dumps(one)}  # fmt: skip
    walked = {next(str(part) for part in reversed(path) if not isinstance(part, int)) for path in NUMBERS}
    assert {field for _, field in declared} - {"mixture"} == walked - {"clips"}
    assert len(NUMBERS) > 75


def test_every_number_has_a_least_and_a_most() -> None:
    def leaves(content: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(content, dict):
            if content.get("type") in ("number", "integer"):
                yield name, content
            for key, inner in content.items():
                yield from leaves(inner, f"{name}.{key}")
        elif isinstance(content, list):
            for number, inner in enumerate(content):
                yield from leaves(inner, f"{name}.{number}")

    found = list(leaves(RunConfig.model_json_schema(), ""))
    assert len(found) > 70
    for name, one in found:
        assert {"ge", "gt", "minimum", "exclusiveMinimum"} & one.keys(), f"{name} has no least value: {one}"
        assert {"le", "lt", "maximum", "exclusiveMaximum"} & one.keys(), f"{name} has no most: {one}"


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: ".".join(map(str, path)))
def test_what_is_no_amount_is_refused_with_its_key(path: tuple[str | int, ...]) -> None:
    name = ".".join(map(str, path))
    bad: list[Any] = [
        ".inf",
        "-.inf",
        ".nan",
        "inf",
        "nan",
        "Infinity",
        math.inf,
        -math.inf,
        math.nan,
        "-1",
        -1,
        "-0.5",
    ]
    bad += ["1e300", 10**30, "1" + "0" * 30, "1e999999999", "9" * 5000, 1e300, True, *NO_NUMBER]
    if name not in MAY_BE_ZERO:
        bad += ["0", 0, 0.0, "-0"]
    for value in bad:
        value = read_mapping(f"value: {value}", "")["value"] if isinstance(value, str) and value[0] in "[{" else value
        assert any(fault == name or fault.startswith(f"{name}.") for fault in faults(path, value)), f"{name}={value!r}"
    if name in MAY_BE_ZERO:
        assert name not in faults(path, "0")


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: ".".join(map(str, path)))
def test_a_number_without_a_value_is_its_default_or_refused(path: tuple[str | int, ...]) -> None:
    """Where nothing is a choice of its own, as for a limit, it is that choice."""
    optional = {"steps", "gpu_hours", "final_learning_rate", "samples", "budget_gpu_hours", "spike_factor",
                "dashboard_port", "ema", "keep_every", "boundary", "fps", "tile_above", "alpha"}  # fmt: skip
    limits = [f"{asked}.{one}" for asked in ("corpora.edits.pair.quality", "labels.endpoint") for one in
              ("most_cost", "requests_per_minute", "tokens_per_minute")]  # fmt: skip
    optional_sections = ("cluster.encoding.actors", "cluster.encoding.gpus", *limits)
    name = ".".join(map(str, path))
    may = str(path[-1]) in optional and name not in (
        "corpora.clips.build.fps", "corpora.clips.build.samples", "generation.fps", "generation.steps",
        "stages.1.samples",
    )  # fmt: skip
    if may or name in optional_sections:
        assert name not in faults(path, None)
    else:
        assert faults(path, None), name


@given(st.floats(1e-12, 1e3), st.integers(0, 1 << 53))
@settings(max_examples=60, deadline=None)
def test_a_number_is_read_however_it_is_written(real: float, whole: int) -> None:
    for text in (repr(real), f"{real:.17e}", f"{real:.17E}", f"+{real!r}", json.dumps(real)):
        content = full()
        content["stages"][0] |= {"learning_rate": text, "final_learning_rate": None, "weight_decay": "0"}
        assert RunConfig.model_validate(content).stages[0].learning_rate == float(text) == real
    for text in (str(whole), f"{whole:_}", hex(whole), oct(whole), f"+{whole}", f"{whole}.0"):
        assert RunConfig.model_validate(full() | {"seed": text}).seed == whole


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("name: 2026", "name", "2026"),
        ("name: on", "name", "on"),
        ("name: No", "name", "No"),
        ("name: 1.10", "name", "1.10"),
        ("name: 1e5", "name", "1e5"),
        ("name: 010", "name", "010"),
        ("name: 2026-01-01", "name", "2026-01-01"),
        ("tracking: {experiment: 12:30}", "tracking.experiment", "12:30"),
        ("tracking: {experiment: 'null'}", "tracking.experiment", "null"),
        ("tracking: {uri: ~}", "tracking.uri", None),
        ("tracking: {uri: }", "tracking.uri", None),
        ("seed: 1_000", "seed", 1000),
        ("seed: 1e3", "seed", 1000),
        ("loader: {read_ahead: 0x100}", "loader.read_ahead", 256),
        ("guard: {hang_seconds: 1e4}", "guard.hang_seconds", 1e4),
        ("loader: # all of it: as it comes", "loader.threads", 2),
        ("engine: {offload_optimizer: off}", "engine.offload_optimizer", False),
        ("engine: {offload_optimizer: Yes}", "engine.offload_optimizer", True),
        ("engine: {activations: {mode: none}}", "engine.activations.mode", "none"),
    ],
)
def test_yaml_means_what_a_person_means(text: str, key: str, meant: Any, tmp_path: Path) -> None:
    """In a file, in --set, and in the file that the run saves of itself."""
    whole = yaml.safe_load(load_config("demo").to_yaml())
    top = text.partition(":")[0]
    del whole[top]
    path = tmp_path / "run.yaml"
    path.write_text(f"{yaml.safe_dump(whole)}{text}\n")
    config = load_config(str(path))
    assert config.flattened()[key] == meant
    path.write_text(config.to_yaml())
    assert read_config(path) == config == load_config(str(path))


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("name=2026", "name", "2026"),
        ("name=on", "name", "on"),
        ("name= spaced ", "name", "spaced"),
        ('name="2026"', "name", "2026"),
        ("tracking.experiment=*", "tracking.experiment", "*"),
        ("tracking.experiment=@you", "tracking.experiment", "@you"),
        ("tracking.experiment=%d", "tracking.experiment", "%d"),
        ("tracking.experiment=a: b # c", "tracking.experiment", "a: b # c"),
        ("tracking.experiment=a\tb", "tracking.experiment", "a\tb"),
        ("tracking.experiment=a=b", "tracking.experiment", "a=b"),
        ("tracking.experiment='x' and 'y'", "tracking.experiment", "'x' and 'y'"),
        ("tracking.uri=", "tracking.uri", None),
        ("tracking.uri=null", "tracking.uri", None),
        ("model.size.eps=1e-6", "model.size.eps", 1e-6),
        ("stages.base.trained=[*]", "stages.base.trained", ["*"]),
        ("stages.base.trained=[*_ref*, blocks.*]", "stages.base.trained", ["*_ref*", "blocks.*"]),
        ("stages.base.trained=[!x, &y, %z]", "stages.base.trained", ["!x", "&y", "%z"]),
        ("stages.base.where={sprites-images: \"'human' in domains\"}", "stages.base.where.sprites-images",
         "'human' in domains"),
        ("stages.base.where.sprites-images='human' in domains", "stages.base.where.sprites-images",
         "'human' in domains"),
        ("evaluation=", "evaluation", None),
    ],
)  # fmt: skip
def test_an_override_means_what_is_typed(override: str, key: str, meant: Any) -> None:
    assert load_config("demo", [override]).flattened()[key] == meant


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_any_text_survives_an_override_and_the_saved_file(text: str) -> None:
    text = text.strip()
    if not text or text[0] in "[{'\"" or text in ("~", "null", "Null", "NULL"):
        return
    config = load_config("demo", [f"tracking.experiment={text}"])
    assert config.tracking.experiment == text
    assert read_mapping(config.to_yaml(), "saved")["tracking"]["experiment"] == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", r"line 3: key 'name' is there twice, first in line 1"),
        ("model:\n  base: a\n  base: b\n", r"line 3: key 'base' is there twice, first in line 2"),
        ("name: a\n\tseed: 1\n", r"line 2: .*spaces"),
        ("a:\n  b: 1\n\tc: 2\n", r"line 3: .*spaces"),
        ("trained: [*]\n", r"line 1: .*quotes"),
        ("name: @x\n", r"line 1: .*quotes"),
        ("? [a, b]\n: 1\n", "line 1: a key must be a text"),
        ("~: 1\n", "line 1: a key must be a text"),
        ("name: !!python/object:os.system x\n", "line 1: leave out the tag"),
        ("seed: !!float 1\n", "line 1: leave out the tag"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("", "holds nothing"),
        ("- a\n", "holds a list"),
        ("name: \x07\n", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_a_file_that_could_be_misread_is_refused_with_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_anchors_and_what_they_share_are_read(tmp_path: Path) -> None:
    """As the shipped recipes use them; a merged key may be said again."""
    content = read_mapping("a: &one {x: 1, y: 2}\nb: {<<: *one, y: 3}\nc: [&t text, *t]\n", "")
    assert content == {"a": {"x": "1", "y": "2"}, "b": {"x": "1", "y": "3"}, "c": ["text", "text"]}
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml can't be read"):
        load_config(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=010"], "seed: a zero before a number may mean octal"),
        (["stages.base=[]"], r"stages\.0: should be a section of keys"),
        (["loader=3"], "loader: should be a section of keys"),
        (["loader..threads=3"], "expected key.key=value"),
        (["stages.base.trained=[a, b"], "no YAML list"),
        (["stages.base.trained=*"], "should be a list"),
        (["stages.base.betas=0.9"], "stages.0.betas: should be a list"),
        (["stages.base.betas=[0.9, 1]"], "stages.0.betas.1: .*less than 1"),
        (["stages.base.where={sprites-images: 'seconds >'}"], "filter 'seconds >' can't be evaluated"),
        (["stages.stage1.weight_decay=1000"], "weight_decay=1000 times learning_rate=0.003 is 1 or more"),
        (["stages.stage2.reference_dropout=1"], "reference_dropout=1 leaves none"),
        (["experts=[{name: a, low: 0.5}, {name: b, high: 0.4}]"], "no one is trained on t from 0.4 to 0.5"),
        (["experts=[{name: a, low: 0.5}]"], "no one is trained on t from 0 to 0.5"),
        (["experts=[{name: a, high: 0.5}, {name: b, low: 0.5}]", "stages.base.flow.low=0.2"],
         "with experts each has its own"),
        (["encoders.live={gpus: 1.5}"], "a share of one GPU"),
        (["encoders.live={cpus: 0.00001}"], "the least that Ray reserves"),
        (["model.size.attention_head_dim=31"], "model.size.attention_head_dim: .*multiple of 2"),
        (["model.size.reference_gate=own"], "model.size.reference_gate: unknown key"),
        (["corpora.sprites-images.build.held_out=480"], "leave 0 for split=train"),
        (["corpora.sprites-held-out.build={samples: 1, split: held_out, held_out: 1}"], "it needs 2"),
        (["corpora.sprites-images.build.identities=99999"], "less than or equal to"),
        (["corpora.sprites-images.buckets=[9x64x64]"], "no bucket for an image"),
        (["corpora.sprites-videos.fps=1"], "no bucket for a clip of 2 frames|too short"),
        (["corpora.sprites-images.buckets=[1x64x99840]"], "has more than 65,536"),
        (["corpora={../elsewhere: {buckets: [1x64x64]}}"], "corpora.*match pattern"),
        (["data="], "data: has no value"),
        (['data=""'], "data: .*at least 1 character"),
        (["checkpoint.store=''"], "checkpoint.store: .*at least 1 character"),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", overrides)


SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 50, "text_dim": 64,
         "freq_dim": 32, "text_len": 8}  # fmt: skip
TRIED: dict[str, list[Any]] = {
    "num_attention_heads": [-1, 0, 1, 3],
    "attention_head_dim": [0, *range(1, 9), 16],
    "num_layers": [-1, 0, 1, 3],
    "ffn_dim": [-1, 0, 1],
    "freq_dim": [-1, 0, 1, 3, 6],
    "eps": [-1e-3, 0.0, 1e-9, 1.0],
    "num_domains": [0, 4, 5, 7],
    "in_channels": [0, 8, 16, 32],
    "out_channels": [0, 8, 16, 32],
    "patch_size": [(0, 2, 2), (1, 0, 1), (1, 1, 1), (1, 2, 1), (1, 2, 2), (1, 2), (1, 3, 2), (2, 2, 2)],
    "timestep_angles": ["float32", "float64", "float16"],
}


@pytest.mark.parametrize("key", TRIED)
def test_a_size_is_accepted_where_a_step_can_be_made_with_it(key: str) -> None:
    """Against the model itself: what the schema accepts makes a step with finite gradients of every parameter."""
    from domainshuttle.model.batch import TrainingBatch
    from domainshuttle.model.flow import FlowConfig
    from domainshuttle.model.objective import training_loss
    from domainshuttle.model.transformer import DomainShuttleTransformer3DModel

    batch = TrainingBatch.fake(2, height=6, width=6, seed=1)
    accepted = []
    for value in TRIED[key]:
        try:
            size = ModelSection(size={**SMALL, key: value}).size  # type: ignore[typeddict-item]
        except ValidationError:
            continue
        model = DomainShuttleTransformer3DModel(**size)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        loss = training_loss(model, batch, run_seed=1, step=1, flow=FlowConfig(), cross_pair_weight=0.1).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), f"{key}={value}"
        accepted.append(value)
    refused = [value for value in TRIED[key] if value not in accepted]
    for value in refused:  # as no step can be made, or only one that means nothing
        if key in ("ffn_dim", "freq_dim", "eps", "patch_size"):
            continue
        with pytest.raises((RuntimeError, TypeError, ValueError, ZeroDivisionError)):
            model = DomainShuttleTransformer3DModel(**{**SMALL, key: value})
            training_loss(model, batch, run_seed=1, step=1, flow=FlowConfig(), cross_pair_weight=0.1).loss.backward()
            if key == "attention_head_dim" and value == 0:
                raise ValueError("nothing to attend with")
    assert accepted and refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.base.learning_rate=.inf", "stages.0.learning_rate: should be a finite number"),
        ("model.size.text_dim=32", "and the model has text_dim=32"),
        ("model.size.max_references=1", "max_references=1: lower it"),
        ("engine.compile=true", "engine.compile='true' is no backend"),
        ("engine.attention_backend=flsh", "did you mean 'flash'"),
        ("engine.attention_backend=_flash_3", "has no backward pass, so it can't train: set it to 'fa3'"),
        ("engine.kernels=triton", "engine.kernels=triton needs GPUs"),
        ("stages.base.trained=[blocks.*, bloks.*]", "['bloks.*'] name no parameter"),
        ("stages.base.warmup_steps=400", "stages.base.warmup_steps is 400, and the stage ends after"),
    ],
)
def test_plan_and_train_refuse_alike(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` checks what needs the model while Ray starts, here without: it is what `plan` asks."""
    monkeypatch.setattr("domainshuttle.platform.driver.preflight.require_encoded", lambda config: None)
    printed = in_process("plan", "demo", "--set", f"output={tmp_path}/runs", "--set", override, expect=2)
    assert message in " ".join(printed.split()), printed
    if override.startswith(("engine", "stages.base.trained")):
        with pytest.raises(ConfigError) as caught:
            require_model(load_config("demo", [override]))
        assert message in str(caught.value)
        return
    printed = in_process("train", "demo", "--set", f"output={tmp_path}/runs", "--set", override, expect=2)
    assert message in " ".join(printed.split()), printed
    assert not (tmp_path / "runs").exists()
