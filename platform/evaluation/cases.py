"""The cases of a test set: what is generated, and what the metrics must know of it.

A test set on disk is a JSONL file in the release's format (model/cases.py) with further keys, beside a folder of its
pictures: `id`, `split`, `labels` (the detection word of the subject on each picture), `edit_prompts` (how an editor
carries each picture into the target domain), `sha256` of each picture, `target` (the real clip, where there is one) and
`source`. The same reader takes files of the release, files of one's own, and what `freeze` wrote.
"""

import difflib
import filecmp
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.errors import counted
from domainshuttle.pipelines.sample import KEY_PATTERN
from domainshuttle.pipelines.storage.atomic import atomic_file
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.config.schema import ConfigError, nearest
from domainshuttle.platform.generation.cases import FiledCase, read_cases

SPLITS = ("in_domain", "real_to_fantasy", "fantasy_to_real", "mixed")
"""In-domain: subjects stay in their domain. The others are cross-domain: the first words name where the references come
from, the last where the video is; mixed: real with fantasy."""
_LISTS = ("labels", "edit_prompts", "sha256", "subjects", "domain_code")
"""The keys of a line whose values have an entry for each picture."""
CASES_NAME, PICTURES_NAME, TARGETS_NAME = "cases.jsonl", "pictures", "targets"


@dataclass(frozen=True)
class ReferencePicture:
    """A reference picture of a case."""

    path: Path
    sha256: str
    """Of the file's bytes, 64 hex digits."""
    subject: int
    """Number of the subject on it."""
    label: str
    """What a detector looks for to find the subject, such as "man"; empty where nobody said."""
    domain: int
    """Domain id wanted for the subject in the video, -1 for none."""
    edit_prompt: str = ""
    """How an editor carries the picture into the target domain; empty where nobody said."""


@dataclass(frozen=True)
class EvaluationCase:
    """One case of a test set."""

    id: str
    """Unique in the test set, safe as the name of a file; the same whatever other cases there are."""
    split: str
    """One of SPLITS."""
    prompt: str
    references: tuple[ReferencePicture, ...]
    source: str = ""
    """Where it comes from, for people."""
    target: Path | None = None
    """The real clip, where there is one."""

    @property
    def cross_domain(self) -> bool:
        """Whether subjects are carried into another domain."""
        return self.split != SPLITS[0]

    @property
    def subjects(self) -> tuple[int, ...]:
        """The subjects' numbers, each once, in the order of the references."""
        return tuple(dict.fromkeys(picture.subject for picture in self.references))

    @property
    def labels(self) -> tuple[str, ...]:
        """The detection word of each of `subjects`."""
        return tuple(next(one.label for one in self.references if one.subject == number) for number in self.subjects)

    @property
    def domains(self) -> str:
        """The domains wanted, by name."""
        names = [DOMAINS[one.domain] if one.domain >= 0 else "none" for one in self.references]
        return ", ".join(dict.fromkeys(names)) or "none"

    @cached_property
    def digest(self) -> str:
        """Of all that generation and metrics see of it, but for its id: 32 hex digits."""
        seen = [
            self.split, self.prompt,
            [[one.sha256, one.subject, one.label, one.domain, one.edit_prompt] for one in self.references],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]


def case_of(filed: FiledCase, folder: Path, split: str = SPLITS[0], source: str = "") -> EvaluationCase:
    """The case of a line of a JSONL file in `folder`; `split` and `source` are taken where the line says none.

    Raises ValueError with all that is wrong with it.
    """
    item, case, problems = filed.item, filed.case, []
    count = len(case.references)
    found = {name: item.get(name) for name in ("labels", "edit_prompts", "sha256")}
    for name, values in found.items():
        if values is not None and (not isinstance(values, list) or len(values) != count):
            problems.append(f"{name}: expected a list with an entry for each of {counted(count, 'picture')}")
            found[name] = None
    problems += _mistaken_keys(item, count)
    split = str(item.get("split") or split)
    if split not in SPLITS:
        problems.append(f"split {split!r}{nearest(split, SPLITS)}")
    if not KEY_PATTERN.fullmatch(filed.id):
        problems.append(
            f"id {filed.id[:80]!r}: expected 1 to 80 letters, digits, - and _, with a letter or digit first"
        )
    target = None
    if item.get("target"):
        target = folder / str(item["target"])
        if not target.is_file():
            problems.append(f"no clip {target}")
    labels, edits, said = (found[name] or [""] * count for name in ("labels", "edit_prompts", "sha256"))
    references = []
    for number, path in enumerate(case.references):
        sha256 = _sha256(path.read_bytes())
        if said[number] and str(said[number]).lower() != sha256:
            problems.append(
                f"{path} has the sha256 {sha256[:12]}..., and the case says {str(said[number])[:12]}...: restore the "
                "picture, or remove `sha256` from the case where the picture was changed on purpose"
            )
        label, edit = labels[number] or "", edits[number] or ""
        if not isinstance(label, str) or not isinstance(edit, str):
            problems.append(f"labels and edit_prompts are texts, not {label!r} and {edit!r}")
        references.append(ReferencePicture(path, sha256, case.subjects[number], label, case.domains[number], edit))
    if problems:
        raise ValueError("; ".join(problems))
    return EvaluationCase(filed.id, split, case.prompt, tuple(references), str(item.get("source") or source), target)


