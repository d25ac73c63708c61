"""What `plan` predicts, against closed forms, the plan's own steps and what was measured.

Run: python -m pytest tests/platform/planning/test_forecast.py
"""

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa
import pytest
import yaml

from domainshuttle.cluster.devices import DEVICES
from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.model.spec import ModelSpec
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.index.table import Index, IndexMetadata
from domainshuttle.pipelines.plan.pairing import reference_profiles
from domainshuttle.pipelines.plan.step_plan import PROFILE, StepPlan
from domainshuttle.platform.commands.prediction import forecast
from domainshuttle.platform.config.loading import load_cluster, load_config
from domainshuttle.platform.config.schema import ActivationSection, EngineSection, StageSection
from domainshuttle.platform.driver.preflight import selected_parameters
from domainshuttle.platform.engine.deepspeed_config import deepspeed_configs
from domainshuttle.platform.planning.data import StageData, Steps, known_steps
from domainshuttle.platform.planning.forecast import Forecast, Layout, Work, layouts
from domainshuttle.platform.planning.memory import PRODUCTS, Policy, States, best_policy, device_memory
from domainshuttle.platform.planning.step_time import Sample, bus_bandwidth, step_time
from domainshuttle.platform.run.folder import Run

WAN = ModelSpec.preset("wan2.1-t2v-14b")
STAGE = StageSection.model_validate(
    {
        "name": "stage2", "mixture": {"clips": 1}, "steps": 100, "global_batch": 64, "micro_batch": 1, "references": 5,
        "learning_rate": 1e-5, "trained": ["blocks.*.attn1.*", "*_ref*"], "loss": {"cross_pair_weight": 0.1},
    }
)  # fmt: skip
ENGINE = EngineSection()
BUCKET = parse_bucket("81x480x832")
CLIP = Sample(BUCKET.latent_shape[1:], 5, 5, 512)
H100 = DEVICES["H100"]


@pytest.mark.parametrize(
    ("size", "layers", "seconds", "peak"), [("wan2.1-t2v-1.3b", 30, 4.56, 20.4), ("wan2.1-t2v-14b", 8, 4.63, 48.1)]
)
def test_the_rows_that_were_measured_on_an_h100(size: str, layers: int, seconds: float, peak: float) -> None:
    """benchmarks/README.md: time and memory of the engine's whole step, one GPU, all blocks run again.

    Since then the engine reduces in a smaller bucket, keeps less of what is modulated and does not run the FFN's second
    product again; and what is trained, and its gradients, are float32 beside the masters instead of bf16. All of it is
    put back here.
    """
    spec = replace(ModelSpec.preset(size), num_layers=layers)
    states, policy = States.of(spec, STAGE, ENGINE, 1), Policy(layers, {})
    tokens, share = CLIP.tokens(spec), CLIP.reference_share(spec)
    memory = device_memory(spec, STAGE, states, policy, tokens, 1, reference_share=share)
    more = 1e9 - memory.parts["reduction bucket"] + (16 - 12 * share) * tokens * spec.dim
    # of weights and gradients two bytes instead of four, of the rank's own and of the block that is gathered
    more -= (memory.parts["trained weights"] + memory.parts["gradients"]) / 2 + memory.parts["a block's gradients"]
    assert (memory.tensors + more) / 1e9 == pytest.approx(peak, rel=0.05)
    time = step_time(spec, STAGE, states, policy, CLIP, 1, H100)
    again = layers * spec.product_flops(tokens)["ffn"] / (0.71 * H100.flops)
    assert time.micro_batch + time.update + again == pytest.approx(seconds, rel=0.05)
    assert time.messages == 0


