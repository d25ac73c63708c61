"""A few good records of every source, in the form of its files."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from built import jpeg, mp4
from sources import ditto, echo_4o, musar_gen, nano_consistent, opens2v, phantom_data, uno, webdataset_shards

from domainshuttle.pipelines.corpora.manifest import ManifestConfig
from domainshuttle.pipelines.corpora.webdataset_shards import WebDatasetConfig

A_CAPTION = "A thing in a place."


def _uno(root: Path, caption: str | None) -> Any:
    texts = {"img_path1": "x", "img_path2": caption, "subject": ["bread"]}
    return uno.source(root, {"split1": [uno.pair(0), uno.pair(1, caption=texts)]})


def _nano(root: Path, caption: str | None) -> Any:
    first, second = nano_consistent.record("A_1", "sit"), nano_consistent.record("B_1", "sit", instruction=caption)
    return nano_consistent.source(root, [first, second])


def _echo(root: Path, caption: str | None) -> Any:
    other = echo_4o.record(instruction=caption, output_image="x/inputs/00003.jpg")
    return echo_4o.jsonl(root, [echo_4o.record(), other])


def _echo_rows(root: Path, caption: str | None) -> Any:
    root.mkdir()
    rows = [{"image_list": [jpeg(10), jpeg(90)], "instruction_list": [text]} for text in (echo_4o.TEXT, caption or "")]
    pq.write_table(pa.Table.from_pylist(rows), root / "part.parquet", row_group_size=1)
    return echo_4o.Echo4oConfig(folder=str(root))


def _musar(root: Path, caption: str | None) -> Any:
    return musar_gen.source(root, [musar_gen.row(10), musar_gen.row(40, prompt=caption)])


def _phantom(root: Path, caption: str | None) -> Any:
    rows = [(phantom_data.A, "A man.", {"a man": phantom_data.pair()}),
            (phantom_data.B, caption, {"a man": phantom_data.pair(phantom_data.B, phantom_data.A)})]  # fmt: skip
    return phantom_data.source(root, rows)


def _opens2v(root: Path, caption: str | None) -> Any:
    return opens2v.source(root, {"a_part1": opens2v.entry(), "a_part2": opens2v.entry(face_cap_qwen=caption)})


def _ditto(root: Path, caption: str | None) -> Any:
    records = [ditto.record(), ditto.record("local/a_2.mp4", instruction=caption)]
    return ditto.source(root, records, [{"path": "videos/a.mp4", "caption": "A street."}])


def _manifest(ending: str) -> Callable[[Path, str | None], Any]:
    def made(root: Path, caption: str | None) -> Any:
        root.mkdir()
        (root / "r.jpg").write_bytes(jpeg(9))
        (root / "a.jpg").write_bytes(jpeg(20))
        (root / "b.mp4").write_bytes(mp4())
        rows = [{"image": "a.jpg", "caption": A_CAPTION, "references": ["r.jpg"]},
                {"image": "b.mp4", "caption": caption, "references": ["r.jpg"]}]  # fmt: skip
        if ending == "jsonl":
            (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), root / "m.parquet", row_group_size=1)
        else:
            with (root / "m.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, ["image", "caption", "references"])
                writer.writeheader()
                writer.writerows({**row, "references": "r.jpg"} for row in rows)
        return ManifestConfig(folder=str(root), manifests=[f"m.{ending}"])

    return made


def _folder(root: Path, caption: str | None) -> Any:
    root.mkdir()
    for name, text in (("a", A_CAPTION), ("b", caption)):
        (root / f"{name}.jpg").write_bytes(jpeg(20))
        (root / f"{name}.txt").write_text(text or "")
    return ManifestConfig(folder=str(root))


def _webdataset(ending: str, codec: str | None) -> Callable[[Path, str | None], Any]:
    def made(root: Path, caption: str | None) -> Any:
        root.mkdir()
        members = {"a.jpg": jpeg(20), "a.txt": A_CAPTION.encode(), "b.mp4": mp4(),
                   "b.json": json.dumps({"caption": caption}).encode()}  # fmt: skip
        data = webdataset_shards.tar(members)
        packed = pa.compress(data, codec, asbytes=True) if codec else data
        (root / f"00000.{ending}").write_bytes(packed)
        return WebDatasetConfig(folder=str(root))

    return made


EVERY: dict[str, Callable[[Path, str | None], Any]] = {
    "uno": _uno,
    "nano-consistent": _nano,
    "echo-4o": _echo,
    "echo-4o, Parquet": _echo_rows,
    "musar-gen": _musar,
    "phantom-data": _phantom,
    "opens2v": _opens2v,
    "ditto": _ditto,
    "manifest, JSONL": _manifest("jsonl"),
    "manifest, CSV": _manifest("csv"),
    "manifest, Parquet": _manifest("parquet"),
    "folder": _folder,
    "webdataset, tar": _webdataset("tar", None),
    "webdataset, tar.gz": _webdataset("tar.gz", "gzip"),
    "webdataset, tar.zst": _webdataset("tar.zst", "zstd"),
}
"""By name: what makes two good records of the source in a folder that is not there yet, the second with a caption of
one's own, and gives its configuration."""
