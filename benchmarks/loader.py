"""The loader side by side with its peers, in one run: samples a second, CPU, time to the first batch, memory.

    python benchmarks/loader.py                # everything: 3 rounds, about 30 minutes, 9 GB of disk
    python benchmarks/loader.py --rounds 1 --latents 100 --pictures 200 --keep

Each loader runs in a process of its own, the page cache warm, the rounds interleaved; `loading/measure.py` says what is
measured and how. Data and converted copies are made in a folder and removed at the end.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from loading.environment import peers_python, requirements
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
KINDS = {"latents": "latents, 5.5 MB a sample", "pictures": "JPEG, 5 pictures a sample"}
LIMIT_SECONDS = 600
FIELDS = ("rate", "cpu", "first", "memory")


@dataclass(frozen=True)
class Contender:
    """A loader: its title, its command, which copy of the data it reads, and whether it is a peer, in their
    environment."""

    title: str
    command: tuple[str, ...]
    data: str = "tar"
    peer: bool = True
    peers_environment: bool = True


def _ours(title: str, *command: str) -> Contender:
    return Contender(title, ("loading.ours", *command), peer=False, peers_environment=False)


def _peer(title: str, name: str, data: str = "tar", peers_environment: bool = True) -> Contender:
    return Contender(title, ("loading.peers", "measure", name), data, peers_environment=peers_environment)


CONTENDERS = {
    "raw": _ours("raw read of the tars", "raw"),
    "ours": _ours("ours, 1 consumer", "product", "--consumers", "1"),
    "ours2": _ours("ours, 2 consumers", "product", "--consumers", "2"),
    "energon": _peer("Megatron-Energon, 2 workers", "energon"),
    "mds": _peer("MosaicML streaming (MDS), 2 workers", "mds", data="mds"),
    "webdataset": _peer("webdataset + DataLoader, 2 workers", "webdataset"),
    "litdata": _peer("LitData, 2 workers", "litdata", data="litdata"),
    "spdl": _peer("SPDL, 2 threads", "spdl"),
    "daft": _peer("Daft", "daft"),
    "ray": _peer("ray.data.read_webdataset", "ray", peers_environment=False),
}


class Bench:
    """The interpreters and the folder that the loaders run in."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.peers = peers_python()

    def run(self, peers_environment: bool, *command: str) -> str:
        """A module's output; its errors are shown when it fails."""
        python = str(self.peers) if peers_environment else sys.executable
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "DATA_OPTIMIZER_CACHE_FOLDER": str(self.folder),  # else LitData's goes to the home folder
        }
        done = subprocess.run(
            [python, "-W", "ignore", "-m", *command],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return done.stdout

    def prepare(self, counts: dict[str, int]) -> None:
        """Makes the samples, and what each peer needs of them."""
        for kind, count in counts.items():
            tars = self.folder / kind / "tar"
            if tars.exists():  # of a run before, kept
                continue
            print(f"making {count} samples of {kind} and the peers' copies", file=sys.stderr)
            self.run(False, "loading.data", kind, str(tars), str(count))
            for name in ("energon", "mds", "litdata"):
                target = self.folder / kind / name
                self.run(True, "loading.peers", "convert", name, kind, str(tars), "--target", str(target))

    def measure(self, name: str, kind: str) -> dict[str, float]:
        """One loader on one kind of data, after its files were read once."""
        one = CONTENDERS[name]
        data = self.folder / kind / one.data
        warm(data)
        output = self.run(one.peers_environment, *one.command, kind, str(data), "--seconds", str(self.seconds))
        return json.loads(output.strip().splitlines()[-1])


def warm(folder: Path) -> None:
    """Reads every file, so that all loaders find them in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(8 << 20):
                    pass


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in results) for name in results[0]}


def check_equal(kind: str, measured: dict[str, dict[str, float]]) -> None:
    """Every loader must have given all of a sample's tensors."""
    sizes = {name: one["sample_bytes"] for name, one in measured.items() if name != "raw"}
    if sizes and max(sizes.values()) > 1.01 * min(sizes.values()):
        raise RuntimeError(f"{kind}: the loaders did not give the same tensors, in bytes a sample: {sizes}")


def report(figures: dict[str, dict[str, dict[str, float]]], console: Console) -> None:
    """The table, and what became of the aims."""
    table = Table(title=f"Loading, medians: {machine()}", title_justify="left")
    table.add_column("loader")
    for title in KINDS.values():
        table.add_column(f"{title}\nsamples/s · CPU ms · s to first · MB", justify="right")
        table.add_column("of best\npeer", justify="right")
        table.add_column("of raw\nread", justify="right")
    names = [name for name in CONTENDERS if any(name in of_kind for of_kind in figures.values())]
    for name in names:
        cells = [CONTENDERS[name].title]
        for kind in KINDS:
            one = figures.get(kind, {}).get(name)
            if one is None:
                cells += ["", "", ""]
                continue
            raw_read = name == "raw"
            rest = "" if raw_read else f" · {one['first']:.2f} · {one['memory'] / 2**20:.0f}"
            ratios = [best_peer(figures[kind]), figures[kind].get("raw", {}).get("rate")]
            cells.append(f"{one['rate']:,.0f} · {one['cpu']:.1f}{rest}")
            cells += ["" if raw_read or not ratio else f"{one['rate'] / ratio:.2f}" for ratio in ratios]
        table.add_row(*cells, style="bold" if name.startswith("ours") else "")
    console.print(table)
    for line in aims(figures):
        console.print(line)


def best_peer(measured: dict[str, dict[str, float]]) -> float | None:
    """Samples/s of the fastest peer that was measured."""
    return max((one["rate"] for name, one in measured.items() if CONTENDERS[name].peer), default=None)


def aims(figures: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What was aimed at, and what came of it."""
    found: list[tuple[str, float, float, bool]] = []
    for kind, times in (("latents", 3.0), ("pictures", 1.6)):
        measured = figures.get(kind, {})
        if not {"ours", "ours2", "raw"} <= set(measured) or (peer := best_peer(measured)) is None:
            continue
        ours, two = measured["ours"], measured["ours2"]
        found.append((f"{kind}: times the best peer", ours["rate"] / peer, times, True))
        if kind == "latents":
            found.append((f"{kind}: of the raw read", ours["rate"] / measured["raw"]["rate"], 0.5, True))
        found.append((f"{kind}: seconds to the first batch", max(ours["first"], two["first"]), 3.0, False))
        found.append((f"{kind}: GB of memory, 1 consumer", ours["memory"] / 1e9, 1.5, False))
        found.append((f"{kind}: 2 consumers in sum against 1", two["rate"] / ours["rate"], 1.0, True))
    return [
        f"{'met   ' if (value >= aim) == more else 'missed'} {name}: {value:.2f}, "
        f"aim {'at least' if more else 'at most'} {aim:g}"
        for name, value, aim, more in found
    ]


def machine() -> str:
    """What it was measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return f"{os.cpu_count()} x {model}, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def versions() -> dict[str, str]:
    own = {name: importlib.metadata.version(name) for name in ("ray", "torch", "pyarrow", "simplejpeg", "safetensors")}
    return own | dict(one.split("==") for one in requirements())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="steady time of each measurement")
    parser.add_argument("--latents", type=int, default=384, help="samples of 5.5 MB; 0: leave this kind out")
    parser.add_argument("--pictures", type=int, default=1600, help="samples of five JPEGs; 0: leave this kind out")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="these loaders")
    parser.add_argument("--folder", type=Path, help="where the data goes; by default a temporary folder under build/")
    parser.add_argument("--keep", action="store_true", help="leave the data there for the next run")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    build = HERE.parent / "build"
    build.mkdir(exist_ok=True)
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="loader-", dir=build))).absolute()
    counts = {kind: getattr(arguments, kind) for kind in KINDS if getattr(arguments, kind)}
    results: dict[str, dict[str, list[dict[str, float]]]] = {
        kind: {name: [] for name in CONTENDERS if name in arguments.only} for kind in counts
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, arguments.seconds)
        bench.prepare(counts)
        for number in range(arguments.rounds):
            for kind, of_kind in results.items():
                for name, runs in of_kind.items():
                    try:
                        runs.append(bench.measure(name, kind))
                    except (RuntimeError, subprocess.TimeoutExpired) as error:  # a gap in the table, not its end
                        print(f"round {number + 1}, {kind}, {name}: {error}", file=sys.stderr)
                        continue
                    shown = " · ".join(f"{field} {runs[-1][field]:.4g}" for field in FIELDS)
                    print(f"round {number + 1}, {kind}, {name}: {shown}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the medians are of what was measured", file=sys.stderr)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    figures = {
        kind: {name: medians(runs) for name, runs in of_kind.items() if runs} for kind, of_kind in results.items()
    }
    for kind, measured in figures.items():
        check_equal(kind, measured)
    report(figures, Console(width=None if sys.stdout.isatty() else 160))
    if arguments.keep:
        print(f"the data is in {folder}: --folder {folder} --keep uses it again", file=sys.stderr)
    if arguments.json:
        described = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "rounds": results}
        arguments.json.write_text(json.dumps(described | {"versions": versions(), "medians": figures}, indent=1))


if __name__ == "__main__":
    main()
