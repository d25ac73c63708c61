"""The data verbs: what a configuration says of its corpora, carried out with progress and an end line."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from rich.markup import escape

from domainshuttle.cluster.local import quiet_ray
from domainshuttle.pipelines.corpora.builder import build_corpus
from domainshuttle.pipelines.index import Index, read_metadata
from domainshuttle.pipelines.indexing import beside
from domainshuttle.pipelines.parts import INDEX_NAME, MOST_BAD_RAW, QUARANTINE_NAME, WORK_NAME
from domainshuttle.pipelines.sample import DataError
from domainshuttle.pipelines.storage import exists, join, open_parquet, read_bytes, require_local, shown
from domainshuttle.platform.config import ConfigError, RunConfig
from domainshuttle.platform.console import console, progress
from domainshuttle.platform.data_checks import print_summary
from domainshuttle.platform.lock import RunLock, holder_named
from domainshuttle.platform.sheet import draw_sheet


def build_corpora(config: RunConfig, only: list[str] | None = None, most_bad: float = MOST_BAD_RAW) -> None:
    """Builds the raw corpora on the connected Ray cluster."""
    for name in _chosen(config, only):
        section, folder = config.corpora[name], require_local(config.corpus_folder(name, "raw"), f"building {name}")
        if section.build is None:
            buckets = " ".join(f"--bucket {bucket}" for bucket in section.buckets)
            rate = f" --fps {section.fps:g}" if section.fps else ""
            console.print(
                f"[bold]{name}[/] has no builder: its shards are your own. Index them with: domainshuttle data index "
                f"{folder} --corpus {name} {buckets}{rate}"
            )
            continue
        began = time.monotonic()
        with _being_made(folder), progress(f"Building {name}", "samples") as show:
            metadata, bad = build_corpus(
                name, section.build, section.parsed_buckets, folder, show, fps=section.fps, most_bad=most_bad
            )
        _report("Built", name, folder, metadata.digest, bad, began)
    console.print("Next: domainshuttle data encode (the same configuration)")


def encode_corpora(
    config: RunConfig, only: list[str] | None = None, anew: bool = False, most_bad: float = MOST_BAD_RAW
) -> None:
    """Encodes the raw corpora on the connected Ray cluster; `anew`: also where that removes whole ones."""
    import ray

    from domainshuttle.pipelines.encode import EncodingJob, EncodingPool, encode

    quiet_ray()  # again: its data library sets its own levels when it is imported
    names = _chosen(config, only)
    jobs = []
    for name in names:
        raw = require_local(config.corpus_folder(name, "raw"), f"encoding {name}") / INDEX_NAME
        if not raw.exists():
            raise DataError(f"corpus {name!r} is not built: {raw} is missing. Run: domainshuttle data build CONFIG")
        jobs.append(EncodingJob(name, raw, Path(config.corpus_folder(name, "encoded"))))
    began, wanted = time.monotonic(), config.cluster.encoding
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    pool = EncodingPool.of_nodes(nodes, wanted.actors, wanted.cpus, wanted.gpus)
    console.print(f"Encoding with up to {pool.actors} actors of {pool.cpus:g} CPUs and {pool.gpus:g} GPUs")
    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.enter_context(_being_made(job.folder))
        show = stack.enter_context(progress("Encoding", "samples"))
        results = encode(jobs, config.encoders.sources(), show, pool, anew=anew, most_bad=most_bad)
    for job, (metadata, bad) in zip(jobs, results, strict=True):
        _report("Encoded", job.corpus, job.folder, metadata.digest, bad, began)
    console.print("Next: domainshuttle train (the same configuration)")


def _being_made(folder: Path) -> RunLock:
    """A lock on a corpus, so that two commands do not take each other's parts away."""

    def held(_: Path, holder: dict[str, Any]) -> str:
        return f"{folder} is being made by {holder_named(holder)}: wait until it has ended, or stop it"

    return RunLock(folder / WORK_NAME, console.print, held)


