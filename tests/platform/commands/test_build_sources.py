"""Sources by the command line: killed while they are built, and from real records to training steps. Nightly.

Run: python -m pytest tests/platform/commands/test_build_sources.py -m nightly
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from built import MEDIA, jpeg, mp4

from domainshuttle.pipelines.index.table import Index

pytestmark = pytest.mark.nightly
NEXUS = MEDIA / "opens2v_nexus" / "data_process" / "demo_result"


def domainshuttle(*arguments: str) -> str:
    run = subprocess.run(["domainshuttle", *arguments], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def manifest(root: Path, clips: int) -> Path:
    root.mkdir()
    (root / "ref.jpg").write_bytes(jpeg(9))
    rows = []
    for number in range(clips):
        (root / f"{number}.mp4").write_bytes(mp4(number % 50, frames=12))
        rows.append({"clip": f"{number}.mp4", "caption": f"clip {number}", "references": ["ref.jpg"]})
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_build_that_is_killed_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    root = manifest(tmp_path / "root", 700)
    build = {"builder": "manifest", "folder": str(root), "manifests": ["m.jsonl"], "samples": 600}
    for name in ("whole", "killed"):
        content = {"data": str(tmp_path / name), "corpora": {"mine": {"build": build, "buckets": ["9x32x48"]}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    domainshuttle("data", "build", str(tmp_path / "whole.yaml"))
    whole = contents(tmp_path / "whole" / "mine" / "raw")
    raw = tmp_path / "killed" / "mine" / "raw"
    for wanted in (1, 2):
        process = subprocess.Popen(
            ["domainshuttle", "data", "build", str(tmp_path / "killed.yaml")], start_new_session=True
        )
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None and len([*raw.glob("part-*.tar")]) < wanted:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (raw / "index.parquet").exists():
            break  # it was faster
    time.sleep(2)  # until the workers of the dead driver have ended
    domainshuttle("data", "build", str(tmp_path / "killed.yaml"))
    assert contents(raw) == whole
    assert len(Index.load(raw / "index.parquet")) == 600


@pytest.mark.skipif(not NEXUS.is_dir(), reason="needs ../shared/media")
def test_real_records_are_built_encoded_and_trained_on(tmp_path: Path) -> None:
    content = {
        "name": "real", "data": str(tmp_path / "data"), "output": str(tmp_path / "runs"),
        "model": {"size": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 64,
                           "text_dim": 64, "text_len": 48, "freq_dim": 32}},
        "encoders": {"video": "block-dct", "text": "byte-umt5", "text_len": 48},
        "corpora": {"opens2v": {
            "build": {"builder": "opens2v", "folder": str(NEXUS), "jsons": "step5/merge_final_json/*.json",
                      "videos": "step0/videos/{part}/{path}",
                      "pairs": "step6/cross-frames-pairs/cross_frames_pairs.json",
                      "backgrounds": "step5/final_output/{part}/foreground/{key}.png"},
            "buckets": ["9x64x96"], "fps": 8}},
        "stages": [{"name": "one", "mixture": {"opens2v": 1}, "steps": 3, "global_batch": 2, "micro_batch": 2,
                    "learning_rate": 1e-3, "references": 3, "trained": ["*"], "loss": {"cross_pair_weight": 0.1}}],
        "cluster": {"workers": 1, "cpus_per_worker": 0.5}, "engine": {"precision": "float32"},
        "checkpoint": {"every": 3, "keep": 1},
    }  # fmt: skip
    (path := tmp_path / "real.yaml").write_text(yaml.safe_dump(content))
    assert "Built opens2v: 3 samples" in domainshuttle("data", "build", str(path))
    assert "no faults" in domainshuttle("data", "verify", str(tmp_path / "data/opens2v/raw"), "--decode", "all").lower()
    domainshuttle("data", "encode", str(path))
    assert "Stage one is finished; its weights are in " in domainshuttle("train", str(path))