def _mistaken_keys(item: Mapping[str, Any], count: int) -> list[str]:
    """What is said of keys that have an entry for each picture, and nearly the name of one of ours."""
    lists = [key for key, value in item.items() if isinstance(value, list) and len(value) == count]
    close = {key: difflib.get_close_matches(key.lower(), _LISTS, n=1, cutoff=0.85) for key in lists}
    return [f"{key}: the key is {ours}" for key, found in close.items() for ours in found if ours not in item]


def read_case_file(path: Path, split: str = SPLITS[0], source: str = "") -> list[EvaluationCase]:
    """The cases of a JSONL file; raises ConfigError for the first line that is not understood."""
    cases = []
    for filed in read_cases(path):
        try:
            cases.append(case_of(filed, path.parent, split, source or path.name))
        except ValueError as error:
            raise ConfigError(f"{path}, case {filed.name} ({filed.id}): {error}") from error
    if not cases:
        raise ConfigError(f"{path} has no cases: expected one a line")
    return cases


def require_unique(cases: Iterable[EvaluationCase]) -> None:
    """Raises ConfigError where two cases have one id: their videos would have one name."""
    cases = list(cases)
    twice = [name for name, count in Counter(case.id for case in cases).items() if count > 1]
    if twice:
        sources = sorted({case.source for case in cases if case.id == twice[0]})
        raise ConfigError(
            f"of more than one case: {counted(len(twice), 'id')}, such as {twice[0]!r} (from "
            f"{' and '.join(sources)}): give the cases ids of their own, or one of their sources a `prefix`"
        )


def freeze(cases: Sequence[EvaluationCase], folder: Path) -> list[EvaluationCase]:
    """Writes a test set that needs nothing else into `folder`; returns its cases with the pictures that lie there.

    Pictures have their digest for a name, so one that several cases use is there once. The bytes are those that were
    read, checked by their digest; one that was changed there is written anew.
    """
    frozen = []
    for case in cases:
        references = []
        for one in case.references:
            path = folder / PICTURES_NAME / f"{one.sha256}{one.path.suffix.lower()}"
            if not path.exists() or _sha256(path.read_bytes()) != one.sha256:
                content = one.path.read_bytes()
                if _sha256(content) != one.sha256:
                    raise ConfigError(f"{one.path} was changed while the test set was made: run the command again")
                write_bytes(path, content)
            references.append(replace(one, path=path))
        target = case.target
        if target is not None:
            target = folder / TARGETS_NAME / f"{case.id}{case.target.suffix.lower()}"  # type: ignore[union-attr]
            if target != case.target and not (target.exists() and filecmp.cmp(target, case.target, shallow=False)):  # type: ignore[arg-type]
                write_bytes(target, case.target.read_bytes())  # type: ignore[union-attr]
        frozen.append(EvaluationCase(case.id, case.split, case.prompt, tuple(references), case.source, target))
    with atomic_file(folder / CASES_NAME) as aside:
        aside.write_text("".join(json.dumps(to_item(case, folder), ensure_ascii=False) + "\n" for case in frozen))
    return frozen


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def to_item(case: EvaluationCase, folder: Path) -> dict[str, Any]:
    """A line of a JSONL file in `folder`, as the release's own code reads it too."""
    references = case.references
    item: dict[str, Any] = {
        "id": case.id,
        "split": case.split,
        "prompts": case.prompt,
        "seg_meta": [{"seg_file": [str(one.path.relative_to(folder)) for one in references]}],
        "domain_code": [DOMAINS[one.domain] if one.domain >= 0 else None for one in references],
        "subjects": [one.subject for one in references],
        "labels": [one.label for one in references],
        "edit_prompts": [one.edit_prompt for one in references],
        "sha256": [one.sha256 for one in references],
        "source": case.source,
    }
    return item | ({} if case.target is None else {"target": str(case.target.relative_to(folder))})
