"""The data verbs: what a configuration says of its corpora, carried out with progress and an end line."""

import contextlib
import shlex
import time
from pathlib import Path
from typing import Any

from rich.markup import escape

from domainshuttle.cluster.local import quiet_ray
from domainshuttle.pipelines.corpora.builder import REPORT_NAME, UNCAPTIONED, build_corpus, keep_hint
from domainshuttle.pipelines.corpora.registry import make_source
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.index.alterations import COLUMNS as ALTERATIONS
from domainshuttle.pipelines.index.folder import read_skipped
from domainshuttle.pipelines.index.labels import lost_labels
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.quarantine import MOST_BAD_IN_CORPUS
from domainshuttle.pipelines.storage.files import exists, list_dated
from domainshuttle.pipelines.storage.uri import Location, join, redacted, require_local
from domainshuttle.platform.commands.contact_sheet import draw_sheet
from domainshuttle.platform.commands.corpus_lock import being_made
from domainshuttle.platform.commands.data_index import (
    index_location,
    print_alterations,
    print_converted,
    print_quarantine,
    print_skipped,
    print_summary,
)
from domainshuttle.platform.commands.labels import LabelJob, label_corpora, print_kept_labels
from domainshuttle.platform.config.schema import ConfigError, CorporaConfig, RunConfig
from domainshuttle.platform.console import console, progress


def check_sources(config: RunConfig | CorporaConfig, only: list[str] | None = None) -> None:
    """Raises DataError for a source that is not laid out as it should be, such as a wrong folder or a download that is
    not complete."""
    for name in chosen_corpora(config, only):
        if (build := config.corpora[name].build) is not None:
            make_source(build, name).pieces()


def build_corpora(
    config: RunConfig | CorporaConfig, only: list[str] | None = None, most_bad: float = MOST_BAD_IN_CORPUS
) -> None:
    """Builds the raw corpora on the connected Ray cluster."""
    for name in chosen_corpora(config, only):
        raw, build = config.built(name), config.corpora[name].build
        folder = require_local(raw.folder, f"building {name}")
        if build is None:
            buckets = " ".join(f"--bucket {bucket}" for bucket in raw.buckets)
            rate = f" --fps {raw.fps:g}" if raw.fps else ""
            console.print(
                f"[bold]{name}[/] has no builder: its shards are your own. Index them with: domainshuttle data index "
                f"{escape(shlex.quote(str(folder)))} --corpus {name} {buckets}{rate}"
            )
            continue
        began = time.monotonic()
        with (
            being_made(folder),
            progress(f"Reading the records of {name}", "files") as surveying,
            progress(f"Building {name}", "samples") as show,
        ):
            built = build_corpus(
                name, build, [*raw.buckets], folder, show, fps=raw.fps, most_bad=most_bad, surveying=surveying
            )
        report_corpus("Built", name, folder, built.metadata.digest, built.bad, began)
        _print_left_out(built.report, folder)
        print_kept_labels(folder)
    if any(config.corpora[name].pair for name in chosen_corpora(config, only)):
        console.print("Next: domainshuttle data label, or data pair (the same configuration)")
    else:
        console.print("Next: domainshuttle data label, or data encode (the same configuration)")


def encode_corpora(
    config: RunConfig | CorporaConfig,
    only: list[str] | None = None,
    overwrite: bool = False,
    most_bad: float = MOST_BAD_IN_CORPUS,
    where: str | None = None,
) -> None:
    """Encodes the raw corpora, or the samples of each for which the filter `where` holds, on the connected Ray cluster;
    `overwrite`: also where that removes what is encoded already."""
    import ray

    from domainshuttle.pipelines.encoding.corpus import encode
    from domainshuttle.pipelines.encoding.target import EncodingJob

    quiet_ray()  # again: its data library sets its own levels when it is imported
    names = chosen_corpora(config, only)
    jobs = []
    for name in names:
        job = EncodingJob(config.corpus(name, "raw"), config.corpus(name, "encoded"), where)
        if not exists(job.raw.index):
            missing = f"{redacted(job.raw.index)} is missing. Run:"
            if config.corpora[name].pair:
                raise DataError(f"corpus {name!r} is not paired: {missing} domainshuttle data pair CONFIG")
            raise DataError(f"corpus {name!r} is not built: {missing} domainshuttle data build CONFIG")
        if lost_labels(job.raw.folder):
            raise DataError(
                f"corpus {name!r}: {redacted(job.raw.folder)} was made again and its index lacks the labels that the "
                "corpus has. Run: domainshuttle data label CONFIG (what is labelled is not labelled again)"
            )
        jobs.append(job)
    began = time.monotonic()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    pool, grows = config.cluster.encoding.pool(nodes), config.cluster.encoding.actors is None
    more = ", more where the cluster gets room" if grows else ""
    console.print(f"Encoding with up to {counted(pool.actors, 'actor')} (cpus {pool.cpus:g}, gpus {pool.gpus:g}){more}")
    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.enter_context(being_made(job.encoded.folder))
        show = stack.enter_context(progress("Encoding", "samples"))
        results = encode(
            jobs, config.encoders.sources(), show, pool, overwrite=overwrite, most_bad=most_bad, grows=grows
        )
    for job, encoded in zip(jobs, results, strict=True):
        report_corpus("Encoded", job.encoded.name, job.encoded.folder, encoded.metadata.digest, encoded.bad, began)
        console.print(
            f"  against the index before: {counted(encoded.new, 'new sample')}, {encoded.changed} changed and "
            f"{encoded.removed} removed (their copies are gone), {encoded.unchanged} unchanged; now encoded "
            f"{encoded.encoded}, of {encoded.captions} only the caption, copied {encoded.copied}"
        )
        if encoded.left_out:
            console.print(f"  {counted(encoded.left_out, 'sample')} left out by --where {where!r}", markup=False)
        if encoded.throughput and (sentence := encoded.throughput.sentence()):
            console.print(f"  {sentence}")
        print_skipped(read_skipped(job.raw.index))
    console.print("Next: domainshuttle train (the same configuration)")


