"""Samples while a run trains: .venv/bin/python -m pytest tests/platform/generation/test_training_samples.py"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from domainshuttle.model.transformer import DomainShuttleTransformer3DModel
from domainshuttle.pipelines.media.decode import decode_video
from domainshuttle.platform.commands.data import build_corpora
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, ExpertSection, RunConfig
from domainshuttle.platform.engine.hub import resolve_all
from domainshuttle.platform.engine.initialization import build_model
from domainshuttle.platform.generation.networks import Network, Networks, networks_beside
from domainshuttle.platform.generation.training_samples import generate_samples, sample_cases
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.weights_origin import WeightsOrigin
from domainshuttle.platform.tracking.mlflow import MetricLogger, open_schedule
from domainshuttle.platform.tracking.queries import RunRecord, list_artifacts, read_runs
from domainshuttle.platform.training.sampler import Sampler


@pytest.fixture(scope="module")
def config(tiny_yaml: Path, ray_cluster: None) -> RunConfig:
    found = load_config(
        str(tiny_yaml), [f"output={tiny_yaml.parent}/sampled", "sampling={every: 2, cases: 3, cpus: 0.5}"]
    )
    build_corpora(found, ["held-out"])
    return found


@pytest.fixture(scope="module")
def weights(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Writes a snapshot as the engine's export would; each one has other weights."""
    model = build_model(config.model, WeightsOrigin(None, 0))

    def export(folder: Path) -> None:
        with torch.no_grad():
            model.proj_out.weight.add_(0.02 * torch.randn(model.proj_out.weight.shape))
        model.save_pretrained(folder)

    return export


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Training:
    """A run that logs to MLflow, as rank 0 of a training has it."""

    def __init__(self, config: RunConfig, name: str, **sampling: object) -> None:
        section = config.sampling.model_copy(update=sampling)  # type: ignore[union-attr]
        self.config = config.model_copy(update={"name": name, "sampling": section})
        self.run = Run.open(self.config)
        tracker = open_schedule(config.tracking_uri, name, name, {}, {}, self.run.spool)
        self.log = MetricLogger(tracker.ids, "stage1", self.run.spool)
        self.sampler = Sampler(self.run, self.run.segment("stage1"), self.log, resolve_all(self.run))
        self.folder = self.run.folder / "samples" / "stage1"

    def tracked(self) -> RunRecord:
        assert self.log.finish()
        return next(run for run in read_runs(self.config.tracking_uri, [self.config.name]) if run.parent)

    def artifacts(self) -> set[str]:
        return set(list_artifacts(self.config.tracking_uri, self.tracked().id, "samples"))


def test_of_two_experts_both_generate(config: RunConfig, weights: Callable[[Path], None], tmp_path: Path) -> None:
    """Each in charge of its times: the one that trains by its snapshot, the other as it is by then."""
    experts = [ExpertSection(name="high", low=0.4), ExpertSection(name="low", high=0.4)]
    run = Run.open(config.model_copy(update={"name": "two", "experts": experts}))
    high, low, _, low2 = run.segments()
    assert (high.name, low.name, low2.name) == ("stage1-high", "stage1-low", "stage2-low")
    weights(snapshot := tmp_path / "snapshot")
    both = networks_beside(run, high, snapshot, resolve_all(run))
    first, second = both.folders
    assert (first, both.boundary) == (snapshot, 0.4)
    begun = build_model(run.config.model, WeightsOrigin(None, low.seed))
    loaded = DomainShuttleTransformer3DModel.from_pretrained(second)
    for (name, one), other in zip(loaded.named_parameters(), begun.parameters(), strict=True):
        torch.testing.assert_close(one, other.bfloat16().float(), msg=name)
    begins = Network(run.folder / "samples" / "begins-stage1-high", None)
    assert networks_beside(run, low, snapshot, resolve_all(run)) == Networks((begins, Network(snapshot, low)), 0.4)
    weights(high.weights)
    high.finish(4)
    finished = Network(high.weights, high)
    assert networks_beside(run, low, snapshot, resolve_all(run)) == Networks((finished, Network(snapshot, low)), 0.4)
    shutil.copytree(high.weights, high.averaged_weights)
    averaged = Network(high.averaged_weights, high)
    assert networks_beside(run, low2, snapshot, resolve_all(run)) == Networks((averaged, Network(snapshot, low2)), 0.4)
    out = run.folder / "samples" / "stage2-low" / "step-000002"
    out.parent.mkdir(parents=True)
    generate_samples(run.config, "stage2-low", snapshot, out, "cpu", 120, resolve_all(run))
    assert (out / "grid.png").exists()
    alone = run.config.model_copy(update={"experts": []})
    only = Run(alone).segments()[0]
    assert networks_beside(Run(alone), only, snapshot, {}) == Networks((Network(snapshot, only),), None)


def test_samples_are_made_beside_the_training_and_reach_mlflow(
    config: RunConfig, weights: Callable[[Path], None], alone: None
) -> None:
    training = Training(config, "beside")
    sampler = training.sampler
    for step in (1, 2):
        sampler.after(step, weights)
    assert sampler.snapshot_folder(2).exists(), "it did not return before the samples were there"
    assert not (training.folder / "step-000002").exists()
    sampler.after(3, weights)
    assert not sampler.due(2) and sampler.skipped == 1  # one at a time
    sampler.finish()
    sampler.after(4, weights)  # the stage's last step
    sampler.finish()
    assert not list(training.folder.glob(".*")), "snapshots stay behind"

    steps = [training.folder / f"step-{step:06d}" for step in (2, 4)]
    cases = sample_cases(training.config)
    for folder in steps:
        assert json.loads((folder / "cases.json").read_text()) == [[c.key, c.caption, c.domain] for c in cases]
        clip = decode_video((folder / "case-03.mp4").read_bytes(), 5)
        still = np.asarray(Image.open(folder / "case-03.png"))
        assert clip.shape == (5, 32, 32, 3) and still.shape == (32, 32, 3)
        assert np.abs(clip[2].astype(int) - still).mean() < 12
    grids = [Image.open(folder / "grid.png") for folder in steps]
    assert grids[0].size == grids[1].size and grids[0].tobytes() != grids[1].tobytes()
    # a column more for the second step, the same rows
    over = Image.open(training.folder / "over_steps.png")
    assert over.height == grids[0].height
    found = training.artifacts()
    assert {f"samples/step-00000{step}/{name}" for step in (2, 4) for name in ("grid.png", "grid.mp4")} <= found
    assert "samples/over_steps.png" in found
    tags = training.tracked().tags
    assert tags["samples.skipped"].startswith("1, the last at step 2") and "samples.failed" not in tags


def test_without_resources_rank_0_makes_the_same_samples_between_two_steps(
    config: RunConfig, alone: None, tmp_path: Path
) -> None:
    model = build_model(config.model, WeightsOrigin(None, 1))
    torch.nn.init.normal_(model.proj_out.weight)
    model.save_pretrained(tmp_path / "weights")

    def export(folder: Path) -> None:
        shutil.copytree(tmp_path / "weights", folder)

    beside, between = Training(config, "elsewhere"), Training(config, "here", cpus=10_000)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    between.sampler.after(2, export)
    assert torch.equal(torch.get_rng_state(), state), "the training's random numbers are others now"
    done = between.folder / "step-000002"
    assert done.exists() and not between.sampler.snapshot_folder(2).exists()
    beside.sampler.after(2, export)
    beside.sampler.finish()
    for name in ("grid.png", "case-01.png"):
        assert (done / name).read_bytes() == (beside.folder / "step-000002" / name).read_bytes()

    between.tracked()  # its run is there before the next one's, which is the newer
    # a restored attempt comes to the same step again: made already, logged again, not generated again
    again = Training(config, "here", cpus=10_000)
    again.sampler.after(2, lambda folder: pytest.fail("it was exported again"))
    assert "samples/step-000002/grid.png" in again.artifacts()


@pytest.mark.parametrize("fault", ["full disk", "damaged snapshot", "timeout", "between steps"])
def test_a_failure_is_a_tag_and_the_training_goes_on(
    fault: str, config: RunConfig, weights: Callable[[Path], None], alone: None
) -> None:
    def full(folder: Path) -> None:
        folder.mkdir(parents=True)
        raise OSError("No space left on device")

    def damaged(folder: Path) -> None:
        weights(folder)
        (folder / "config.json").write_text("{")

    how, expected, options = {
        "full disk": (full, "OSError: No space left", {}),
        "damaged snapshot": (damaged, "ConfigError: the weights in", {}),
        "timeout": (weights, "TimeoutError: timed out", {"timeout": 0.05}),
        "between steps": (weights, "TimeoutError: the samples took more than", {"timeout": 0.05, "cpus": 10_000}),
    }[fault]
    training = Training(config, fault.replace(" ", "-"), **options)
    training.sampler.after(2, how)
    training.sampler.finish()
    assert training.sampler.failed == 1
    assert not list(training.folder.glob(".snapshot*")) and not list(training.folder.glob("step-*"))
    tag = training.tracked().tags["samples.failed"]
    assert tag.startswith("1, the last at step 2") and expected in tag


def test_cases_of_a_file_have_the_size_of_the_stages_largest_bucket(
    config: RunConfig, alone: None, tmp_path: Path, weights: Callable[[Path], None]
) -> None:
    Image.new("RGB", (40, 60), (200, 30, 30)).save(tmp_path / "a.png")
    lines = [
        {"prompts": "a red thing", "seg_meta": [{"seg_file": ["a.png"]}], "domain_code": ["Object"]},
        {"prompts": "nothing given"},
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    training = Training(config, "file", cases_file=str(tmp_path / "cases.jsonl"), cpus=10_000)
    training.sampler.after(2, weights)
    made = training.folder / "step-000002"
    assert [case[1] for case in json.loads((made / "cases.json").read_text())] == ["a red thing", "nothing given"]
    assert Image.open(made / "case-02.png").size == (32, 32) and not (made / "grid.mp4").exists()  # stage1 has pictures
    with pytest.raises(ConfigError, match=r"no file .*absent.jsonl"):
        sample_cases(Training(config, "absent", cases_file=str(tmp_path / "absent.jsonl")).config)


def test_the_configuration_is_checked_before_anything_starts(tiny_yaml: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.corpus: add `evaluation`, or give cases_file"):
        load_config(str(tiny_yaml), ["sampling={every: 5}", "evaluation=null"])
    with pytest.raises(ConfigError, match=r"sampling.timeout=5000 must be below half of guard.hang_seconds=1800"):
        load_config(str(tiny_yaml), ["sampling={every: 5, timeout: 5000}"])
    without = load_config(str(tiny_yaml))
    assert load_config(str(tiny_yaml), ["sampling={every: 5}"]).digest() == without.digest()  # may change on a resume