def test_states_are_those_of_zero3() -> None:
    """2 bytes of a frozen parameter, 20 of a trained one, shared by the ranks, and what is not shared."""
    spec = replace(WAN, num_layers=4)
    trained = spec.parameters(STAGE.trained)
    float32 = sum(
        int(np.prod(shape)) for name, shape in spec.parameter_shapes().items()
        if any(part in name for part in ("time_embedder", "scale_shift_table", "norm2")) and "table_ref" not in name
    )  # fmt: skip
    for ranks in (1, 8):
        parts = States.of(spec, STAGE, ENGINE, ranks).parts
        frozen = 2 * (spec.parameters() - trained) + 2 * float32
        assert parts["frozen weights"] * ranks == pytest.approx(frozen)
        held = parts["trained weights"] + parts["moments"] + parts["gradients"]
        assert held * ranks == pytest.approx(16 * trained)
        assert parts["masters"] * ranks == pytest.approx(4 * trained)
    averaged = States.of(spec, STAGE, EngineSection(ema=0.9), 8).parts
    assert averaged["moving average"] * 8 == pytest.approx(4 * trained)
    offloaded = States.of(spec, STAGE, EngineSection(offload_optimizer=True), 8).parts
    assert offloaded["masters"] == offloaded["moments"] == offloaded["gradients"] == 0


def test_what_products_take_and_save_a_token() -> None:
    tokens = CLIP.tokens(WAN)
    assert tokens == 40_560
    sizes, flops = WAN.product_bytes(tokens), WAN.product_flops(tokens)
    assert [sizes[product] / tokens for product in PRODUCTS] == [10_400, 30_720, 27_648]
    saved = [flops[product] / sizes[product] for product in PRODUCTS]
    assert saved == [pytest.approx(79_870, rel=0.01), 5_120, 5_120]
    # all of self-attention is what the trace counts, without the text's
    all_blocks = WAN.step_flops(CLIP.latent, references=5, text_tokens=0, trained=STAGE.trained)
    assert all_blocks.attention_forward == 40 * flops["attention"]
    assert all_blocks.attention_backward == 2 * all_blocks.attention_forward


def test_the_best_policy_fits_and_no_more_would() -> None:
    tokens = CLIP.tokens(WAN)
    for device, ranks in (("H100", 8), ("H100", 64), ("H200", 8), ("B200", 64)):
        capacity, states = DEVICES[device].memory, States.of(WAN, STAGE, ENGINE, ranks)
        best = best_policy(WAN, STAGE, states, tokens, 1, capacity)
        assert best is not None and best.recomputed == 40
        assert device_memory(WAN, STAGE, states, best, tokens, 1).fits(capacity)
        more = next((product for product in PRODUCTS if best.kept.get(product, 0) < 40), None)
        if more is not None:
            kept = {**best.kept, more: best.kept.get(more, 0) + 1}
            assert not device_memory(WAN, STAGE, states, Policy(40, kept), tokens, 1).fits(capacity)
        assert best.kept["attention"] == 40
    few = States.of(WAN, STAGE, ENGINE, 1)
    assert best_policy(WAN, STAGE, few, tokens, 1, H100.memory) is None  # 14B's states alone are too much
    tiny = replace(WAN, num_layers=2)
    assert best_policy(tiny, STAGE, States.of(tiny, STAGE, ENGINE, 8), 2000, 1, H100.memory) == Policy(0, {}, 2)


def test_a_policy_is_told_as_the_setting_that_means_it() -> None:
    for policy in (
        Policy(0, {}, 40), Policy(40, {}), Policy(40, {"attention": 40}), Policy(40, {"attention": 7}),
        Policy(40, {"attention": 40, "qkv": 11, "ffn": 3}),
    ):  # fmt: skip
        section = ActivationSection.model_validate(yaml.safe_load(policy.setting()))
        assert Policy.of(EngineSection(activations=section), WAN) == policy
    assert Policy.of(EngineSection(), WAN) == Policy(40, {"attention": 40})


def test_keeping_products_saves_their_time() -> None:
    states = States.of(WAN, STAGE, ENGINE, 8)
    times = [
        step_time(WAN, STAGE, states, policy, CLIP, 1, H100)
        for policy in (Policy(40, {}), Policy(40, {"attention": 40}), Policy(40, {"attention": 40, "qkv": 10}))
    ]
    flops = WAN.product_flops(CLIP.tokens(WAN))
    assert times[0].attention - times[1].attention == pytest.approx(40 * flops["attention"] / (0.6 * H100.flops))
    assert times[1].products - times[2].products == pytest.approx(10 * flops["qkv"] / (0.71 * H100.flops))
    none = step_time(WAN, STAGE, states, Policy(0, {}, 40), CLIP, 1, H100)
    full = WAN.step_flops(CLIP.latent, references=5, paired_references=5, trained=STAGE.trained)
    products = full.model - full.attention_forward - full.attention_backward - full.attention_frozen
    assert none.products == pytest.approx(products / (0.71 * H100.flops))


