"""Builds a corpus: records of any source become raw shards and an index, on Ray tasks, in parts that survive a stop.

A source is surveyed piece by piece, records are drawn from what was found, and each part makes the samples of some of
them. What is finished stays: the same command, run again after any stop, makes what is missing, and the corpus has the
bytes that it would have had without the stop.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainshuttle.pipelines.buckets import Bucket, choose_bucket, frames_at
from domainshuttle.pipelines.corpora.registry import CorpusConfig, make_source
from domainshuttle.pipelines.corpora.source import SAMPLES, LeftOut, Notes
from domainshuttle.pipelines.corpora.survey import Rows, Survey, check_forms, open_survey
from domainshuttle.pipelines.errors import DataError, StorageError, counted
from domainshuttle.pipelines.index.parts import REPORT_NAME, WORK_NAME, Parts
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow
from domainshuttle.pipelines.media.conversions import noted_conversions
from domainshuttle.pipelines.quarantine import MOST_BAD_IN_CORPUS, BadSample
from domainshuttle.pipelines.ray_tasks import Progress, each_result
from domainshuttle.pipelines.sample import safe_key
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.storage.files import write_bytes

_RECIPE_VERSION = 3
"""Of what builders make of the same configuration and files; a change makes all corpora anew."""


_REPAIR = (
    "Where files are missing, complete the download and extract its archives, or name only the descriptions of the "
    "part that you have; else change the corpus's `build` or `buckets`. Then run the command again"
)
UNCAPTIONED = "samples without a caption"
"""What the report calls samples that were kept for `data label`."""


@dataclass(frozen=True)
class PartJob:
    """What the parts of a corpus have in common."""

    corpus: str
    config: CorpusConfig
    survey: Survey
    buckets: Sequence[Bucket]
    shard_bytes: int
    fps: float | None = None

    @property
    def metadata(self) -> IndexMetadata:
        return IndexMetadata(corpus=self.corpus, stage="raw", fps=self.fps)


@dataclass(frozen=True)
class Built:
    """A corpus that is whole: what its index says of itself, and the report of how it came about."""

    metadata: IndexMetadata
    report: dict[str, Any]

    @property
    def bad(self) -> int:
        """Samples in quarantine."""
        return int(self.report["in_quarantine"])


def build_part(parts: Parts, part: int, job: PartJob, rows: Rows) -> tuple[int, int]:
    """Makes one part of a raw corpus of these records; returns how many samples it has and how many went to
    quarantine."""
    source, notes = make_source(job.config, job.corpus), Notes()
    bad: list[BadSample] = []
    infos, came = {}, 0
    with (
        ShardWriter(parts.folder, parts.prefix(part), job.shard_bytes) as writer,
        noted_conversions() as converted,  # files that keep their bytes are not converted here
    ):
        for sample in source.make([*job.survey.records(rows)], job.survey, notes):
            came += 1
            for one in converted:
                notes.add(f"cut out, {one}")
            converted.clear()
            if isinstance(sample, LeftOut):
                bad.append(BadSample(job.corpus, "", safe_key(sample.id), sample.reason))
                continue
            try:
                frames = frames_at(sample.info.frames, sample.info.fps, job.fps)
                bucket = choose_bucket(frames, *sample.info.size, job.buckets)
            except DataError as error:
                bad.append(BadSample(sample.info.source, "", sample.key, f"no bucket: {error}"))
                continue
            if not sample.info.caption:
                notes.add(UNCAPTIONED)
            writer.write(sample.key, sample.members())
            infos[sample.key] = sample.info, bucket
    if came != len(rows):
        raise DataError(
            f"{job.corpus}, part {part}: {came} of {counted(len(rows), 'record')} came: the source changed; build again"
        )
    parts.note(part, notes.counts)
    return parts.finish(part, [IndexRow.of(entry, *infos[entry.key]) for entry in writer.entries], bad, job.metadata)


def build_corpus(
    corpus: str,
    config: CorpusConfig,
    buckets: list[Bucket],
    folder: Path,
    progress: Progress,
    samples_per_part: int = 128,
    shard_bytes: int = 256 << 20,
    fps: float | None = None,
    most_bad: float = MOST_BAD_IN_CORPUS,
    surveying: Progress = lambda done, total: None,
) -> Built:
    """Builds what is missing of a raw corpus on the Ray cluster that is connected, its index and its report.

    `fps` is the rate at which clips will be sampled, by which buckets are chosen (None: each clip's own); `surveying`
    is told of the pieces of the source that were surveyed. Raises DataError for a source that is not as it should be,
    of which nothing can be selected, and when more than `most_bad` of the samples are bad.
    """
    source = make_source(config, corpus)
    recipe = f"{_RECIPE_VERSION} {_decisive(config)}"
    survey = open_survey(folder / WORK_NAME, source, recipe)
    left = survey.missing()
    surveying(len(survey.pieces) - len(left), len(survey.pieces))
    for done, (piece, result) in enumerate(
        each_result(_survey_piece, [(survey, number, config, corpus) for number in left]), 1
    ):
        if isinstance(result, Exception):
            raise _died(f"the survey of {survey.pieces[piece[1]].name}", result)
        surveying(len(survey.pieces) - len(left) + done, len(survey.pieces))
    tally = survey.tally()
    rows, found, repeated = survey.select(source.wanted)
    check_forms(tally, found, most_bad)
    tally.join(repeated)
    if not len(rows):
        kinds = ", ".join(f"{kind} {count}" for kind, count in tally.counts.most_common()) or "it has no records"
        raise DataError(f"corpus {corpus}: its source has nothing to select: {kinds}{keep_hint(tally.counts)}")
    survey.write_tables()

    cut = parts_of(rows, samples_per_part, {n for n, piece in enumerate(survey.pieces) if piece.in_order})
    parts = Parts(folder, len(cut), f"{recipe} {survey.folder.name} {[str(bucket) for bucket in buckets]} {fps}")
    parts.begin()
    job = PartJob(corpus, config, survey, buckets, shard_bytes, fps)
    missing = parts.missing()
    done = len(rows) - sum(len(cut[part]) for part in missing)
    progress(done, len(rows))
    for work, result in each_result(build_part, [(parts, part, job, cut[part]) for part in missing]):
        if isinstance(result, Exception):
            raise _died(f"part {work[1]} of {corpus}", result)
        done += len(work[3])
        progress(done, len(rows))
    metadata, bad = parts.merge(job.metadata, most_bad, _REPAIR)
    notes = parts.notes()
    for role in sorted({piece.role for piece in survey.pieces} - {SAMPLES}):
        for kind, count in survey.tally(role).counts.items():
            notes[f"{role} left out: {kind}"] += count
    report = {
        "corpus": corpus,
        "build": config.model_dump(mode="json"),
        "records": found + tally.counts.total(),
        "left_out": dict(tally.counts.most_common()),
        "wanted": source.wanted,
        "selected": len(rows),
        "not_drawn": found - len(rows),
        "samples": len(rows) - bad,
        "in_quarantine": bad,
        "notes": dict(notes.most_common()),
        "examples": tally.examples,
        "digest": metadata.digest,
    }
    write_bytes(folder / REPORT_NAME, json.dumps(report, indent=1, ensure_ascii=False).encode())
    return Built(metadata, report)


def keep_hint(left_out: Mapping[str, int]) -> str:
    """What can be done about records that were left out for want of a caption; '' where none were."""
    if not any(kind in left_out for kind in ("empty caption", "empty instruction")):
        return ""
    return ". Records without a caption are kept for `data label` with `empty_captions: keep` in the corpus's `build`"


def _decisive(config: CorpusConfig) -> str:
    """What of a source's settings decides what is built. What was added to them counts where it is used, so that
    corpora of before need not be built again."""
    content = config.model_dump(exclude={"folder"}, mode="json")
    if content.get("empty_captions") == "leave_out":
        del content["empty_captions"]
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def _survey_piece(survey: Survey, number: int, config: CorpusConfig, corpus: str) -> int:
    return survey.take(number, make_source(config, corpus))


def parts_of(rows: Rows, samples_per_part: int, in_order: set[int]) -> list[Rows]:
    """The rows of each part: all of a piece that is read in order; of the others so many."""
    parts: list[Rows] = []
    free: list[Rows] = []
    for piece in np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1):
        if len(piece):
            (parts if int(piece[0, 0]) in in_order else free).append(piece)
    if free:
        joined = np.concatenate(free)
        parts += [joined[start : start + samples_per_part] for start in range(0, len(joined), samples_per_part)]
    return parts


def _died(what: str, error: Exception) -> StorageError:
    return StorageError(
        f"{what}: its worker died each time it was tried: {error}. The node's memory may be too small; what is "
        "finished stays: run the command again"
    )
