"""`data label`: captions, words and domains of raw corpora, with progress, an end line and what to do next."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from domainshuttle.cluster.local import quiet_ray
from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.index.labels import FAILED_PLACE, REPORT_PLACE, lost_labels
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.storage.files import exists
from domainshuttle.pipelines.storage.uri import Location, is_remote, join, local_path, redacted
from domainshuttle.platform.commands.corpus_lock import being_made
from domainshuttle.platform.console import console, progress


@dataclass(frozen=True)
class LabelJob:
    """A raw corpus to label: its name for messages, its folder, and what is to be said of the next step."""

    name: str
    folder: Location
    following: str


def label_corpora(jobs: Sequence[LabelJob], config: LabelConfig | None, ask_again: bool = False) -> None:
    """Labels raw corpora on the connected Ray cluster, one after the other; by word lists where nothing is said."""
    import ray

    from domainshuttle.pipelines.curation.labels.stage import label_corpus

    quiet_ray()  # again: its data library sets its own levels when it is imported
    for job in jobs:
        if not exists(join(job.folder, INDEX_NAME)):
            raise DataError(
                f"{redacted(job.folder)} has no {INDEX_NAME}: build the corpus (domainshuttle data build CONFIG), or "
                "index its shards (domainshuttle data index FOLDER)"
            )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for job in jobs:
        began = time.monotonic()
        with being_made(job.folder), progress(f"Labelling {job.name}", "samples") as show:
            labelled = label_corpus(job.folder, config or LabelConfig(), nodes, show, ask_again)
        _print_labelled(job, labelled.report, labelled.made, time.monotonic() - began)


def _print_labelled(job: LabelJob, report: dict[str, Any], made: int, seconds: float) -> None:
    who = {"words": "word lists", "endpoint": "an endpoint", "transformers": "a model"}[report["settings"]["labeller"]]
    console.print(
        f"Labelled [bold]{escape(job.name)}[/] by {who}: {report['labelled']} of {report['samples']} samples have "
        f"labels, {made} looked at now, index {report['digest'][:8]}, {seconds:.0f} s"
    )
    for what, count in report["values"].items():
        console.print(f"  {what}: {count}", markup=False)
    if report["failed"]:
        counted = ", ".join(f"{kind} {count}" for kind, count in report["failed"].items())
        console.print(
            f"  without a model's label, by reason: {counted}; each with its reason in "
            f"{redacted(join(job.folder, FAILED_PLACE))}. Ask again with: --ask-again",
            markup=False,
        )
    console.print(f"  counts and settings: {redacted(join(job.folder, REPORT_PLACE))}", markup=False)
    console.print(f"Next: {job.following}", markup=False)


def print_kept_labels(folder: Location) -> None:
    """Puts the labels that a corpus had into its new index, and says so; nothing where it had none."""
    if not lost_labels(folder):
        return
    from domainshuttle.pipelines.curation.labels.stage import keep_labels

    kept = keep_labels(folder)
    lacking = f", {kept.without} more may need some: domainshuttle data label does those alone" if kept.without else ""
    console.print(f"  labels kept: {counted(kept.labelled, 'sample')}{lacking}", markup=False)


def folder_job(folder: Location) -> LabelJob:
    """The job of a folder that is named by itself."""
    shown = redacted(folder)
    quoted = shown if is_remote(folder) else shlex.quote(str(local_path(folder)))
    return LabelJob(shown, folder, f"domainshuttle data inspect {quoted}, then data encode of its configuration")
