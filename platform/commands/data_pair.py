"""`data pair`: cross pairs of corpora, with progress and an end line."""

import time
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
from domainshuttle.platform.config.schema import PAIRED, ConfigError, CorporaConfig, RunConfig
from domainshuttle.platform.console import console, progress

_REJECTED = "candidates rejected: "


def pair_corpora(
    config: RunConfig | CorporaConfig, only: list[str] | None = None, most_bad: float = MOST_BAD_IN_CORPUS
) -> None:
    """Makes the cross pairs of a configuration's corpora on the connected Ray cluster."""
    names = chosen_corpora(config, only)
    asked = [name for name in names if config.corpora[name].pair is not None]
    if not asked:
        raise ConfigError(
            f"none of {names} has a `pair` section: it names the folders of the models, as docs/datasets.md shows"
        )
    for name in asked:
        raw = config.built(name)
        if not exists(raw.index):
            raise DataError(
                f"corpus {name!r} is not built: {redacted(raw.index)} is missing. Run: domainshuttle data build CONFIG"
            )
    for name in asked:
        pair = config.corpora[name].pair
        assert pair is not None
        folder = require_local(config.corpus(name, "raw").folder, f"pairing {name}")
        _pair(config.built(name), folder, pair, most_bad)
    if left := [name for name in names if name not in asked]:
        console.print(f"No `pair` section, left as they were built: {escape(', '.join(left))}")
    console.print("Next: domainshuttle data encode (the same configuration)")


def pair_folder(index: str, pair: PairConfig, to: Path | None, most_bad: float = MOST_BAD_IN_CORPUS) -> None:
    """Makes the cross pairs of the raw corpus in a folder, on the connected Ray cluster, in `to` or beside it."""
    place = index_location(index)
    metadata = read_metadata(place)
    if metadata.stage != "raw":
        raise DataError(f"{redacted(place)} is of encoded samples: pairs are made of the raw corpus")
    raw = CorpusSpec(metadata.corpus, "raw", str(parent(place)), (), metadata.fps)
    folder = to if to is not None else require_local(parent(place), "pairing").parent / PAIRED
    folder = local_path(absolute(str(folder)))
    if str(folder) == raw.folder:
        raise ConfigError(f"--to {folder} is the corpus itself: give another folder")
    _pair(raw, folder, pair, most_bad)
    console.print(
        "Next: domainshuttle data encode CONFIG, in which the corpus has a `pair` section, or its folder DATA/NAME/raw "
        "is this one"
    )


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
    console.print(
        f"  boxes, masks and crops to look at: domainshuttle data inspect {folder} --page pairs.html", markup=False
    )


def _print_outcome(report: dict[str, Any]) -> None:
    notes: dict[str, int] = dict(report["notes"])
    pairs, without = notes.pop("pairs", 0), notes.pop("samples without a pair", 0)
    console.print(f"  {pairs} pictures added to subjects; {without} of {report['samples']} samples have no pair")
    rejected = {name.removeprefix(_REJECTED): count for name, count in notes.items() if name.startswith(_REJECTED)}
    print_counts("candidates rejected", rejected)
    for name, count in notes.items():
        if not name.startswith(_REJECTED):
            console.print(f"  {count} {name}", markup=False)
