"""The sample audit: what was planned against what was trained on, from the lines that every rank left."""

from collections import Counter
from dataclasses import dataclass

from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import Journal


@dataclass(frozen=True)
class SampleAudit:
    """What was planned against what was trained on, over all stages and attempts."""

    planned: int
    trained: int
    lost: int
    repeated: int
    recomputed: int
    """Samples that were trained on a second time because a step was done again after a restore."""
    skipped: int
    """Samples of steps that were left out after a rollback: consumed, but not trained on."""
    substituted: int
    """Samples that could not be read, in whose place, in the same step, the plan's substitutes were trained on."""


def audit_samples(config: RunConfig) -> SampleAudit:
    """Compares the consumed samples, step by step, with the step plan."""
    from domainshuttle.platform.run.data import make_feed  # imports Ray and torch, which readers of lines do not need

    run = Run(config)
    planned = trained = lost = repeated = recomputed = skipped = substituted = 0
    for segment in run.segments():
        feed = make_feed(config, segment, run.order_version(segment.name))
        index, plan = feed.index(), feed.plan()
        consumed, again = read_consumed(run, segment.name)
        recomputed += again
        by_step: dict[int, Counter[str]] = {}
        replaced: dict[int, list[tuple[str, str]]] = {}
        for (step, _, _), part in consumed.items():
            by_step.setdefault(step, Counter()).update(part.samples)
            replaced.setdefault(step, []).extend(part.replaced)
            skipped += len(part.samples) if part.skipped else 0
        for step in range(segment.last_step):
            rows = index.rows(plan[step].rows)
            wanted = Counter(f"{row.source}/{row.key}" for row in rows)
            found = by_step.get(step, Counter())
            planned += wanted.total()
            trained += found.total()
            for sample, substitute in replaced.get(step, ()):
                wanted[sample] -= 1
                wanted[substitute] += 1
                substituted += 1
            lost += (wanted - found).total()
            repeated += (found - wanted).total()
    return SampleAudit(planned, trained - skipped, lost, repeated, recomputed, skipped, substituted)


@dataclass(frozen=True)
class Consumed:
    """The samples of one micro-batch as a rank trained on them, or passed them over."""

    samples: list[str]
    skipped: bool
    replaced: list[tuple[str, str]]
    """Planned samples that could not be read, and what stood in their places."""


def read_consumed(run: Run, segment: str) -> tuple[dict[tuple[int, int, int], Consumed], int]:
    """The surviving history, (step, part, rank) to samples, and the number of samples that were trained on again.

    A step that was trained again after a restore, perhaps by another number of workers, counts as the last attempt at
    it did it.
    """
    lines: dict[tuple[tuple[int, int, int], int], Consumed] = {}  # one may be in a file twice
    newest: dict[int, int] = {}
    for path in sorted((run.folder / "consumed").glob(f"{segment}.rank*.jsonl")):
        rank = int(path.stem.rsplit("rank", 1)[1])
        for line in Journal(path).read()[0]:
            step, attempt = line["step"], line["attempt"]
            replaced = [(planned, found) for planned, found in line.get("replaced", ())]
            part = Consumed(line["samples"], line.get("passed_over", False), replaced)
            lines[(step, line["part"], rank), attempt] = part
            newest[step] = max(newest.get(step, attempt), attempt)
    surviving = {place: found for (place, attempt), found in lines.items() if attempt == newest[place[0]]}
    again = sum(len(found.samples) for (place, attempt), found in lines.items() if attempt != newest[place[0]])
    return surviving, again
