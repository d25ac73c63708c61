"""Indexing, verifying and looking at corpora: the commands' work and what they print."""

import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.markup import escape
from rich.table import Table

from domainshuttle.pipelines.buckets import Bucket, checked_rate, parse_bucket, standard_buckets
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.index.alterations import Alterations
from domainshuttle.pipelines.index.build import Indexed, index_folder, merge_indexes
from domainshuttle.pipelines.index.filter import RowFilter
from domainshuttle.pipelines.index.folder import COMPANION, SKIPPED_NAME, Skipped, beside, require_folder
from domainshuttle.pipelines.index.parts import CONVERTED_NAME, INDEX_NAME
from domainshuttle.pipelines.index.table import Index, IndexMetadata, read_metadata
from domainshuttle.pipelines.index.verify import verify_index
from domainshuttle.pipelines.quarantine import QUARANTINE_NAME, fault_kind
from domainshuttle.pipelines.shards.scan import shown as printable
from domainshuttle.pipelines.storage.files import exists, read_bytes
from domainshuttle.pipelines.storage.uri import Location, is_remote, join, local_path, name_of, redacted
from domainshuttle.platform.commands.labels import print_kept_labels
from domainshuttle.platform.config.schema import CORPUS_NAME, ConfigError
from domainshuttle.platform.console import console, progress

_MOST_ROWS = 12
_MOST_NAMED = 20
_CHARACTERS_PER_TOKEN = 4


def chosen_buckets(listed: Sequence[str], resolution: str | None, frames: Sequence[int]) -> list[Bucket]:
    """The buckets that a command line names: listed ones, and those of a resolution class for each length."""
    if (resolution is None) != (not frames):
        raise ConfigError("--resolution and --frames go together: --resolution 480p --frames 81 --frames 1")
    named = standard_buckets(resolution, frames) if resolution else []
    return sorted({*(parse_bucket(text) for text in listed), *named})


def described_as(folder: Location, corpus: str | None, fps: float | None, buckets: Sequence[Bucket]) -> IndexMetadata:
    """What the index of a folder's shards is to say of itself: of encoded shards, what the index before said.

    Raises DataError for what is no folder, ConfigError where the command line says too little, or for encoded shards
    what is theirs to say.
    """
    require_folder(folder)  # before a cluster is started
    checked_rate(fps, "--fps")
    known = None
    if exists(join(folder, INDEX_NAME)):
        try:
            known = read_metadata(join(folder, INDEX_NAME))
        except DataError as error:
            console.print(f"The index before can't be used: {escape(str(error))}")
    name = corpus or (known.corpus if known else None)
    if name is None:
        raise ConfigError(
            f"which corpus is this? Give --corpus NAME, as a configuration's `corpora` names it ({redacted(folder)})"
        )
    if not re.fullmatch(CORPUS_NAME, name):
        raise ConfigError(f"--corpus {name}: no configuration can name it so: a corpus's name is also that of a folder")
    if known and known.stage == "encoded":
        if buckets or fps is not None:
            raise ConfigError(
                f"{redacted(folder)} holds encoded samples: their latents have a bucket and a rate; leave out "
                "--bucket, --resolution, --frames and --fps"
            )
        return known.model_copy(update={"corpus": name, "digest": ""})
    if not buckets:
        raise ConfigError(
            "which buckets shall samples be fitted to? Give --bucket 81x480x832 (frames x height x width, 1 frame for "
            "images; repeat for more), or --resolution 480p --frames 81 --frames 1"
        )
    return IndexMetadata(corpus=name, stage="raw", fps=fps)


def index_location(location: Location) -> Location:
    """Where the index file is that a command line names: itself, or the folder that it is in. Raises ConfigError for a
    file that is none, such as a shard or a configuration."""
    is_index = name_of(location).endswith(".parquet")
    if not is_remote(location):
        path = local_path(location)
        if path.is_file() and not is_index:
            raise ConfigError(
                f"{path} is no index: give an index.parquet, or the folder that it is in; that of a configuration's "
                "corpus is DATA/CORPUS/raw, or /encoded"
            )
        is_index = is_index and not path.is_dir()
    return location if is_index else join(location, INDEX_NAME)


def _require_name(name: str) -> str:
    """Raises ConfigError for an index's name that leads into another folder, where its shards are not."""
    if "/" in name or not name.endswith(".parquet"):
        raise ConfigError(f"--name {name}: expected a name in the folder of the shards, such as a.parquet")
    return name


def index_shards(
    folder: Location, metadata: IndexMetadata, buckets: Sequence[Bucket], most_bad: float, shards: str, name: str
) -> None:
    """Indexes the shards of a folder or URI on the connected Ray cluster, and prints what was found."""
    began = time.monotonic()
    with progress("Indexing", "MiB") as show:
        made = index_folder(folder, metadata, buckets, show, most_bad, shards, _require_name(name))
    seconds = time.monotonic() - began
    read = f"{made.scanned} read ({made.scanned_bytes / 2**20:.1f} MiB in {seconds:.0f} s)"
    refused = made.shards - made.scanned - made.unchanged
    more = f", {refused} refused for {'its name' if refused == 1 else 'their names'}" if refused else ""
    _report(made, f"{counted(made.shards, 'shard')}: {read}, {made.unchanged} unchanged{more}")
    if name == INDEX_NAME:
        print_kept_labels(folder)


