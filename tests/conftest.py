"""Fixtures that several folders of tests share."""

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


@pytest.fixture
def torchs_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own linear. A ZeRO-3 engine leaves DeepSpeed's in its process, which keeps and runs other things."""
    import torch

    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this machine, without dashboard, for the session."""
    from domainshuttle.cluster.local import Connection

    with Connection():
        yield


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
engine: {{persistent_parameters: 0}}
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
