"""How long an evaluation takes of which nothing is missing: 220 cases of 10 models, 9 metrics.

    python benchmarks/evaluation.py [--cases 220] [--models 10]

The models are folders of small videos, the metrics those that need no model, with other choices beside them: what is
measured is reading rows and notes, the statistics and the report, which do not depend on what the metrics are.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.platform.evaluation.config import EvaluationConfig
from domainshuttle.platform.evaluation.evaluate import run_evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=220)
    parser.add_argument("--models", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        lines = []
        for number in range(asked.cases):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
            split = "in_domain" if number % 2 else ("real_to_fantasy", "fantasy_to_real", "mixed")[number // 2 % 3]
            line = {"id": f"case-{number}", "prompts": f"case {number}", "split": split}
            lines.append(json.dumps({**line, "seg_meta": [{"seg_file": [f"{number}.png"]}]}))
        (folder / "cases.jsonl").write_text("\n".join(lines))
        models = []
        for model in range(asked.models):
            (folder / f"model-{model}").mkdir()
            models.append(str(folder / f"model-{model}"))
            for number in range(asked.cases):
                clip = rng.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
                (folder / f"model-{model}" / f"case-{number}.mp4").write_bytes(encode_mp4(clip, 8))
        three = {"hue_identity": {}, "steadiness": {}, "sharpness": {}}
        variants = {f"of-{n}": {"hue_identity": {"frames": n}, "sharpness": {"frames": n}} for n in (1, 2, 3)}
        config = EvaluationConfig.model_validate(
            {
                "name": "benchmark", "sources": {"own": {"kind": "cases", "path": str(folder / "cases.jsonl")}},
                "metrics": {**three, "variants": variants},
            }
        )  # fmt: skip
        for what in ("the first time", "when nothing is missing"):
            began, used = time.perf_counter(), time.process_time()
            run_evaluation(models, config, folder / "out")
            took = f"{time.perf_counter() - began:.1f} s, {time.process_time() - used:.1f} s of processor time"
            print(f"{asked.cases} cases of {asked.models} models {what}: {took}")


if __name__ == "__main__":
    main()
