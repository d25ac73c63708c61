"""Ditto-1M in the form of its files, made small."""

import json
from pathlib import Path
from typing import Any

from built import mp4

from domainshuttle.pipelines.corpora.ditto import DittoConfig


def source(root: Path, records: list[Any], captions: list[Any]) -> DittoConfig:
    for folder, content in (("training_metadata/global_style", records),
                            ("source_video_captions/source_video_captions_sorted", captions)):  # fmt: skip
        (root / folder).parent.mkdir(parents=True)
        (root / f"{folder}.json").write_text(json.dumps(content))
    for name, shade in (("source/a", 0), ("global_style1/a_1", 50), ("local/a_2", 90)):
        (root / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "videos" / f"{name}.mp4").write_bytes(mp4(shade))
    return DittoConfig(folder=str(root))


def record(edited: str = "global_style1/a_1.mp4", **changes: Any) -> dict[str, Any]:
    return {"source_path": "source/a.mp4", "instruction": "Make it a comic.", "edited_path": edited, **changes}