def cluster(**changes: object) -> ClusterSpec:
    spec = load_cluster("h100-64")
    return spec.model_copy(update=changes)


def test_messages_are_gathers_and_a_reduction_over_the_bus() -> None:
    """(n - 1) / n of all weights twice, of the trained ones' float32 gradients once. A snapshot's are gathered too."""
    spec = cluster()
    assert bus_bandwidth(spec, 8) == pytest.approx(0.75 * 450e9)
    assert bus_bandwidth(spec, 64) == min(0.75 * 450e9, 8 * 50e9 * 0.925)
    slow = cluster(links=spec.links.model_copy(update={"nics": 1, "nic_gbit": 100.0}))
    assert bus_bandwidth(slow, 64) == pytest.approx(11.5625e9)
    trained = WAN.parameters(STAGE.trained)
    states = States.of(WAN, STAGE, ENGINE, 64)
    # two bytes of a frozen parameter, four of a trained one, and few frozen ones in float32
    assert states.pass_bytes == pytest.approx(2 * (WAN.parameters() - trained) + 4 * trained, rel=0.01)
    time = step_time(WAN, STAGE, states, Policy(40, {}), CLIP, 1, H100, 64, 100e9)
    expected = (2 * states.pass_bytes + 4 * trained) * 63 / 64 / 100e9
    assert time.messages == pytest.approx(expected)
    apart = STAGE.model_copy(update={"loss": STAGE.loss.model_copy(update={"cross_pair_target": "snapshot"})})
    with_snapshot = step_time(WAN, apart, states, Policy(40, {}), CLIP, 1, H100, 64, 100e9)
    assert with_snapshot.messages - expected == pytest.approx(states.pass_bytes * 63 / 64 / 100e9)
    assert 0 <= time.exposed <= time.messages
    crawling = step_time(WAN, STAGE, states, Policy(40, {}), CLIP, 1, H100, 64, 1e9)
    assert crawling.micro_batch == pytest.approx(100 * expected)  # nothing hides so much


def work(steps: tuple[Steps, ...], stage: StageSection = STAGE) -> Work:
    return Work(replace(WAN, num_layers=4), stage, ENGINE, StageData(steps, True), 512)


def test_a_step_takes_what_its_longest_ranks_take() -> None:
    uneven = ((1, 1), (1, 1), (5, 5), (1, 1))
    stage = STAGE.model_copy(update={"global_batch": 4})
    one = Forecast(work((Steps(BUCKET, 1.0, uneven),), stage), Layout(2, 1, Policy(4, {})), cluster())
    short, long = (one.micro_batch(one.work.sample(BUCKET, n, n)).micro_batch for n in (1, 5))
    update = one.micro_batch(one.work.largest).update
    assert one.step_seconds() == pytest.approx(short + long + update)
    assert one.balance == pytest.approx((3 * short + long) / 2 / (short + long))
    assert one.hours(100) == pytest.approx(100 * one.step_seconds() * 2 / 3600)
    flops = sum(one.work.spec.step_flops(CLIP.latent, references=n, paired_references=n, trained=STAGE.trained).model
                for n in (1, 1, 5, 1))  # fmt: skip
    assert one.flops(BUCKET) == pytest.approx(flops)
    assert one.mfu == pytest.approx(flops / one.step_seconds() / 2 / H100.flops)
    c, f, h, w = BUCKET.latent_shape
    assert one.work.sample_bytes(BUCKET) == 2 * (c * h * w * (f + 2 + 2) + 512 * 4096)


def index() -> tuple[Index, list[list[int]]]:
    random = np.random.default_rng(0)
    lists = [sorted(random.integers(0, 3, random.integers(1, 6)).tolist()) for _ in range(1200)]
    columns = {
        "source": pa.array(["a"] * 1200).dictionary_encode(),
        "bucket": pa.array(random.choice(["81x480x832", "49x480x832"], 1200, p=[0.7, 0.3])).dictionary_encode(),
        PROFILE: pa.array(reference_profiles(pa.chunked_array([lists], pa.list_(pa.int8())), 5)),
    }
    return Index(pa.table(columns), (IndexMetadata(corpus="test", stage="raw"),), "d"), lists


