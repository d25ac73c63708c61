"""Cases of the released model's JSONL files: a prompt, its reference pictures and the domain of each.

A line looks like ``{"prompts": "...", "seg_meta": [{"seg_file": ["a.jpg", "b.jpg"]}], "seg_root": "./cases",
"domain_code": ["Human", "Fantasy Domain"]}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainshuttle.model.domains import domain_id

_PROMPT_KEYS = ("cap", "prompts", "prompt")
_PICTURE_KEYS = ("image_path", "face_path")
_PICTURES = re.compile("ref|image|img|pict|photo", re.IGNORECASE)
"""Of keys that people give pictures under."""


@dataclass(frozen=True)
class GenerationCase:
    """What to generate: pass it on to ``DomainShuttlePipeline``."""

    prompt: str
    references: tuple[Path, ...]
    """Pictures of the subjects."""
    subjects: tuple[int, ...]
    """Subject on each picture."""
    domains: tuple[int, ...]
    """Domain id wanted for each, -1 for none."""

    @classmethod
    def from_release(cls, item: Mapping[str, Any], folder: Path) -> GenerationCase:
        """The case of one line of a JSONL file.

        Beyond the release, ``subjects`` may give the subject on each picture (default: one picture a subject), and
        pictures without ``domain_code`` get no domain (the release takes "Human").

        Args:
            item: the parsed line.
            folder: of the file; relative paths start there, or at the working directory as in the release.

        Raises:
            ValueError: naming every key that is missing or of another type, every unknown domain and every picture that
                is not there.
        """
        if not isinstance(item, Mapping):
            raise ValueError(f"bad case: expected an object with a prompt and pictures, not {str(item)[:60]!r}")
        problems = []
        prompt = next((item[key] for key in _PROMPT_KEYS if item.get(key)), "")
        if not prompt:
            problems.append(f"no prompt: give one of {', '.join(_PROMPT_KEYS)}")
        elif not isinstance(prompt, str):
            problems.append(f"the prompt {str(prompt)[:60]!r} is no text")
        meta = item.get("seg_meta") or {}
        if isinstance(meta, list):
            if len(meta) > 1:
                problems.append(f"seg_meta has {len(meta)} entries, of which one is read: put all pictures into one")
            meta = meta[0]
        names = [str(name) for name in _listed(meta, "seg_file", problems)]
        if not names and item.get("image_path"):
            names = [item["image_path"]]
        if item.get("face_path"):
            names.append(item["face_path"])
        if not names and (unread := [key for key in item if _PICTURES.search(str(key)) and key not in _PICTURE_KEYS]):
            problems.append(f'{", ".join(unread)}: not read; give pictures as "seg_meta": [{{"seg_file": ["a.jpg"]}}]')
        references = []
        for name in names:
            tried = _places(name, item.get("seg_root"), folder)
            found = next((path for path in tried if path.is_file()), None)
            if found is None:
                problems.append(f"no picture {name}: tried {', '.join(map(str, tried))}")
            else:
                references.append(found)
        domains: list[int] = []
        given = item if item.get("domain_code") else meta
        for domain in _listed(given, "domain_code", problems) or [None] * len(names):
            try:
                domains.append(domain_id(domain))
            except ValueError as error:
                problems.append(str(error))
        subjects = _listed(item, "subjects", problems) or range(len(names))
        if not all(type(number) is int and number >= 0 for number in subjects):
            problems.append(f"subjects {subjects}: expected the number of the subject on each picture, such as 0, 0, 1")
        for key, values in (("domain_code", domains), ("subjects", subjects)):
            if not problems and len(values) != len(names):
                problems.append(f"{key} has {len(values)} entries for {len(names)} pictures")
        if problems:
            raise ValueError("bad case: " + "; ".join(problems))
        return cls(prompt, tuple(references), tuple(subjects), tuple(domains))


def _listed(item: Mapping[str, Any], key: str, problems: list[str]) -> list[Any]:
    """The list of a key; empty, with a word in `problems`, for what is none: a text would be read letter by letter."""
    found = item.get(key) or []
    if isinstance(found, list):
        return found
    problems.append(f"{key} {str(found)[:60]!r}: expected a list, with an entry for each picture")
    return []


def _places(name: str, root: str | None, folder: Path) -> list[Path]:
    """Where a picture may lie; released cases repeat the last folder of ``seg_root`` in the name."""
    path = Path(name)
    if path.is_absolute() and root is None:
        return [path]
    path = Path(name.lstrip("/"))
    roots = [Path(root)] if root is not None else [Path()]
    if not roots[0].is_absolute():
        roots = [folder / roots[0], roots[0]]
    places = [
        start / tail for start in roots for tail in (path, *([Path(*path.parts[1:])] if len(path.parts) > 1 else []))
    ]
    return [Path(name), *places] if Path(name).is_absolute() else places
