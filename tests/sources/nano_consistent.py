"""Nano-Consistent-150K in the form of its files, made small."""

import json
from pathlib import Path
from typing import Any

from built import jpeg

from domainshuttle.pipelines.corpora.nano_consistent import NanoConsistentConfig


def record(person: str, variant: str, **changes: Any) -> dict[str, Any]:
    """A record in the form of the files."""
    content = {
        "task_type": "ic",
        "instruction": f"Change the pose of the woman: {variant}.",
        "input_images": [f"Nano-150k/Image/orignal/people/{person}.jpg"],
        "output_image": f"Nano-150k/Image/output/action/{variant}/{person}.jpg",
        "general_prompt": "The actions after being edited are: x",
    }
    return {**content, **changes}


def source(root: Path, records: list[Any]) -> NanoConsistentConfig:
    inner = root / "Nano-150k"
    (inner / "json").mkdir(parents=True)
    half = len(records) // 2
    for name, part in (("action", records[:half]), ("hairstyle", records[half:])):
        lines = "".join(json.dumps(one) + "\n" for one in part)
        (inner / "json" / f"{name}_cleaned.jsonl").write_text(lines)
    for person, shade in (("A_1", 20), ("B_1", 120)):
        (inner / "Image" / "orignal" / "people").mkdir(parents=True, exist_ok=True)
        (inner / "Image" / "orignal" / "people" / f"{person}.jpg").write_bytes(jpeg(shade))
        for number, variant in enumerate(("sit", "run", "long_hair"), 1):
            (inner / "Image" / "output" / "action" / variant).mkdir(parents=True, exist_ok=True)
            (inner / "Image" / "output" / "action" / variant / f"{person}.jpg").write_bytes(jpeg(shade + number))
    return NanoConsistentConfig(folder=str(root))