def test_the_steps_of_an_index_are_those_that_its_plan_makes() -> None:
    plan = StepPlan(index()[0], None, 5, 16, references=5)
    data = known_steps(plan, 5, 0.1)
    assert sum(one.share for one in data.steps) == pytest.approx(1)
    shown: dict[str, list[np.ndarray]] = {}
    for step in range(1500):
        batch = plan[step]
        shown.setdefault(str(batch.bucket), []).append(plan.reference_counts(batch, 0.1))
    for bucket in data.buckets:
        counts = np.concatenate(shown[str(bucket)])
        assert data.share(bucket) == pytest.approx(len(shown[str(bucket)]) / 1500, abs=0.01)
        assert data.mean(bucket) == pytest.approx(tuple(counts.mean(0)), rel=0.03)
        assert data.most(bucket) == tuple(counts.max(0))


def test_layouts_fit_and_are_sorted_by_cost() -> None:
    one = work((Steps(BUCKET, 1.0, ((5, 5),) * 64),))
    one = replace(one, spec=WAN)
    found = layouts(one, cluster(), 64)
    assert found and all(other.fits() for other in found)
    hours = [other.hours(1) for other in found]
    assert hours == sorted(hours)
    assert {other.layout.ranks for other in found} <= {1, 2, 4, 8, 16, 32, 64}
    for other in found:
        # ranks that share samples, where nothing fits otherwise, count as one
        assert other.layout.groups * other.layout.micro_batch * other.layout.accumulation(64) == 64


def test_ranks_that_share_a_sample_hold_its_tokens_together() -> None:
    """Half of the tokens each: half of what is kept of them, half of the FLOPs, and the exchanges in closed form."""
    data = StageData((Steps(BUCKET, 1.0, ((5, 5),) * 64),), True)
    alone, shared = (
        Forecast(Work(WAN, STAGE, ENGINE, data, 512), Layout(8, 1, Policy(40, {}), sharing), load_cluster("h100-8"))
        for sharing in (1, 2)
    )
    whole, half = (one.memory(CLIP) for one in (alone, shared))
    for part in ("block inputs", "a block at work"):
        assert half.parts[part] == pytest.approx(whole.parts[part] / 2, rel=1e-3)
    assert half.parts["frozen weights"] == whole.parts["frozen weights"]
    one, two = alone.micro_batch(CLIP), shared.micro_batch(CLIP)
    assert two.computing == pytest.approx(one.computing / 2)
    tokens = CLIP.tokens(WAN)
    # queries, keys, values and the output in bf16: forward twice, backward, and forward of the second set; half stays
    assert two.exchanges == pytest.approx(
        4 * 40 * 4 * (tokens / 2) * 5120 * 2 * 0.5 / bus_bandwidth(load_cluster("h100-8"), 2)
    )
    assert shared.layout.accumulation(64) == 2 * alone.layout.accumulation(64) == 16
    # each micro-batch is a sample of a group: twice as many of half the time
    assert shared.step_seconds() == pytest.approx(alone.step_seconds(), rel=0.2)


CONFIGS = [
    ("wan2.1-t2v-1.3b-1gpu", "h100-1"), ("wan2.1-t2v-1.3b", "h100-8"), ("wan2.1-t2v-14b-lora", "h100-8"),
    ("wan2.1-t2v-14b-720p", "h100-64"), ("wan2.1-t2v-14b", "h100-64"), ("wan2.2-t2v-a14b", "h100-64"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "cluster"), CONFIGS)
def test_the_configurations_fit_the_clusters_that_they_are_for(name: str, cluster: str, offline: None) -> None:
    config, machines = load_config(name), load_cluster(cluster)
    selected_parameters(config)
    for segment in Run(config).segments():
        found = forecast(config, segment, None, machines)
        assert found.layout.ranks == config.worker_sizes(segment.stage)[-1] <= machines.most_devices
        assert found.fits(), f"{segment.name}: {found.memory(found.work.largest).total / 1e9:.1f} GB"
        assert segment.stage.global_batch == (
            found.layout.groups * found.layout.micro_batch * found.layout.accumulation(segment.stage.global_batch)
        )