def require_encoded(config: RunConfig) -> None:
    """Raises DataError that names every corpus that the stages need and that is not there in the form they train on
    (raw where encoders.live is set), with the commands."""
    needed = sorted({corpus for stage in config.stages for corpus in stage.mixture})
    form = config.trained_form
    missing = [name for name in needed if not exists(join(config.corpus_folder(name, form), INDEX_NAME))]
    if missing:
        commands = []
        if any(config.corpora[name].build for name in missing):
            commands.append("domainshuttle data build CONFIG")
        if own := [name for name in missing if not config.corpora[name].build]:
            folder = shown(config.corpus_folder(own[0], "raw"))
            commands.append(f"domainshuttle data index {folder} --corpus {own[0]} ...")
        if form == "encoded":
            commands.append("domainshuttle data encode CONFIG")
        raise DataError(
            f"corpora {missing} are not {'encoded' if form == 'encoded' else 'built'} in {shown(config.data)}. Run: "
            f"{', then '.join(commands)} (or point `data` at a folder that has them)"
        )
    for name in needed:
        _require_as_configured(config, name, join(config.corpus_folder(name, form), INDEX_NAME))


def _require_as_configured(config: RunConfig, name: str, place: str) -> None:
    """Raises DataError where an index was made otherwise than the configuration says, and training would not notice."""
    section, found = config.corpora[name], read_metadata(place)
    if found.fps != section.fps:
        rates = [f"{rate:g}" if rate else "each clip's own" for rate in (found.fps, section.fps)]
        raise DataError(
            f"corpus {name!r} was indexed at {rates[0]} frames a second, and corpora.{name}.fps says {rates[1]}: "
            f"correct it, or index the corpus again with --fps (nothing is read again) and encode it ({shown(place)})"
        )
    buckets = set(open_parquet(place).read(["bucket"]).column("bucket").unique().to_pylist())
    if more := sorted(buckets - set(section.buckets)):
        raise DataError(
            f"corpus {name!r} has samples in buckets {more}, which corpora.{name}.buckets does not list: add them, or "
            f"index the corpus again with those of the configuration ({shown(place)})"
        )
    if found.stage == "raw":
        return
    encoders = config.encoders
    for kind, source, ending in (("video", encoders.video, ""), ("text", encoders.text, f":{encoders.text_len}")):
        identity = str(found.encoders.get(kind, ""))
        if not identity.endswith(ending):
            raise DataError(
                f"corpus {name!r} was encoded with captions of {identity.rpartition(':')[2]} tokens, and "
                f"encoders.text_len is {encoders.text_len}: correct it, or encode the corpus again"
            )
        if not identity.startswith(f"{source}:"):  # it may be the same under another name
            console.print(
                f"Corpus {name} was encoded by {identity}, and encoders.{kind} is {source}: unless they are the same, "
                "encode it again"
            )


def inspect_corpus(path: str | Path, sheet: Path | None, samples: int, where: str | None) -> None:
    """Prints what an index holds, and draws a contact sheet of raw samples with their two reference sets.

    Raises DataError where a filter leaves no samples.
    """
    place = path if str(path).partition("?")[0].endswith(".parquet") else join(path, INDEX_NAME)
    whole = Index.load(place)
    index = whole.filter(where) if where else whole
    if not len(index):
        raise DataError(f"no samples: {where!r} holds for none of the {len(whole)} in {shown(place)}")
    print_summary(index)
    quarantine = beside(place, QUARANTINE_NAME)
    if exists(quarantine) and (lines := read_bytes(quarantine).splitlines()):
        reason = json.loads(lines[0])["reason"]
        console.print(f"{len(lines)} samples in quarantine ({shown(quarantine)}), such as: {escape(reason)}")
    if sheet:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(index, samples).save(sheet)
        console.print(f"Contact sheet: {sheet}")


def _chosen(config: RunConfig, only: list[str] | None) -> list[str]:
    unknown = [name for name in only or [] if name not in config.corpora]
    if unknown:
        raise ConfigError(f"no corpus {unknown}; the configuration has {list(config.corpora)}")
    return list(only or config.corpora)


def _report(done: str, name: str, folder: Path, digest: str, bad: int, began: float) -> None:
    count = len(Index.load(folder / INDEX_NAME, verify=False))
    size = sum(path.stat().st_size for path in folder.glob("*.tar")) / 2**20
    quarantined = f", {bad} in quarantine" if bad else ""
    console.print(
        f"{done} [bold]{name}[/]: {count} samples, {size:.1f} MiB{quarantined}, index {digest[:8]}, "
        f"{time.monotonic() - began:.0f} s, in {folder}"
    )
