"""UNO-1M in the form of its files, made small."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from domainshuttle.pipelines.corpora.uno import UnoConfig
from domainshuttle.pipelines.media.decode import encode_jpeg


def pair(number: int, split: str = "split1", **changes: Any) -> dict[str, Any]:
    """A record in the form of the label files."""
    content = {
        "img_path1": f"{split}/object365_w1024_h1536_split_Bread_0_0_{number}_725x1024.png",
        "img_path2": f"{split}/object365_w1024_h1536_split_Bread_0_0_{number}_811x1024.png",
        "caption": {"img_path1": "Bread on a table.", "img_path2": f"Bread {number} in a park.", "subject": ["bread"],
                    "judgment": "same"},
        "vlm_filter_cot": {"score_part": {"Overall Shape and Form": 4.0}, "score_final": 4.0},
    }  # fmt: skip
    return {**content, **changes}


def source(root: Path, splits: dict[str, list[Any]]) -> UnoConfig:
    (root / "labels").mkdir(parents=True)
    for split, records in splits.items():
        (root / "labels" / f"{split}.json").write_text(json.dumps(records))
        (root / "images" / split).mkdir(parents=True)
        for number in range(8):
            for width, shade in ((725, 40), (811, 90)):
                name = f"object365_w1024_h1536_split_Bread_0_0_{number}_{width}x1024.png"
                picture = np.full((width // 25, 40, 3), shade + number, np.uint8)
                (root / "images" / split / name).write_bytes(encode_jpeg(picture))
    total = [record for records in splits.values() for record in records]
    (root / "labels" / "uno_1m_total_labels.json").write_text(json.dumps(total))
    return UnoConfig(folder=str(root))