@pytest.mark.parametrize("name", ["demo", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-t2v-14b-lora"])
def test_the_reduction_bucket_is_the_one_that_the_engine_asks_deepspeed_for(name: str, offline: None) -> None:
    """In float32: of a block's trained parameters, which the names and shapes of the network give, at least 4 MB."""
    config = load_config(name)
    asked = deepspeed_configs(config)
    for segment in Run(config).segments():
        found = forecast(config, segment, None, load_cluster("h100-8"))
        stage, shapes = segment.stage, found.work.spec.parameter_shapes()
        block = sum(
            int(np.prod(shape)) for name, shape in shapes.items()
            if name.startswith("blocks.0.") and any(fnmatchcase(name, pattern) for pattern in stage.patterns)
        )  # fmt: skip
        assert found.states.parts["reduction bucket"] == 4 * max(block, 1_000_000)
        zero = asked[stage.name]["zero_optimization"]
        assert found.states.parts["reduction bucket"] == 4 * zero["reduce_bucket_size"]
        assert found.states.prefetched_elements == zero["stage3_prefetch_bucket_size"]


def test_adapters_cost_their_own_states_alone() -> None:
    config = load_config("wan2.1-t2v-14b-lora")
    found = forecast(config, Run(config).segments()[1], None, load_cluster("h100-8"))
    # of a block the projections of both branches and the output, 7 adapters of rank 32; FiLM's two; and small ones
    adapters = (40 * 7 + 2) * 32 * (5120 + 5120)
    beside = 40 * 6 * 5120 + 5 * 5120 + 5120 * (16 * 4) + 5120
    assert found.states.trained == adapters + beside
    parts = found.memory(found.work.largest).parts
    assert parts["trained weights"] + parts["moments"] + parts["gradients"] == pytest.approx(
        16 * (adapters + beside) / 8
    )
    assert parts["frozen weights"] * 8 == pytest.approx(2 * WAN.parameters(), rel=0.01)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("domainshuttle.platform.engine.hub.snapshot_download", refuse)
    yield


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-t2v-a14b", "demo"])
def test_plan_prints_at_eighty_columns_without_a_network(
    name: str, offline: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from domainshuttle.platform.commands.plan import print_plan
    from domainshuttle.platform.console import console

    monkeypatch.setattr(console, "width", 80)
    print_plan(load_config(name))
    out = capsys.readouterr().out
    if name != "demo":
        assert "Layouts that fit, the cheapest first" in out and "about 30,000 GPU-hours" in out
        assert "fits H100" in out and "Assumed: the cluster h100-64" in out
    assert "Memory of a device in GB" in out
    # beside a terminal, prose and commands stay on one line
    assert not [line for line in out.splitlines() if len(line) > 80 and line[0] in "│┃┏┡└ "]


def test_plan_says_where_the_cluster_is_too_small_for_the_run_and_where_failures_let_nothing_end(
    offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from domainshuttle.platform.commands.plan import print_plan

    print_plan(load_config("wan2.1-t2v-14b"), cluster=load_cluster("h100-8"))
    small = capsys.readouterr().out
    assert "h100-8 has 8 devices, too few for the workers of stage1, stage2" in small and "said of 64 devices" in small
    print_plan(load_config("wan2.1-t2v-14b"), cluster=load_cluster("h100-64", ["reliability.device_hours=0.001"]))
    failing = capsys.readouterr().out
    assert "too few" not in failing and failing.count("never") == 6


def test_layouts_of_a_large_cluster_are_as_many_devices_as_the_batch_holds() -> None:
    one = work((Steps(BUCKET, 1.0, ((5, 5),) * 256),))
    one = replace(one, spec=WAN, stage=one.stage.model_copy(update={"global_batch": 256}))
    found = {other.layout.ranks for other in layouts(one, cluster(), 100_000)}
    assert max(found) >= 256 and max(found) <= 256 * 8
