"""Echo-4o-Image in the form of its files, made small."""

import json
from pathlib import Path
from typing import Any

from built import jpeg

from domainshuttle.pipelines.corpora.echo_4o import Echo4oConfig

TEXT = "Put the white cat from image 1 beside a tree in the second picture."


def jsonl(root: Path, records: list[Any]) -> Echo4oConfig:
    folder = root / "Multi-Reference-Image"
    (folder / "images" / "inputs").mkdir(parents=True)
    (folder / "multi.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    for number in range(4):
        (folder / "images" / "inputs" / f"0000{number}.jpg").write_bytes(jpeg(10 * number))
    (folder / "images" / "00009.jpg").write_bytes(jpeg(90))
    return Echo4oConfig(folder=str(root))


def record(**changes: Any) -> dict[str, Any]:
    """A record in the form of the other parts' files, with a path whose beginning does not exist."""
    content = {
        "task_type": "multi", "instruction": TEXT,
        "input_images": ["/Echo-4o-Image/Multi-Reference-Image/images/inputs/00001.jpg", "/elsewhere/00002.jpg"],
        "output_image": "/Echo-4o-Image/images/00009.jpg",
    }  # fmt: skip
    return {**content, **changes}
