"""The labelling stage: captions, subjects' words and domains of a raw corpus that is built.

Its result is not another corpus. A new caption is a few hundred bytes, and the clip beside it megabytes, so labels lie
apart (`index/labels.py`) and the corpus's index names them: no clip is copied, and whoever reads samples by the index,
encoding first of all, has the labels. The shards stay as they were built, and removing `labels/` and indexing again
gives the corpus without them.

Samples that may need labels are cut into units of one shard each, whose names have a digest of all that decides their
labels: the samples' ids and checksums, and the settings. So a kill loses no unit, an unbroken run has the same bytes,
and when the corpus grows only units of new or changed samples are made. In such a unit what was asked before is not
asked again, as answers are kept by the content of the question.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from domainshuttle.pipelines.corpora.words import WORDS_DIGEST
from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.curation.labels.labellers import SAMPLES_PER_UNIT, steps_of
from domainshuttle.pipelines.curation.labels.questions import PROMPT
from domainshuttle.pipelines.curation.labels.rules import may_need, state_name
from domainshuttle.pipelines.curation.stage import Passing, pass_through
from domainshuttle.pipelines.endpoints.answers import Answers
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.index.folder import BUILT_INDEX_NAME
from domainshuttle.pipelines.index.labels import (
    FAILED_PLACE,
    REPORT_PLACE,
    LabelNote,
    built_index,
    labelled_row,
    put_labels,
    read_label_notes,
    read_label_report,
    remove_other_labels,
    write_label_note,
)
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, IndexMetadata, IndexRow
from domainshuttle.pipelines.quarantine import fault_kind
from domainshuttle.pipelines.sample import LABELS_MEMBER, LabelState
from domainshuttle.pipelines.shards.tar import LABELS_FOLDER, Member, ShardWriter
from domainshuttle.pipelines.storage.files import write_bytes, write_file
from domainshuttle.pipelines.storage.uri import Location, is_remote, join, local_path, redacted

_RULES = 2
"""Of what labels make of the same answers; a change makes all labels anew, without asking again."""
_SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class LabelledCorpus:
    """A corpus whose index has its labels. `report` is what lies in `labels/report.json`; `made` of its samples were
    looked at now, the others had labels that hold."""

    metadata: IndexMetadata
    report: dict[str, Any]
    made: int


@dataclass(frozen=True)
class _Unit:
    """Samples of one shard that are labelled together: their numbers in the index without labels."""

    name: str
    rows: np.ndarray


@dataclass(frozen=True)
class _Built(CorpusSpec):
    """A raw corpus as it is without labels."""

    @property
    def index(self) -> str:
        return join(self.folder, BUILT_INDEX_NAME)


@dataclass(frozen=True)
class _LabelJob:
    """What an actor needs to read and write units."""

    corpus: str
    place: str
    units: Sequence[_Unit]
    settings: str

    @property
    def raw(self) -> CorpusSpec:
        return _Built(self.corpus, "raw", self.place)

    @property
    def folder(self) -> Path:
        return Path(redacted(self.place))

    def rows(self, index: Index, part: int) -> list[IndexRow]:
        return [replace(row, folder=self.place) for row in index.rows(self.units[part].rows)]

    def write(self, part: int, passing: Passing) -> int:
        unit, made = self.units[part], []
        works = {work.row.key: work for _, work in passing.works if work.carried.get("labelled")}
        with _writing(self.place) as place, ShardWriter(place, unit.name, _SHARD_BYTES) as writer:
            for key, work in works.items():
                writer.write(key, {LABELS_MEMBER: work.info.to_json()})
            writer.finish()
            for shard in writer.shards if is_remote(self.place) else ():
                write_file(place / shard, join(self.place, f"{LABELS_FOLDER}/{shard}"))
        for entry in writer.entries:
            (written,) = entry.members
            work = works[entry.key]
            member = Member(LABELS_MEMBER, written.offset, written.size, f"{LABELS_FOLDER}/{entry.shard}")
            made.append((work.row, labelled_row(work.row, work.info, member), work.trace))
        failed = [{"key": bad.key, "reason": bad.reason} for _, bad, _ in passing.out]
        failed += [
            {"key": work.row.key, "reason": why} for _, work in passing.works if (why := work.trace.get("failed"))
        ]
        write_label_note(self.place, unit.name, self.settings, made, passing.notes, failed)
        return len(passing.works) + len(passing.out)


@contextmanager
def _writing(folder: str) -> Iterator[Path]:
    """Where the shards of labels are written: in their folder, or for a store beside, from where they are uploaded."""
    if not is_remote(folder):
        yield local_path(join(folder, LABELS_FOLDER))
        return
    with tempfile.TemporaryDirectory(prefix="domainshuttle-") as aside:
        yield Path(aside)


def label_corpus(
    folder: Location,
    config: LabelConfig,
    nodes: Sequence[Mapping[str, float]],
    progress: Callable[..., None],
    ask_again: bool = False,
) -> LabelledCorpus:
    """Labels what is not labelled of the raw corpus in a folder, on the Ray cluster that is connected, and puts the
    labels into its index. `nodes` are the cluster's, by their resources as Ray names them. `progress` is told of
    samples done, of all. `ask_again`: also what was refused or answered badly before.

    Raises DataError where there is no raw corpus, a model's folder can't be used, or more than `most_failed` of the
    answers are none; EndpointError and CostLimitError as `ChatClient.ask` does: what is finished stays, and what was
    answered is kept.
    """
    answers = answers_folder(folder, config)
    built = built_index(folder)
    settings = _settings_digest(config)
    units = _cut_units(built, config, settings)
    notes = read_label_notes(folder, [unit.name for unit in units])
    if ask_again:
        Answers(Path(answers)).forget(_NO_ANSWER)
        notes = {name: note for name, note in notes.items() if not _kinds(note) & {*map(state_name, _NO_ANSWER)}}
    missing = [number for number, unit in enumerate(units) if unit.name not in notes]
    total = sum(len(unit.rows) for unit in units)
    made = sum(len(units[number].rows) for number in missing)
    done = total - made
    progress(done, total)
    if missing:
        job = _LabelJob(built.parts[0].corpus, str(folder), units, settings)
        for finished in pass_through(job, missing, steps_of(config, answers, nodes)):
            done += finished
            progress(done, total)
        notes = read_label_notes(folder, [unit.name for unit in units])
    if lost := [unit.name for unit in units if unit.name not in notes]:
        raise DataError(f"{redacted(folder)}: {counted(len(lost), 'unit')} of labels not whole; run the command again")
    ordered = [notes[unit.name] for unit in units]
    metadata, labelled = put_labels(folder, built, ordered, settings)
    report = _report(built, config, settings, ordered, total, labelled, metadata)
    failed = [one for note in ordered for one in note.failed]
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in failed)
    write_bytes(join(folder, FAILED_PLACE), lines.encode())
    write_bytes(join(folder, REPORT_PLACE), json.dumps(report, indent=1, ensure_ascii=False).encode())
    remove_other_labels(folder, notes)
    return LabelledCorpus(metadata, report, made)


@dataclass(frozen=True)
class KeptLabels:
    """Labels that an index has again after the corpus was built or indexed again."""

    metadata: IndexMetadata
    labelled: int
    without: int
    """Samples that may need labels and have none."""


def keep_labels(folder: Location) -> KeptLabels:
    """Puts the labels of a raw corpus that was labelled into its index again, after that was made again without them.
    Labels of samples that changed are left out."""
    report = read_label_report(folder)
    config, built = LabelConfig.model_validate(report["settings"]), built_index(folder)
    notes = [note for note in read_label_notes(folder).values() if note.settings == report["settings_digest"]]
    metadata, labelled = put_labels(folder, built, notes, report["settings_digest"])
    units = {unit.name: unit for unit in _cut_units(built, config, report["settings_digest"])}
    without = sum(len(unit.rows) for name, unit in units.items() if name not in {note.name for note in notes})
    return KeptLabels(metadata, labelled, without)


_NO_ANSWER: tuple[LabelState, ...] = ("refused", "bad_answer")


def _kinds(note: LabelNote) -> set[str]:
    return {fault_kind(one["reason"]) for one in note.failed}


def answers_folder(folder: Location, config: LabelConfig) -> str:
    """Where answers are kept. Raises DataError where they can't be beside the corpus."""
    if config.answers is not None:
        return config.answers
    if is_remote(folder):
        raise DataError(
            f"{redacted(folder)} is in a store, in which answers can't be appended to: name a folder for them that all "
            "nodes see, --set labels.answers=FOLDER"
        )
    return str(local_path(join(folder, f"{LABELS_FOLDER}/answers")))


def _settings_digest(config: LabelConfig) -> str:
    """Of all settings that decide labels."""
    said: dict[str, Any] = {"rules": _RULES, "words": WORDS_DIGEST, "labeller": config.labeller}
    said |= {"values": sorted(config.values), "which": config.which}
    if config.labeller != "words":
        said |= {"prompt": PROMPT, "frames": config.frames, "side": config.side, "least_score": config.least_score}
    if config.labeller == "endpoint" and config.endpoint is not None:
        names = ("model", "answers", "answer_tokens", "temperature", "seed", "json_form")
        said |= config.endpoint.model_dump(include=set(names))
    if config.labeller == "transformers" and config.model is not None:
        from domainshuttle.pipelines.curation.model_folders import model_digest

        said |= {"model": model_digest(config.model, "labeller"), "answer_tokens": config.answer_tokens}
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()


def _cut_units(built: Index, config: LabelConfig, settings: str) -> list[_Unit]:
    """The units of the samples that may need labels, in the order of the index."""
    chosen = np.flatnonzero(may_need(config, built))
    if not len(chosen):
        return []
    codes, shards = built.codes("shard")
    ids, checksums = (built.table.column(name).to_numpy() for name in ("sample_id", "checksum"))
    units, counts = [], Counter[int]()
    for run in np.split(chosen, np.flatnonzero(np.diff(codes[chosen])) + 1):
        shard = int(codes[run[0]])
        stem = shards[shard].removesuffix(".tar")
        for start in range(0, len(run), SAMPLES_PER_UNIT):
            rows = run[start : start + SAMPLES_PER_UNIT]
            digest = hashlib.blake2b(f"{settings} {SAMPLES_PER_UNIT} {stem}".encode(), digest_size=6)
            digest.update(ids[rows].tobytes() + checksums[rows].tobytes())
            units.append(_Unit(f"{stem[:40]}-{counts[shard]:04d}-{digest.hexdigest()}", rows))
            counts[shard] += 1
    return units


def _report(
    built: Index,
    config: LabelConfig,
    settings: str,
    notes: Sequence[LabelNote],
    looked_at: int,
    labelled: int,
    metadata: IndexMetadata,
) -> dict[str, Any]:
    counts, reasons = Counter[str](), Counter[str]()
    for note in notes:
        counts.update(note.counts)
        reasons.update(fault_kind(one["reason"]) for one in note.failed)
    return {
        "corpus": metadata.corpus,
        "settings": config.model_dump(mode="json"),
        "settings_digest": settings,
        "from": built.digest,
        "samples": len(built),
        "looked_at": looked_at,
        "labelled": labelled,
        "values": dict(sorted(counts.items())),
        "failed": dict(reasons.most_common()),
        "digest": metadata.digest,
    }
