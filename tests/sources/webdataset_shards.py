"""WebDataset shards of others in the form of its files, made small."""

import io
import json
import tarfile

from built import jpeg, mp4

MEMBERS = {
    "000000001.jpg": jpeg(30),
    "000000001.txt": b"A cat.",
    "000000001.json": json.dumps({"caption": "not this", "status": "success", "width": 56}).encode(),
    "dir/clip one.mp4": mp4(),
    "dir/clip one.json": json.dumps({"caption": "A clip."}).encode(),
    "dir/clip one.m4a": b"sound",
    "dir/clip one.JPG": jpeg(1),  # a picture of the clip
    "failed.json": json.dumps({"caption": "x", "status": "failed_to_download"}).encode(),
    "mute.png": jpeg(60),
    "torn.jpg": jpeg(9)[:40],
    "torn.txt": b"x",
    "odd.jpg": jpeg(9),
    "odd.json": b"[1]",
    "__MACOSX/._x.jpg": b"",
}


def tar(members: dict[str, bytes], end: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
        size = buffer.tell()
    return buffer.getvalue() if end else buffer.getvalue()[:size]
