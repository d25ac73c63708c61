"""Archives that are not extracted: what is said of them does it.

Run: python -m pytest tests/pipelines/corpora/test_downloads.py
"""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from domainshuttle.pipelines.corpora.downloads import media_folder
from domainshuttle.pipelines.errors import DataError

DATA = random.Random(0).randbytes(5000)
PIECES = [f".{number}" for number in range(1, 13)]


@pytest.mark.parametrize(
    ("packing", "name", "pieces"),
    [
        ("tar -cf", "it's a.tar", []),
        ("tar -czf", "a.tar.gz", []),
        ("tar -cJf", "a.TAR.XZ", []),
        ("tar -cjf", "a.tar.bz2", []),
        ("zip -q", "a b.zip", []),
        ("tar -cf", "a.tar", [".split.000", ".split.001", ".split.002"]),
        ("tar -czf", "a.tgz", PIECES),
        ("tar -czf", "a.tar.gz", [".part-aa", ".part-ab"]),
        ("tar -cJf", "a.tar.xz", ["aa", "ab", "ac"]),
        ("tar --zstd -cf", "a.tar.zst", PIECES),
        ("zip -q", "a.zip", PIECES),
    ],
)
def test_archives_are_extracted_by_what_is_said(tmp_path: Path, packing: str, name: str, pieces: list[str]) -> None:
    programs = {"zip": ["zip", "unzip"], "tar --zstd -cf": ["zstd"], "tar -cJf": ["xz"], "tar -cjf": ["bzip2"]}
    if missing := [one for one in programs.get(packing.removesuffix(" -q"), []) if not shutil.which(one)]:
        pytest.skip(f"needs {missing}")
    (tmp_path / "data").write_bytes(DATA)
    subprocess.run([*packing.split(), name, "data"], cwd=tmp_path, check=True)
    (tmp_path / "data").unlink()
    if pieces:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        size = -(-len(whole) // len(pieces))
        for number, ending in enumerate(pieces):
            (tmp_path / f"{name}{ending}").write_bytes(whole[number * size : (number + 1) * size])
    with pytest.raises(DataError, match="holds archives that are not extracted: run `") as said:
        media_folder(tmp_path, "")
    command = re.findall("`(.*)`", str(said.value))[0]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "data").read_bytes() == DATA
