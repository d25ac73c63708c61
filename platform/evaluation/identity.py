"""Does a generated clip show its own subject? A retrieval test on identities that training never saw.

Each held-out sample is generated from its caption and one reference picture. The clip is then compared with the
reference pictures of all samples of its group: it hits when its own is the closest. The same noise and captions with
the references of another subject of the group are the control, and chance is one in the group's size. The descriptor is
that of the metric `hue_identity`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.media.decode import Pixels, decode_image
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.console import console
from domainshuttle.platform.evaluation.cases import EvaluationCase
from domainshuttle.platform.evaluation.metrics.hues import describe
from domainshuttle.platform.evaluation.metrics.metric import Video
from domainshuttle.platform.evaluation.videos import CONTROL_MARK, REAL, Clip
from domainshuttle.platform.generation.grid import GridRow, write_grid

__all__ = ["IdentityResult", "describe", "hit_rate", "measure_identity", "print_result", "read_identities"]


@dataclass(frozen=True)
class IdentityResult:
    """How often a clip was closest to its own subject's reference, among `candidates`, over `clips` clips."""

    clips: int
    candidates: int
    own: float
    other: float
    target: float
    """The real clips, by the same measure: what the descriptor can reach."""
    chance: float
    by_domain: dict[str, float]
    hits: dict[str, bool] = field(default_factory=dict)
    """By case: whether its own reference was the closest."""

    @property
    def learned(self) -> bool:
        """Whether `own` lies above chance and above `other` by more than three standard errors of each."""
        margins = [
            self.own - base > 3 * np.sqrt((base * (1 - base) + self.own * (1 - self.own)) / self.clips)
            for base in (self.chance, self.other)
        ]
        return all(margins)


def hit_rate(clips: list[Pixels], references: list[Pixels], group: int) -> list[bool]:
    """For each clip, whether its own reference (the same place) is the closest of its group of `group`."""
    found, wanted = [describe(clip) for clip in clips], [describe(picture[None]) for picture in references]
    hits = []
    for number, clip in enumerate(found):
        start = number // group * group
        similarity = [float(clip @ candidate) for candidate in wanted[start : start + group]]
        hits.append(int(np.argmax(similarity)) == number - start)
    return hits


def measure_identity(
    cases: list[EvaluationCase], clips: dict[str, list[Clip]], model: str, candidates: int, fps: float, out: Path
) -> tuple[IdentityResult, list[Path]] | None:
    """The test of a model with the control `other`, and its files: a grid of pictures, still and moving.

    `clips` are those of each column, in the order of the cases. Cases of which a clip or the reference is missing, or
    can't be decoded, are left out; None where there are no clips of the control, or no group is whole.
    """
    control = f"{model}{CONTROL_MARK}other"
    by_case = {name: {clip.case: clip for clip in found if not clip.repeat} for name, found in clips.items()}
    columns = [name for name in (model, control, REAL) if name in clips]
    if control not in clips:
        return None
    whole: list[EvaluationCase] = []
    frames: dict[str, list[Pixels]] = {name: [] for name in columns}
    references: list[Pixels] = []
    for case in sorted((case for case in cases if case.references), key=lambda case: case.id):
        there = [by_case[name][case.id] for name in columns]
        if any(clip.failure for clip in there):
            continue
        try:
            shown = [Video.read(clip.path).frames for clip in there]
            reference = decode_image(case.references[0].path.read_bytes(), case.id)
        except DataError:
            continue
        whole.append(case)
        references.append(reference)
        for name, one in zip(columns, shown, strict=True):
            frames[name].append(one)
    count = len(whole) // candidates * candidates
    whole, references = whole[:count], references[:count]
    frames = {name: shown[:count] for name, shown in frames.items()}
    if not whole:
        return None
    hits = {name: hit_rate(frames[name], references, candidates) for name in columns}
    by_domain = {
        name: float(np.mean([hit for hit, case in zip(hits[model], whole, strict=True) if case.domains == name]))
        for name in DOMAINS
        if any(case.domains == name for case in whole)
    }
    result = IdentityResult(
        clips=len(whole), candidates=candidates, own=float(np.mean(hits[model])),
        other=float(np.mean(hits[control])), target=float(np.mean(hits[REAL])) if REAL in hits else float("nan"),
        chance=1 / candidates, by_domain=by_domain,
        hits={case.id: hit for case, hit in zip(whole, hits[model], strict=True)},
    )  # fmt: skip
    targets: Sequence[Pixels | None] = frames.get(REAL, [None] * len(whole))
    rows = [
        GridRow(case.prompt, case.domains, [reference], own, target, other)
        for case, reference, own, target, other in zip(
            whole, references, frames[model], targets, frames[control], strict=True
        )
    ]
    return result, [*write_grid(_varied(rows, 8), out, fps)]


IDENTITY_NAME = "identity.json"


def write_identities(out: Path, found: Mapping[str, IdentityResult]) -> Path:
    """Writes the results by column, beside those of the last."""
    by_model = {name: {**asdict(one), "learned": one.learned} for name, one in found.items()}
    content = {**list(by_model.values())[-1], "models": by_model}
    write_bytes(out / IDENTITY_NAME, json.dumps(content, indent=2).encode())
    return out / IDENTITY_NAME


def read_identities(out: Path) -> dict[str, dict[str, Any]]:
    """The results of an evaluation's folder by column; none where the test was not made."""
    try:
        content = json.loads((out / IDENTITY_NAME).read_text())
        found: dict[str, dict[str, Any]] = content.get("models", {})
    except (OSError, ValueError):
        return {}
    return found


def print_result(name: str, result: IdentityResult) -> None:
    """Prints the table of a model's result."""
    clips = counted(result.clips, "clip")
    table = Table(title=f"{name}: own subject closest among {result.candidates}, {clips} of held-out identities")
    table.add_column("clips from")
    table.add_column("hits", justify="right")
    for name, value in (
        ("their own reference", result.own),
        ("another subject's reference", result.other),
        ("chance", result.chance),
        ("the real clips (what the descriptor can reach)", result.target),
    ):
        if value == value:
            table.add_row(name, f"{value:.1%}")
    console.print(table)
    console.print("By domain: " + ", ".join(f"{name} {value:.0%}" for name, value in result.by_domain.items()))


def _varied(rows: list[GridRow], count: int) -> list[GridRow]:
    """Rows in turn from each domain, so that the grid shows all of them."""
    queues: dict[str, list[GridRow]] = {}
    for row in rows:
        queues.setdefault(row.domain, []).append(row)
    chosen: list[GridRow] = []
    while len(chosen) < min(count, len(rows)):
        for queue in queues.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen
