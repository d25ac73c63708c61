"""Phantom-Data in the form of its files, made small."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from built import mp4

from domainshuttle.pipelines.corpora.phantom_data import PhantomDataConfig

UUID = "0f0a-11"


A, B = f"{UUID}_0_1", f"{UUID}_1.5_2.5"


def pair(target: str = A, other: str = B, **changes: Any) -> dict[str, Any]:
    """What a phrase has, in the form that readers of the files describe."""
    reference = {"vid": other, "frame_idx": 0.1, "bbox_loc": [[0, 0, 20, 30]], "bbox_cls": "person", "scores": 0.9}
    content = {
        "obj_from_tgt_video": [
            {"vid": target, "frame_idx": "0.5", "bbox_loc": [8, 4, 40, 44], "bbox_cls": "person"}
        ],
        "refer_result": [[{**reference, **changes}]],
    }  # fmt: skip
    return content


def source(root: Path, rows: list[tuple[str, str | None, Any]], named: str = "video_id") -> PhantomDataConfig:
    (root / "videos").mkdir(parents=True)
    columns = {named: [row[0] for row in rows], "video_caption": [row[1] for row in rows],
               "cross_pair": [row[2] if isinstance(row[2], str) else json.dumps(row[2]) for row in rows]}  # fmt: skip
    pq.write_table(pa.table(columns), root / "koala36M_multi_ref_merged_filtered.parquet")
    for vid, shade in ((A, 0), (B, 100)):
        (root / "videos" / f"{vid}.mp4").write_bytes(mp4(shade))
    return PhantomDataConfig(folder=str(root))
