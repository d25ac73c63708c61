"""The real records of OpenS2V and UNO from their files to training: built, labelled by word lists, paired with tiny
models of the real classes, encoded and trained on. Run: python -m pytest -m nightly
tests/platform/commands/test_real_media.py"""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from built import MEDIA
from running import CLI, STARTED, cli, environment
from tiny_models import save_models
from transformers import GroundingDinoImageProcessorPil

from domainshuttle.pipelines.curation.pairs.candidates import STORE_NAME
from domainshuttle.pipelines.index.samples import read_raw_sample
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.media.decode import decode_image

NEXUS = MEDIA / "opens2v_nexus" / "data_process" / "demo_result"
UNO = MEDIA / "uno" / "assets" / "examples"
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not NEXUS.is_dir(), reason="needs ../shared/media")]

RUN = """
name: real
data: {folder}/data
output: {folder}/runs
model:
  size: {{num_attention_heads: 2, attention_head_dim: 12, num_layers: 2, ffn_dim: 48, text_dim: 64, freq_dim: 32,
         text_len: 48}}
encoders: {{video: block-dct, text: byte-umt5, text_len: 48}}
corpora:
  opens2v:
    build: {{builder: opens2v, folder: {nexus}, jsons: "step5/merge_final_json/*.json",
            videos: "step0/videos/{{part}}/{{path}}"}}
    buckets: [5x64x112]
    fps: 8
    pair: &pair
      {pair}
  uno: {{build: {{builder: uno, folder: {folder}/UNO, labels: labels.json}}, buckets: [1x64x64], pair: *pair}}
stages:
  - {{name: stage1, mixture: {{uno: 1}}, steps: 2, global_batch: 2, micro_batch: 2, trained: ["*"], references: 3}}
  - {{name: stage2, mixture: {{opens2v: 1}}, steps: 2, global_batch: 2, micro_batch: 2, trained: ["*"], references: 5,
     loss: {{cross_pair_weight: 0.1}}}}
cluster: {{workers: 1, cpus_per_worker: 0.5}}
checkpoint: {{every: 2}}
tracking: {{every: 1}}
"""


def configured(folder: Path) -> Path:
    (folder / "UNO").mkdir()
    shutil.copytree(UNO, folder / "UNO" / "images")
    records = []
    for place in sorted(UNO.glob("*/config.json")):
        described, name = json.loads(place.read_text()), place.parent.name
        shown = [f"{name}/{described[key][2:]}" for key in sorted(described) if key.startswith("image_ref")]
        records.append({"prompt": described["prompt"], "image_tgt_path": f"images/{name}/result.png",
                        "image_paths": [f"images/{one}" for one in shown]})  # fmt: skip
    (folder / "UNO" / "labels.json").write_text(json.dumps(records))
    models = save_models(folder / "models")
    # the tiny detector's coarsest map of a square of 64 pixels is one pixel, which its norm does not take
    GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(models["detector"])
    pair: dict[str, Any] = {
        "models": models, "frames": 2, "least_detection": 0.0, "least_mask": 0.0,
        "least_area": 0.001, "least_side": 8, "least_dino": 0.0, "least_clip": 0.0, "most_dino": 0.99999,
        "pictures": 2, "decode": {"cpus": 0.5},
    }  # fmt: skip
    path = folder / "real.yaml"
    path.write_text(RUN.format(folder=folder, nexus=NEXUS, pair=json.dumps(pair)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def test_real_records_from_their_files_to_training(tmp_path: Path) -> None:
    config, data = configured(tmp_path), tmp_path / "data"
    cli("data", "build", config)
    cli("data", "label", config)
    words = {word for row in Index.load(data / "uno" / "raw" / "index.parquet").rows(range(5)) for word in row.subjects}
    assert words & {"clock", "woman", "figurine", "logo", "dress"}, words
    assert "Next: domainshuttle data encode" in cli("data", "pair", config)
    whole = {name: contents(data / name / "paired") for name in ("opens2v", "uno")}
    for name in whole:
        for row in (index := Index.load(data / name / "paired" / "index.parquet")).rows(range(len(index))):
            sample = read_raw_sample(row)
            assert {reference.subject for reference in sample.info.references} == {*range(len(sample.info.subjects))}
            for reference in sample.info.references:
                assert decode_image(sample.files[reference.file]).shape[:2] == reference.size
            assert sample.info.scores["pair_dino"] <= 1

    shutil.rmtree(data / "opens2v" / "paired")
    process = subprocess.Popen([*CLI, "data", "pair", str(config)], env=environment(), start_new_session=True)
    STARTED.append(process)
    deadline = time.monotonic() + 300
    while not [*data.glob(f"opens2v/paired/{STORE_NAME}/*/*.arrow")] and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()  # what was found stays, and what is chosen has not begun
    process.wait()
    cli("data", "pair", config)
    assert {name: contents(data / name / "paired") for name in whole} == whole

    printed = cli("data", "inspect", data / "opens2v" / "paired", "--page", tmp_path / "page.html")
    assert "other_clip" in printed and "<h3>" in (tmp_path / "page.html").read_text()
    assert "Verified" in cli("data", "verify", data / "uno" / "paired", "--decode", "all")
    cli("data", "encode", config)
    encoded = Index.load(data / "opens2v" / "encoded" / "index.parquet")
    assert (
        encoded.row(0).reference_subjects
        == Index.load(data / "opens2v" / "paired" / "index.parquet").row(0).reference_subjects
    )
    cli("train", config)
