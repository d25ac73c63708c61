"""A wheel of this tree as it is imported here, without a build: what a job is trained with is what its author has.

Its version has the digest of its content, so that nodes keep one copy of each tree, and `preflight` tells trees apart.
Dependencies are the image's: Ray would install them on each node at each start.
"""

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_ROOMS = ("model", "pipelines", "cluster", "platform", "configs")
_ENDINGS = {".py", ".yaml", ".html"}
_NAME = "domainshuttle"
_WHEEL = b"Wheel-Version: 1.0\nGenerator: domainshuttle\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def sources() -> Iterator[tuple[str, bytes]]:
    """The package's files, by their names in it."""
    for room in _ROOMS:
        for path in sorted((_ROOT / room).rglob("*")):
            if path.suffix in _ENDINGS and path.is_file():
                yield path.relative_to(_ROOT).as_posix(), path.read_bytes()


def build_wheel(folder: Path) -> Path:
    """Writes the wheel into a folder, and returns its path; the same tree makes the same bytes."""
    files = {f"{_NAME}/{name}": content for name, content in sources()}
    digest = hashlib.blake2b(digest_size=6)
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    release = f"{version(_NAME)}+t{digest.hexdigest()}"
    about = f"{_NAME}-{release}.dist-info"
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {release}\n".encode()
    files[f"{about}/WHEEL"] = _WHEEL
    files[f"{about}/entry_points.txt"] = b"[console_scripts]\ndomainshuttle = domainshuttle.platform.cli:main\n"
    record = "".join(f"{name},sha256={_hash(content)},{len(content)}\n" for name, content in files.items())
    files[f"{about}/RECORD"] = f"{record}{about}/RECORD,,\n".encode()
    path = folder / f"{_NAME}-{release}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return path


def _hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