def label_configured(config: RunConfig | CorporaConfig, only: list[str] | None = None, ask_again: bool = False) -> None:
    """Labels the raw corpora of a configuration on the connected Ray cluster: as they were built and, where they are
    paired, the pairs too, whose subjects are new."""
    jobs = []
    for name in chosen_corpora(config, only):
        built, raw = config.built(name).folder, config.corpus(name, "raw")
        paired, encode = built != raw.folder, "domainshuttle data encode (the same configuration)"
        jobs.append(LabelJob(name, built, "domainshuttle data pair (the same configuration)" if paired else encode))
        if paired and exists(raw.index):
            jobs.append(LabelJob(f"{name}, paired", raw.folder, encode))
    label_corpora(jobs, config.labels, ask_again)


def inspect_corpus(
    path: str | Path, sheet: Path | None, samples: int, where: str | None, page: Path | None = None
) -> None:
    """Prints what an index holds, draws a contact sheet of raw samples with their two reference sets, and writes a page
    with both and with what the stages did.

    Raises DataError where a filter leaves no samples.
    """
    place = index_location(path)
    whole = Index.load(place)
    index = whole.filter(where) if where else whole
    if not len(index):
        raise DataError(f"no samples: {where!r} holds for none of the {len(whole)} in {redacted(place)}")
    print_summary(index)
    print_converted(place)
    print_quarantine(place)
    print_skipped(read_skipped(place))
    if sheet:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(index, samples).save(sheet)
        console.print(f"Contact sheet: {sheet}", markup=False)
    if page:
        from domainshuttle.platform.commands.corpus_page import write_corpus_page  # brings what stages need

        console.print(f"Page: {write_corpus_page(place, index, page, samples)}", markup=False)


def chosen_corpora(config: RunConfig | CorporaConfig, only: list[str] | None) -> list[str]:
    unknown = [name for name in only or [] if name not in config.corpora]
    if unknown:
        raise ConfigError(f"no corpus {unknown}; the configuration has {list(config.corpora)}")
    return list(only or config.corpora)


def _print_left_out(report: dict[str, Any], folder: Path) -> None:
    """What of a source became no sample, and why, where there is such."""
    reasons = {**report["left_out"], **({"not drawn": report["not_drawn"]} if report["not_drawn"] else {})}
    if reasons:
        listed = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        hint = keep_hint(report["left_out"])
        console.print(f"  of {counted(report['records'], 'record')} left out: {listed}{hint}", markup=False)
    if report["wanted"] and report["selected"] < report["wanted"]:
        console.print(f"  {report['wanted']} were wanted: the source has no more", markup=False)
    if mute := report["notes"].get(UNCAPTIONED):
        console.print(f"  without a caption until `data label` writes one: {counted(mute, 'sample')}", markup=False)
    if reasons or report["notes"]:
        console.print(f"  counts, examples and settings: {folder / REPORT_NAME}", markup=False)


def report_corpus(done: str, name: str, folder: Location, digest: str, bad: int, began: float) -> None:
    place = join(folder, INDEX_NAME)
    index = Index.load(place, ALTERATIONS, verify=False)
    size = sum(size for name, size, _ in list_dated(folder) if name.endswith(".tar")) / 2**20
    quarantined = f", {bad} in quarantine" if bad else ""
    console.print(
        f"{done} [bold]{name}[/]: {counted(len(index), 'sample')}, {size:.1f} MiB{quarantined}, index {digest[:8]}, "
        f"{time.monotonic() - began:.0f} s, in {escape(redacted(folder))}"
    )
    print_quarantine(place)
    print_alterations(index.alterations())
    print_converted(place)