def join_indexes(indexes: Sequence[str], folder: Location, most_bad: float, name: str) -> None:
    """Makes one index of several of a folder, which are given by their names or as locations, and prints what it
    holds."""
    named = [one if "/" in one else join(folder, one) for one in indexes]
    made = merge_indexes(named, join(folder, _require_name(name)), most_bad)
    _report(made, f"{counted(made.shards, 'shard')} of {counted(len(indexes), 'index', 'indexes')}")
    if name == INDEX_NAME:
        print_kept_labels(folder)


def _report(made: Indexed, shards: str) -> None:
    index = redacted(made.path)
    console.print(
        f"Indexed [bold]{made.metadata.corpus}[/] ({made.metadata.stage}): {counted(made.samples, 'sample')}, "
        f"{shards}, index {made.metadata.digest[:8]}, in {escape(index)}"
    )
    print_faults(made.faults, "left out")
    if made.faults:
        console.print(
            f"What was left out, with shard, key and reason: {escape(redacted(beside(made.path, QUARANTINE_NAME)))}"
        )
    print_skipped(made.skipped)
    if made.skipped:
        console.print(f"All that was not read, by name: {escape(redacted(beside(made.path, SKIPPED_NAME)))}")
    print_alterations(made.altered)
    raw = made.metadata.stage == "raw"
    following = "data encode CONFIG (in which the corpus has no `build`)" if raw else "train CONFIG"
    console.print(f"Next: domainshuttle data verify {escape(shlex.quote(index))}, then domainshuttle {following}")


def require_verifiable(path: Location, decode: str, where: str | None) -> None:
    """Raises, before a cluster is asked for, DataError for what is no index and for a filter that is none, and
    ConfigError for a number of samples that is none."""
    _samples(decode)
    read_metadata(index_location(path))
    if where is not None:
        RowFilter.columns(where)


def _samples(decode: str) -> int | None:
    """How many samples are decoded; None: all."""
    if decode == "all":
        return None
    if not decode.isdecimal():
        raise ConfigError(f"--decode {decode}: expected a number of samples, or all")
    return int(decode)


def verify_corpus(path: Location, checksums: bool, decode: str, where: str | None) -> bool:
    """Verifies a corpus on the connected Ray cluster and prints what was found; returns whether it is whole."""
    path, samples = index_location(path), _samples(decode)
    began = time.monotonic()
    with progress("Verifying", "samples") as show:
        found = verify_index(path, show, checksums, samples, where)
    bytes_read = f"{found.read_bytes / 2**20:.1f} MiB read" + ("" if checksums else ", checksums left out")
    console.print(
        f"Verified {escape(redacted(path))}: {counted(found.samples, 'sample')} in "
        f"{counted(found.shards, 'shard')}, {bytes_read}, {counted(found.decoded, 'sample')} decoded, in "
        f"{time.monotonic() - began:.0f} s"
    )
    if found.unindexed:
        names = ", ".join(found.unindexed[:3]) + (" ..." if len(found.unindexed) > 3 else "")
        console.print(
            f"Not in the index: {counted(len(found.unindexed), 'shard')} of the folder: {escape(names)}. To add what "
            "is not: domainshuttle data index (the same options)"
        )
    print_skipped(found.skipped)
    if not found.faults:
        console.print("[green]No faults.[/] Next: domainshuttle data inspect, data encode or train")
        return True
    print_faults(found.faults, "samples or shards")
    console.print(
        f"[red]Faults of {counted(found.bad_samples, 'sample')} in {counted(found.bad_shards, 'shard')}[/]; shard, key "
        f"and reason of each: {escape(redacted(found.path))}\nNext: copy the shards that it names again from their "
        "source, then `domainshuttle data index` (only changed shards are read) and verify again. Bad samples that "
        "stay go to quarantine when they are encoded or trained on."
    )
    return False


def print_quarantine(index: Location) -> None:
    """Prints how many samples and shards an index's quarantine table has, by kind, and one reason."""
    table = beside(index, QUARANTINE_NAME)
    rows = [json.loads(line) for line in read_bytes(table).splitlines()] if exists(table) else []
    if not rows:
        return
    shards = sum(not row["key"] for row in rows)
    kinds_of = (len(rows) - shards, "sample"), (shards, "shard")
    left_out = " and ".join(counted(count, noun) for count, noun in kinds_of if count)
    kinds = Counter(fault_kind(row["reason"]) for row in rows).most_common(_MOST_ROWS)
    console.print(
        f"[yellow]{left_out} in quarantine[/] ({escape(redacted(table))}): "
        f"{escape(', '.join(f'{kind} {count}' for kind, count in kinds))}; such as: {escape(rows[0]['reason'])}"
    )


