"""A team's own pictures and clips: named by manifests (JSONL, CSV, Parquet), or lying in a folder with their captions.

docs/datasets.md has the fields. Several names of a field are common, and the first that is there is taken.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from domainshuttle.model.domains import DOMAINS, domain_id
from domainshuttle.pipelines.corpora.downloads import check_folder, found_files
from domainshuttle.pipelines.corpora.files import Shown, clip_of, picture_of, read_media, read_picture, sample_of
from domainshuttle.pipelines.corpora.json_records import jsonl_records, parse
from domainshuttle.pipelines.corpora.parquet_rows import parquet_columns, parquet_rows, same_names
from domainshuttle.pipelines.corpora.source import (
    Fields,
    FolderSource,
    LeftOut,
    Notes,
    Piece,
    Record,
    RecordSource,
    SourceConfig,
    Tables,
    uncaptioned,
    unknown_form,
)
from domainshuttle.pipelines.corpora.words import FROM_WORDS, domain_of
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.quarantine import SampleFault, fault_reason
from domainshuttle.pipelines.sample import IMAGE_EXTENSIONS, ORIGINS, VIDEO_EXTENSIONS, RawSample
from domainshuttle.pipelines.shards.companions import companion

TARGETS = ("clip", "video", "image", "target", "path", "file")
CAPTIONS = ("caption", "text", "prompt")
_IDS = ("id", "key")
_FIELDS = {*TARGETS, *CAPTIONS, *_IDS, "references", "subjects", "domains", "scores", "source_video"}
_ENDINGS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)
"""Of one name that ends in several ways the first is taken: a clip may have a picture of itself beside it."""
_MOST_UNREAD = 20
"""Fields of a row that are named where they are not read; the others are counted together."""
_REFERENCE = re.compile(r"(?P<stem>.+)\.ref(?P<number>\d+)")


class ManifestConfig(SourceConfig):
    """Own pictures and clips. Paths of manifests are below `folder`."""

    builder: Literal["manifest"] = "manifest"
    manifests: list[str] = Field(
        default_factory=list, description="JSONL, CSV or Parquet files below `folder`; none: all media below it"
    )


class ManifestSource(FolderSource[ManifestConfig], RecordSource):
    """See `source.Source`."""

    def pieces(self) -> list[Piece]:
        check_folder(self.root)
        if self.config.manifests:
            found = found_files(self.root, self.config.manifests, "manifests")
            if odd := [path.name for path in found if path.suffix.lower() not in (".jsonl", ".csv", ".parquet")]:
                raise DataError(f"{self.root}: {odd[:5]}: manifests end with .jsonl, .csv or .parquet")
            return [Piece.of(path, self.root) for path in found]
        if not any(_is_media(path) for path in _found(self.root)):
            raise DataError(f"{self.root} has no pictures or clips: {_endings()}")
        folders = sorted({path.parent for path in _found(self.root)})
        return [Piece(folder.relative_to(self.root).as_posix(), _stamp(folder)) for folder in folders]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        rows = self._rows(self.root / piece.name) if self.config.manifests else self._files(self.root / piece.name)
        for number, (where, row) in enumerate(rows):
            where = f"{piece.name}: {where}" if where else f"{piece.name} row {number + 1}"
            if isinstance(row, str):
                yield LeftOut(where, row)
                continue
            try:
                fields = Fields(row() if callable(row) else row, where)
                yield self._record(fields)
            except DataError as error:
                yield LeftOut(where, fault_reason(error))

    def _rows(self, path: Path) -> Iterator[tuple[str, Any]]:
        """The rows of a manifest: where each is, and the row, or what parses it, or why it is none."""
        if path.suffix.lower() == ".jsonl":
            for located in jsonl_records(path):
                where = f"byte {located.offset}"
                yield where, lambda located=located, where=where: located.parse(where)
        elif path.suffix.lower() == ".parquet":
            names = parquet_columns(path)
            unread = dict.fromkeys((name for name in names if name not in _FIELDS), "")
            for row in parquet_rows(path, [name for name in names if name in _FIELDS]):
                yield "", {**{name: value for name, value in row.items() if value is not None}, **unread}
        else:
            try:
                with path.open(encoding="utf-8-sig", newline="") as file:
                    reader = csv.DictReader(file, strict=True)
                    # spreadsheets write columns without a name behind the others
                    names = [
                        name.strip() or f"column {number}" for number, name in enumerate(reader.fieldnames or (), 1)
                    ]
                    if len(set(names)) != len(names):
                        raise same_names(path, names)
                    reader.fieldnames = names
                    for row in reader:
                        yield "", lambda row=row: _of_csv(row)
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(f"{path} is no CSV in UTF-8: {error}") from error

    def _files(self, folder: Path) -> Iterator[tuple[str, Any]]:
        """The media of a folder as rows: with `name.json`, `name.txt` and `name.ref0.jpg` beside them; and the files
        that belong to none."""
        every = sorted(_found(folder, deep=False))
        media = [path for path in every if _is_media(path)]
        targets: dict[str, Path] = {}
        for path in sorted(media, key=lambda path: (_ENDINGS.index(_ending(path)), path)):
            if not _REFERENCE.fullmatch(path.stem):
                targets.setdefault(path.stem, path)
        for path in every:
            match = _REFERENCE.fullmatch(path.stem)
            beside = path.suffix in (".txt", ".json") and path.stem in targets
            if not (beside or (_is_media(path) and (match is None or match["stem"] in targets))):
                yield path.name, f"other file: no picture or clip, nor what belongs to one; {_endings()}"
            elif match is None and not beside and targets[path.stem] != path:
                yield path.name, f"other file: {targets[path.stem].name} has its name, and the caption; rename one"
        references: dict[str, list[tuple[int, Path]]] = {}
        for path in media:
            if match := _REFERENCE.fullmatch(path.stem):
                references.setdefault(match["stem"], []).append((int(match["number"]), path))
        for stem, path in sorted(targets.items(), key=lambda one: one[1]):
            yield path.name, lambda stem=stem, path=path: self._beside(path, references.get(stem, []))

    def _beside(self, path: Path, references: list[tuple[int, Path]]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if (described := path.with_name(f"{path.stem}.json")).is_file():
            row = dict(Fields(parse(described.read_bytes(), described.name), described.name).content)
        if (text := path.with_name(f"{path.stem}.txt")).is_file() and not any(name in row for name in CAPTIONS):
            try:
                row["caption"] = text.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise SampleFault("unreadable caption", f"{text.name} is not UTF-8") from error
        row["target"] = path.relative_to(self.root).as_posix()
        if references and "references" not in row:
            row["references"] = [one.relative_to(self.root).as_posix() for _, one in sorted(references)]
        return {name: value for name, value in row.items() if name not in TARGETS or name == "target"}

    def _record(self, fields: Fields) -> Record | LeftOut:
        target = self._below(fields.text(*TARGETS))
        id_ = self._name(fields) or target
        caption = fields.caption(*CAPTIONS) if any(name in fields for name in CAPTIONS) else ""
        references = fields.items("references") if "references" in fields else []
        subjects = self._subjects(fields, len(references))
        shown = [self._reference(one, number, subjects, fields) for number, one in enumerate(references)]
        scores = fields.fields("scores") if "scores" in fields else Fields({}, fields.where)
        return Record(
            id_,
            {
                "target": target,
                "caption": caption,
                "subjects": subjects,
                "references": shown,
                "scores": {name: scores.number(name) for name in scores.content if name in scores},
                "video": fields.text("source_video") if "source_video" in fields else None,
                **({"unread": unread} if (unread := sorted({*fields.content} - _FIELDS)) else {}),
            },
            uncaptioned=uncaptioned(caption),
        )

    def _name(self, fields: Fields) -> str:
        """What the row calls its sample, a text or a number; '' for nothing."""
        named = next((name for name in _IDS if name in fields), None)
        if named is None:
            return ""
        value = fields.content[named]
        return str(fields.whole(named)) if isinstance(value, int) else fields.text(named)

    def _subjects(self, fields: Fields, references: int) -> list[list[Any]]:
        """[word, domain] of each subject; a domain that is not given is None."""
        given = fields.items("subjects") if "subjects" in fields else ["subject"] * references
        domains = fields.items("domains") if "domains" in fields else [None] * len(given)
        if len(domains) != len(given):
            raise unknown_form(
                fields.where,
                f"{counted(len(domains), 'domain')} for {counted(len(given), 'subject')}: expected as many",
            )
        subjects = []
        for one, domain in zip(given, domains, strict=True):
            if isinstance(one, dict):
                inner = Fields(one, f"{fields.where}: subjects")
                one, given_domain = inner.text("word", "name"), inner.content.get("domain")
                domain = domain if given_domain is None else given_domain
            if not isinstance(one, str) or not one.strip():
                raise unknown_form(fields.where, f"subject {one!r}: expected a word, or an object with word and domain")
            subjects.append([one.strip(), None if domain is None else _domain(domain, fields.where)])
        return subjects

    def _reference(self, one: Any, number: int, subjects: list[list[Any]], fields: Fields) -> list[Any]:
        """[path, subject, origin] of a reference: a path, or an object with a path and, if wanted, the two others."""
        origin: Any = "photo"
        if isinstance(one, dict):
            inner = Fields(one, f"{fields.where}: references")
            path, which, origin = (
                inner.text("path", "image", "file"),
                inner.content.get("subject"),
                inner.content["origin"] if "origin" in inner else "photo",
            )
        else:
            path, which = one, None
        words = [word for word, _ in subjects]
        if which is None:
            # one subject may have all pictures; else they are its subjects' in order
            which = number if len(subjects) > 1 else 0
        elif isinstance(which, str) and which in words:
            which = words.index(which)
        if (
            not isinstance(path, str)
            or isinstance(which, bool)
            or which not in range(len(subjects))
            or origin not in ORIGINS
        ):
            raise unknown_form(
                fields.where,
                f"reference {one!r}: expected a path, or an object with path, subject (of {words}, or its place) and "
                f"origin ({', '.join(ORIGINS)})",
            )
        return [self._below(path), which, origin]

    def _below(self, path: str) -> str:
        """A path below the folder, which may be given in full."""
        pure = PurePosixPath(path.replace(os.sep, "/"))
        return pure.relative_to(self.root).as_posix() if pure.is_relative_to(self.root) else path

    def raw_sample(self, record: Record, tables: Tables, notes: Notes) -> RawSample:
        content = record.payload
        target = content["target"]
        unread = content.get("unread", ())
        for name in unread[:_MOST_UNREAD]:
            notes.add(f"field {name[:40]!r} is not read")
        if more := len(unread[_MOST_UNREAD:]):
            notes.add("more fields are not read", more)
        data = read_media(self.root, target, "target")
        clip = _ending(Path(target)) in VIDEO_EXTENSIONS
        guessed = [word for word, domain in content["subjects"] if domain is None]
        subjects = [(word, domain_of(word) if domain is None else domain) for word, domain in content["subjects"]]
        shown = [Shown(which, origin, read_picture(self.root, path)) for path, which, origin in content["references"]]
        return sample_of(
            record.id,
            self.corpus,
            content["caption"],
            clip_of(data, target) if clip else picture_of(data, target),
            subjects,
            shown,
            {**content["scores"], **({FROM_WORDS: 1.0} if guessed else {})},
            content["video"],
        )


def _domain(value: Any, where: str) -> int:
    try:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value.strip()) else value
        return domain_id(number)
    except ValueError as error:
        raise unknown_form(where, f"domain {value!r}: expected one of {', '.join(DOMAINS)}, or its number") from error


def _of_csv(row: dict[Any, Any]) -> dict[str, Any]:
    """A row of CSV: empty cells are left out; lists are JSON, or texts with `;` between them."""
    if None in row or None in row.values():
        raise unknown_form("CSV", f"a row of another length than the header: {str(row)[:120]}")
    found: dict[str, Any] = {}
    for name, cell in row.items():
        if not (cell := cell.strip()):
            continue
        if name in ("references", "subjects", "domains", "scores"):
            found[name] = parse(cell.encode(), name) if cell[0] in "[{" else [one.strip() for one in cell.split(";")]
        else:
            found[name] = cell
    return found


def _found(folder: Path, deep: bool = True) -> Iterator[Path]:
    """The files in a folder, or also below it, but for what systems leave; and links that lead nowhere or to a folder,
    which is not followed."""
    for path in folder.rglob("*") if deep else folder.iterdir():
        if (path.is_file() or path.is_symlink()) and not companion(path.relative_to(folder).as_posix()):
            yield path


def _is_media(path: Path) -> bool:
    return _ending(path) in _ENDINGS


def _ending(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _stamp(folder: Path) -> str:
    """What changes when a file of a folder does."""
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    said = json.dumps([(name, status.st_size, status.st_mtime_ns) for name, status in files])
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def _endings() -> str:
    return f"they end with {', '.join(_ENDINGS)}"
