"""What downloads look like when something is wrong with them, and what to do about it."""

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.shards.companions import companion

_AGAIN = "log in, accept the dataset's terms on its page, and download it again"
_STUBS = (
    (
        re.compile(rb"version https://git-lfs"),
        "a Git LFS pointer and not the file: run `git lfs pull`, or use `hf download`",
    ),
    (
        re.compile(rb"\s*<(!doctype html|html|head|body)", re.IGNORECASE),
        f"a web page and not the file, as a gated download gives: {_AGAIN}",
    ),
    (
        re.compile(rb"\s*<\?xml.{0,300}<error>", re.IGNORECASE | re.DOTALL),
        "a store's error message and not the file: download it again",
    ),
    (re.compile(rb'\s*\{"error"\s*:', re.IGNORECASE), "a server's error message and not the file: download it again"),
    (
        re.compile(rb"(access to|invalid username|repository not found)", re.IGNORECASE),
        f"a server's refusal and not the file: {_AGAIN}",
    ),
)
_SPLIT = re.compile(r"(?P<stem>.+\.(?:tar|tgz|zip|gz|bz2|xz|zst)(?:\.(?:split|part))?)[._-]?(?P<number>\d+|[a-z]{2,3})")
"""A piece of a split archive, such as part1.tar.split.003 or local.tar.gz.aa."""
_ARCHIVE = re.compile(r".+\.(tar|tgz|zip|tar\.(gz|bz2|xz|zst))", re.IGNORECASE)
_UNPACKING = {".gz": "-xz", ".tgz": "-xz", ".bz2": "-xj", ".xz": "-xJ", ".zst": "-I zstd -x"}
"""How tar unpacks what it is not given the name of."""


def check_download(path: Path) -> Path:
    """The file. Raises DataError where it is missing, empty, or not what was to be downloaded."""
    if not path.is_file():
        raise DataError(f"{path} is missing: the download is not complete, or `folder` is another one")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise DataError(f"{path} is empty: download it again")
    for pattern, what in _STUBS:
        if pattern.match(head):
            raise DataError(f"{path} is {what}")
    return path


def found_files(root: Path, patterns: Iterable[str], what: str) -> list[Path]:
    """The files of some patterns below a folder, which may be given in full, by name. Raises DataError where there are
    none, or one of them is not what was to be downloaded."""
    check_folder(root)
    patterns = [_below(root, pattern, what) for pattern in patterns]
    every = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    found = sorted(path for path in every if not companion(path.relative_to(root).as_posix()))
    if not found:
        raise DataError(f"{root}: no {what} ({' or '.join(patterns)}); it has {_listing(root)}. {_remedy(root)}")
    return [check_download(path) for path in found]


def _below(root: Path, pattern: str, what: str) -> str:
    path = Path(pattern)
    if path.is_relative_to(root):
        path = path.relative_to(root)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise DataError(f"{pattern!r} names no files below {root}, where {what} are looked for: give a path in it")
    return path.as_posix()


def check_folder(root: Path) -> None:
    """Raises DataError where there is no such folder."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder: `folder` is where the source was downloaded to")


def media_folder(root: Path, name: str) -> Path:
    """A folder of pictures or clips. Raises DataError where it is missing, or where it or a folder in it holds nothing
    but archives, which are not extracted, and of which a piece may be missing."""
    folder = root / name if name else root
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; {root} has {_listing(root)}. {_remedy(root)}")
    with os.scandir(folder) as entries:
        inner = sorted(entry.path for entry in entries if entry.is_dir())
    for place in (folder, *map(Path, inner)):
        if archives := _only_archives(place):
            raise DataError(_extract(place, archives))
    return folder


def _only_archives(folder: Path) -> list[Path]:
    """The archives of a folder that has nothing else; none where it has, which is seen at its first other entry."""
    archives = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_file() or not _is_archive(entry.name):
                return []
            archives.append(folder / entry.name)
    return sorted(archives)


def _is_archive(name: str) -> bool:
    return bool(_ARCHIVE.fullmatch(name) or _SPLIT.fullmatch(name))


def _remedy(root: Path) -> str:
    archives = sorted(path for path in root.glob("*") if path.is_file() and _is_archive(path.name))
    return (
        _extract(root, archives) if archives else "Is `folder` the source's own folder, and is its download complete?"
    )


def _extract(folder: Path, archives: list[Path]) -> str:
    """How to extract archives, and which pieces of a split one are missing."""
    pieces: dict[str, list[str]] = {}
    for path in archives:
        match = _SPLIT.fullmatch(path.name)
        if match and not _ARCHIVE.fullmatch(path.name):
            pieces.setdefault(match["stem"], []).append(match["number"])
    for stem, numbers in pieces.items():
        held = {_counted(number) for number in numbers}
        # numbers begin with 0 or 1: a first one that is missing shows itself from the second on
        if gaps := sorted({*range(min(min(held), 1), max(held) + 1)} - held):
            named = ", ".join(_written(gap, numbers[0]) for gap in gaps[:5])
            return (
                f"{folder}: of the split archive {stem} the pieces {named} are missing, the last one being "
                f"{_written(max(held), numbers[0])}: download them, then extract it"
            )
    if pieces:
        stem, numbers = next(iter(pieces.items()))
        names = f"{shlex.quote(stem)}*"
        if len({len(number) for number in numbers}) > 1:  # else 10 would come before 2
            names = f"$(ls -v {names})"
        whole = Path(stem.removesuffix(".split").removesuffix(".part"))
        command = f"cat {names} | tar {_UNPACKING.get(whole.suffix, '-x')}"
        if whole.suffix == ".zip":  # which can't be read from a pipe
            command = f"cat {names} > whole && unzip whole && rm whole"
    else:
        name = archives[0].name
        command = f"{'unzip' if name.lower().endswith('.zip') else 'tar -xf'} {shlex.quote(name)}"
    return f"{folder} holds archives that are not extracted: run `{command}` in it, for each of them"


def _counted(number: str) -> int:
    """The place of a piece by its number, or its letters: aa is 0."""
    if number.isdigit():
        return int(number)
    place = 0
    for letter in number:
        place = place * 26 + ord(letter) - ord("a")
    return place


def _written(place: int, like: str) -> str:
    if like.isdigit():
        return str(place).zfill(len(like))
    letters = ""
    for _ in like:
        place, letter = divmod(place, 26)
        letters = chr(ord("a") + letter) + letters
    return letters


def _listing(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir())
    return f"{names[:8]}{' and more' if len(names) > 8 else ''}" if names else "nothing"