def print_converted(index: Location) -> None:
    """Prints how many samples of an encoded corpus had their pixels converted, by kind."""
    if not exists(table := beside(index, CONVERTED_NAME)):
        return
    kinds = Counter(json.loads(line)["reason"] for line in read_bytes(table).splitlines())
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    console.print(f"Of its samples, by what was done to pixels ({escape(redacted(table))}): {escape(listed)}")


def print_skipped(skipped: Sequence[Skipped]) -> None:
    """Prints what was not read of a corpus's folder: each kind with its remedy and names, companions as a count."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for one in skipped:
        if one.kind != COMPANION:
            kinds.setdefault((one.kind, one.remedy), []).append(printable(one.file))
    if kinds:
        count = sum(map(len, kinds.values()))
        console.print(f"[yellow]Not read, {count} of the folder's files:[/]")
    for (kind, remedy), names in kinds.items():
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        console.print(f"  {len(names)} {kind}: {escape(', '.join(names[:_MOST_NAMED]))}{more} ({remedy})")
    if ignored := {one.file: one.count for one in skipped if one.kind == COMPANION}:
        listed = ", ".join(f"{printable(name)} {count}" for name, count in ignored.items())
        count = sum(ignored.values())
        what = f"{counted(count, 'companion file')} of other tools {'was' if count == 1 else 'were'} ignored"
        console.print(f"{what}: {escape(listed)}")


def print_alterations(altered: Alterations) -> None:
    """Prints how many targets are changed for their buckets, and how many captions are cut."""
    if changed := altered.sentences():
        console.print(f"Fitted to their buckets, of {counted(altered.samples, 'sample')}: {', '.join(changed)}")
    if altered.cut_captions:
        are, they = ("is", "it has") if altered.cut_captions == 1 else ("are", "they have")
        cut = f"{counted(altered.cut_captions, 'caption')} {are} cut"
        console.print(f"[yellow]{cut}[/]: {they} more tokens than encoders.text_len")


def print_faults(faults: Counter[str], of: str) -> None:
    """Prints faults by kind, as a small table."""
    if not faults:
        return
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("fault")
    table.add_column(of, justify="right")
    for kind, count in faults.most_common():
        table.add_row(escape(kind), str(count))
    console.print(table)


def print_counts(title: str, counts: Mapping[str, int]) -> None:
    """Prints what was counted as a small table; nothing where there is nothing."""
    if counts:
        console.print(_counts(title, counts))


def print_summary(index: Index) -> None:
    """Prints what an index holds, as small tables."""
    summary = index.summary()
    rate = f", clips sampled at {summary['fps']:g} fps" if summary["fps"] else ""
    console.print(
        f"[bold]{escape(', '.join(summary['corpora']))}[/] ({summary['stage']}): "
        f"{counted(summary['samples'], 'sample')}, {summary['bytes'] / 2**20:.1f} MiB{rate}, index "
        f"{summary['digest'][:8]}"
    )
    subjects = sum(summary["domains"].values())
    tables = [
        _counts("source", summary["source"]),
        _counts("kind", summary["kind"]),
        _counts("bucket", summary["bucket"]),
        _counts("subjects a sample", summary["subjects"]),
        _counts("references a sample", summary["references"]),
        _counts("domain of subjects", summary["domains"]),
        _counts("origin of references", summary["origins"]),
    ]
    console.print()
    console.print(Columns([table for table in tables if table.row_count], padding=(0, 4)))
    quantities = {
        "seconds": "seconds of clips",
        "caption_length": "caption, characters",
        "text_tokens": "caption, tokens",
    }
    points = ("min", "p05", "median", "p95", "max")
    table = Table("", *points, box=None, padding=(0, 2), show_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, title in quantities.items():
        if values := summary.get(name):
            table.add_row(title, *(f"{values[point]:.4g}" for point in points))
    if not summary.get("text_tokens") and (characters := summary["caption_length"]):
        guess = (f"{characters[point] / _CHARACTERS_PER_TOKEN + 1:.0f}" for point in points)
        table.add_row("caption, tokens: estimated", *guess)
    console.print()
    console.print(table)
    if not summary.get("text_tokens"):
        console.print(
            f"[dim]Tokens are counted when captions are encoded; the estimate is a token every {_CHARACTERS_PER_TOKEN} "
            "characters, as UMT5 has of English text, and the end's. Seconds are those of whole files.[/]"
        )
    if single := summary["single_picture_subjects"]:
        console.print(
            f"\n{single} of {subjects} subjects have a single picture: the other of their pair is an altered view of it"
        )
    print_alterations(index.alterations())


def _counts(title: str, counts: Mapping[Any, int]) -> Table:
    table = Table(title, "", "", box=None, padding=(0, 1), show_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    whole = sum(counts.values())
    for name, count in list(counts.items())[:_MOST_ROWS]:
        table.add_row(escape(str(name)), str(count), f"{count / whole:.0%}")
    if left := list(counts.values())[_MOST_ROWS:]:
        table.add_row(f"{len(left)} more", str(sum(left)), f"{sum(left) / whole:.0%}")
    return table
