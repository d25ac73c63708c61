"""Does a generated clip show its own subject? A retrieval test on identities that training never saw.

Each held-out sample is generated from its caption and one reference picture. The clip is then compared with the
reference pictures of all samples of its group: it hits when its own is the closest. The same noise and captions with
the references of another subject of the group are the control, and chance is one in the group's size.

Clips and pictures are compared by their hues (`metrics/hues.py`).
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.table import Table

from domainshuttle.model.domains import DOMAINS
from domainshuttle.model.generation import DomainShuttlePipeline
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.media.decode import Pixels
from domainshuttle.pipelines.storage.uri import join
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import console, progress
from domainshuttle.platform.evaluation.metrics.hues import describe
from domainshuttle.platform.generation.cases import Case, generate_cases, load_cases
from domainshuttle.platform.generation.generate import load_pipeline
from domainshuttle.platform.generation.grid import GridRow, write_grid
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.tracking.mlflow import RunIds, Tracker


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


def evaluate_identity(
    pipeline: DomainShuttlePipeline, cases: list[Case], candidates: int, steps: int, guidance: float, seed: int
) -> tuple[IdentityResult, list[Pixels], list[Pixels]]:
    """Generates all cases with their own and with another subject's reference; returns the result and both clips."""
    group_start = [number // candidates * candidates for number in range(len(cases))]
    # half a group further on: another subject of the same group
    other = [s + (n - s + candidates // 2) % candidates for n, s in enumerate(group_start)]
    swapped = [replace(case, references=cases[number].references) for case, number in zip(cases, other, strict=True)]
    targets = [case.target for case in cases if case.target is not None]
    frames, height, width, _ = targets[0].shape
    with progress("Generating", "steps") as show:
        own, control = (
            generate_cases(
                pipeline, chosen, (frames, height, width), steps, guidance, seed,
                lambda step, before=before: show(before + step, 2 * steps),  # type: ignore[misc]
            )
            for chosen, before in ((cases, 0), (swapped, steps))
        )  # fmt: skip
    references = [case.references[0] for case in cases]
    hits = hit_rate(own, references, candidates)
    by_domain = {
        name: float(np.mean([hit for hit, case in zip(hits, cases, strict=True) if case.domain == name]))
        for name in DOMAINS
        if any(case.domain == name for case in cases)
    }
    result = IdentityResult(
        clips=len(cases),
        candidates=candidates,
        own=float(np.mean(hits)),
        other=float(np.mean(hit_rate(control, references, candidates))),
        target=float(np.mean(hit_rate(targets, references, candidates))),
        chance=1 / candidates,
        by_domain=by_domain,
    )
    return result, own, control


def evaluate_run(run: Run, model: Path, out: Path) -> IdentityResult:
    """Evaluates an exported model on the run's held-out corpus; writes table, grid and clips, also to MLflow."""
    config = run.config
    section = config.evaluation
    if section is None:
        raise ConfigError(f"run {config.name!r} has no `evaluation` section: name its held-out corpus there")
    folder = config.corpus(section.corpus, "raw").folder
    cases = load_cases(Index.load(join(folder, INDEX_NAME)), section.candidates * section.groups)
    sampling = config.generation
    result, own, control = evaluate_identity(
        load_pipeline(model), cases, section.candidates, sampling.steps, sampling.guidance, config.seed
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "identity.json").write_text(json.dumps({**asdict(result), "learned": result.learned}, indent=2))
    rows = [
        GridRow(case.caption, case.domain, case.references, clip, case.target, other)
        for case, clip, other in zip(cases, own, control, strict=True)
    ]
    grid = write_grid(_varied(rows, 8), out, sampling.fps)
    print_result(result)
    _track(run, result, [out / "identity.json", *grid])
    console.print(f"Grid: {' and '.join(map(str, grid))}; table: {out / 'identity.json'}")
    return result


def print_result(result: IdentityResult) -> None:
    """Prints the table of the result."""
    table = Table(title=f"Own subject closest among {result.candidates}, {result.clips} clips of held-out identities")
    table.add_column("clips from")
    table.add_column("hits", justify="right")
    for name, value in (
        ("their own reference", result.own),
        ("another subject's reference", result.other),
        ("chance", result.chance),
        ("the real clips (what the descriptor can reach)", result.target),
    ):
        table.add_row(name, f"{value:.1%}")
    console.print(table)
    console.print("By domain: " + ", ".join(f"{name} {value:.0%}" for name, value in result.by_domain.items()))


def _varied(rows: list[GridRow], count: int) -> list[GridRow]:
    """Rows in turn from each domain, so that the grid shows all of them."""
    queues = {name: [row for row in rows if row.domain == name] for name in DOMAINS}
    chosen: list[GridRow] = []
    while len(chosen) < min(count, len(rows)):
        for queue in queues.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen


def _track(run: Run, result: IdentityResult, files: list[Path]) -> None:
    """Logs the result to the run of the last stage."""
    saved = run.read_ids()
    if saved is None:
        return
    last = run.segments()[-1]
    tracker = Tracker(RunIds.from_dict(saved, run.config.tracking_uri), run.spool)
    values = {"own": result.own, "other": result.other, "chance": result.chance, "target": result.target}
    tracker.log(
        {f"evaluation/identity_{name}": value for name, value in values.items()},
        last.stage.duration.planned_steps,
        last.name,
    )
    for path in files:
        tracker.artifact(path.absolute(), "evaluation", last.name)
