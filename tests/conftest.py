"""Fixtures that several folders of tests share."""

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():  # before anything imports triton: its kernels are tested in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
# what a terminal or a user's shell may say, and tests must not depend on
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)

ROOT = Path(__file__).resolve().parents[1]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m "slow ..."` or `-m "nightly ..."`: files without such tests are not imported, which takes long."""
    wanted = config.option.markexpr.split(" ")[0]
    if wanted in ("slow", "nightly") and collection_path.suffix == ".py":
        return f"mark.{wanted}" not in collection_path.read_text() or None
    return None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`: what one process runs, longest first.

    The tests that train share one Ray cluster, one set of corpora and one finished run; all others that need Ray share
    another cluster; the rest of a file stays together, for its fixtures.
    """
    if not getattr(config.option, "loadgroup", False):
        return

    def needs_ray(item: pytest.Item) -> bool:
        return "ray_cluster" in getattr(item, "fixturenames", ())

    often = [item for item in items if not item.get_closest_marker("nightly")]
    of_ray = {item.path for item in often if needs_ray(item) and not item.get_closest_marker("slow")}
    long = {item.path for item in often if item.get_closest_marker("slow") and not needs_ray(item)}

    def place(item: pytest.Item) -> tuple[int, str]:
        if item.get_closest_marker("slow") and needs_ray(item):
            return 0, "training"
        if item.path in of_ray:
            return 1, "ray"
        return 2 if item.path in long else 3, str(item.path.relative_to(ROOT / "tests").with_suffix(""))

    places = {item: place(item) for item in items}
    items.sort(key=lambda item: places[item][0])
    for item in items:
        item.add_marker(pytest.mark.xdist_group(places[item][1]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays: it need not be looked through each time that garbage is collected, as engines do."""
    gc.freeze()
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist does not keep groups of tests together: install what dev names")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this machine, without dashboard, for the session.

    Ray gives its processes half a minute to start. Where other programs keep the machine from it, it's tried again.
    """
    from domainshuttle.cluster.local import ClusterError, Connection

    with contextlib.ExitStack() as stack:
        for more in (True, True, False):
            try:
                stack.enter_context(Connection())
                break
            except ClusterError:
                import ray

                ray.shutdown()
                if not more:
                    raise
        yield


@pytest.fixture(scope="session")
def cluster_variables(ray_cluster: None) -> dict[str, str]:
    """The variables with which a command of its own process takes that cluster, and starts none."""
    import ray

    access = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    return access | {"RAY_ADDRESS": str(ray.get_runtime_context().gcs_address)}


TINY = """
name: tiny
seed: 3
data: {folder}/data
output: {folder}/runs
model:
  size: {{num_attention_heads: 2, attention_head_dim: 12, num_layers: 2, ffn_dim: 48, text_dim: 64, freq_dim: 32,
         text_len: 48}}
encoders: {{video: block-dct, text: byte-umt5, text_len: 48}}
corpora:
  pictures:
    build: {{builder: sprites, kind: image, samples: 40, identities: 72, seed: 5, side: 48}}
    buckets: [1x32x32]
  clips:
    build: {{builder: sprites, kind: video, samples: 24, identities: 72, seed: 5, side: 48, frames: 5}}
    buckets: [5x32x32]
  held-out:
    build: {{builder: sprites, kind: video, samples: 8, identities: 72, seed: 5, side: 48, frames: 5,
            split: held_out, two_subjects: 0}}
    buckets: [5x32x32]
stages:
  - {{name: stage1, mixture: {{pictures: 1}}, steps: 4, global_batch: 8, micro_batch: 4, learning_rate: 1.0e-3,
     trained: ["*"], references: 2, reference_dropout: 0.1}}
  - {{name: stage2, mixture: {{clips: 1}}, steps: 24, global_batch: 8, micro_batch: 2, learning_rate: 1.0e-3,
     trained: ["blocks.*.attn1.*", "*_ref*"], references: 2, loss: {{cross_pair_weight: 0.1}}}}
cluster: {{workers: 2, cpus_per_worker: 0.5}}
engine: {{persistent_parameters: 0, activations: {{mode: none}}}}
checkpoint: {{every: 3, keep: 2}}
tracking: {{experiment: tiny, every: 1}}
generation: {{steps: 2, guidance: 2.0, shift: 3.0, fps: 8}}
evaluation: {{corpus: held-out, candidates: 4, groups: 2}}
"""


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of seconds, in a folder of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(folder=folder))
    return path


def _declare_operators_of_torchvision() -> None:
    """With the CPU build of torch, torchvision's own library can't be loaded, and its import looks for these."""
    import importlib.util

    if importlib.util.find_spec("torchvision") is None:
        return
    import torch

    if torch.cuda.is_available() or torch.version.cuda:
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor",
    ):
        library.define(schema)
    _LIBRARIES.append(library)


_LIBRARIES: list[object] = []
"""They are there as long as these objects are."""
_declare_operators_of_torchvision()
