"""`data pair`: cross pairs of corpora, with progress and an end line."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from domainshuttle.cluster.local import quiet_ray
from domainshuttle.pipelines.curation.pairs.config import PairConfig, PairPool, fit_pools
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import read_metadata
from domainshuttle.pipelines.quarantine import MOST_BAD_IN_CORPUS
from domainshuttle.pipelines.storage.files import exists
from domainshuttle.pipelines.storage.uri import absolute, local_path, parent, redacted, require_local
from domainshuttle.platform.commands.corpus_lock import being_made
from domainshuttle.platform.commands.data import chosen_corpora, report_corpus
from domainshuttle.platform.commands.data_index import index_location, print_counts
from domainshuttle.platform.commands.labels import print_kept_labels
from domainshuttle.platform.config.schema import PAIRED, ConfigError, CorporaConfig, RunConfig
from domainshuttle.platform.console import console, progress

_REJECTED = "candidates rejected: "


@dataclass(frozen=True)
class PairJob:
    """A raw corpus, and the folder of its pairs."""

    raw: CorpusSpec
    folder: Path
    pair: PairConfig
    following: str
    """What to do next."""


def configured_jobs(config: RunConfig | CorporaConfig, only: list[str] | None = None) -> list[PairJob]:
    """The corpora of a configuration that say how they are paired. Raises what is wrong before work starts."""
    names = chosen_corpora(config, only)
    jobs = []
    for name in names:
        raw, pair = config.built(name), config.corpora[name].pair
        if pair is None:
            continue
        if not exists(raw.index):
            raise DataError(
                f"corpus {name!r} is not built: {redacted(raw.index)} is missing. Run: domainshuttle data build CONFIG"
            )
        folder = require_local(config.corpus(name, "raw").folder, f"pairing {name}")
        jobs.append(PairJob(raw, folder, pair, "domainshuttle data encode (the same configuration)"))
    if not jobs:
        raise ConfigError(
            f"none of {names} has a `pair` section: it names the folders of the models, as docs/datasets.md shows"
        )
    _check(jobs)
    return jobs


def folder_job(index: str, pair: PairConfig, to: Path | None) -> PairJob:
    """The raw corpus in a folder, whose pairs go to `to` or beside it. Raises what is wrong before work starts."""
    place = index_location(index)
    metadata = read_metadata(place)
    if metadata.stage != "raw":
        raise DataError(f"{redacted(place)} is of encoded samples: pairs are made of the raw corpus")
    raw = CorpusSpec(metadata.corpus, "raw", str(parent(place)), (), metadata.fps)
    folder = to if to is not None else require_local(parent(place), "pairing").parent / PAIRED
    folder = local_path(absolute(str(folder)))
    if str(folder) == raw.folder:
        raise ConfigError(f"--to {folder} is the corpus itself: give another folder")
    following = (
        "domainshuttle data encode CONFIG, in which the corpus has a `pair` section, or its DATA/NAME/raw is this "
        "folder"
    )
    job = PairJob(raw, folder, pair, following)
    _check([job])
    return job


def _check(jobs: Sequence[PairJob]) -> None:
    for job in jobs:
        job.pair.models.check()
        if job.pair.quality is not None:
            job.pair.quality.key()


def pair_corpora(jobs: Sequence[PairJob], most_bad: float = MOST_BAD_IN_CORPUS) -> None:
    """Makes the cross pairs of corpora on the connected Ray cluster."""
    for job in jobs:
        _pair(job.raw, job.folder, job.pair, most_bad)
    console.print(f"Next: {jobs[-1].following}", markup=False)


def _pair(raw: CorpusSpec, folder: Path, pair: PairConfig, most_bad: float) -> None:
    import ray

    from domainshuttle.pipelines.curation.pairs.stage import pair_corpus  # brings torch

    quiet_ray()  # again: its data library sets its own levels when it is imported
    began = time.monotonic()
    steps: dict[str, PairPool] = {"decode": pair.decode, "find": pair.find, "embed": pair.embed, "choose": pair.choose}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finding = fit_pools({name: steps[name] for name in ("decode", "find", "embed")}, nodes)
    pools = {**finding, **fit_pools({"choose": steps["choose"]}, nodes)}
    actors = ", ".join(
        f"{name} {pool.actors} of {pool.cpus:g} CPUs and {pool.gpus:g} GPUs" for name, pool in pools.items()
    )
    console.print(f"Pairing [bold]{escape(raw.name)}[/] with actors: {actors}")
    with (
        being_made(folder),
        progress(f"Looking for the subjects of {raw.name}", "samples") as looking,
        progress(f"Choosing pairs of {raw.name}", "samples") as choosing,
    ):
        made = pair_corpus(raw, folder, pair, pools, looking, choosing, most_bad)
    report_corpus("Paired", raw.name, folder, made.metadata.digest, made.bad, began)
    _print_outcome(made.report)
    print_kept_labels(folder)
    command = f"domainshuttle data inspect {shlex.quote(str(folder))} --page pairs.html"
    console.print(f"  boxes, masks and crops to look at: {command}", markup=False)


def _print_outcome(report: dict[str, Any]) -> None:
    notes: dict[str, int] = dict(report["notes"])
    pairs, without = notes.pop("pairs", 0), notes.pop("samples without a pair", 0)
    console.print(f"  {pairs} pictures added to subjects; {without} of {report['samples']} samples have no pair")
    rejected = {name.removeprefix(_REJECTED): count for name, count in notes.items() if name.startswith(_REJECTED)}
    print_counts("candidates rejected", rejected)
    for name, count in notes.items():
        if not name.startswith(_REJECTED):
            console.print(f"  {count} {name}", markup=False)
