"""MUSAR-Gen in the form of its files, made small."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from built import jpeg

from domainshuttle.pipelines.corpora.musar_gen import MusarGenConfig

FIXED = "An undivided, seamless, and harmonious picture with two objects. "


def row(shade: int, **changes: Any) -> dict[str, Any]:
    """A row in the form of the dataset card, its pictures as Hugging Face keeps them."""
    content = {
        "cond_img_0": {"bytes": jpeg(shade), "path": None},
        "cond_img_1": {"bytes": jpeg(shade + 1), "path": None},
        "tgt_img": {"bytes": jpeg(shade + 2, 60), "path": None},
        "cond_prompt_0": "A red vintage teapot on a table.",
        "cond_prompt_1": "A wooden chair",
        "prompt": f"{FIXED}In the garden scene, the teapot and the chair are placed together {shade}.",
    }
    return {**content, **changes}


def source(root: Path, rows: list[Any]) -> MusarGenConfig:
    (root / "data").mkdir(parents=True)
    for number, part in enumerate((rows[:3], rows[3:])):
        if part:
            path = root / "data" / f"train-0000{number}.parquet"
            pq.write_table(pa.Table.from_pylist(part), path, row_group_size=2)
    return MusarGenConfig(folder=str(root))
