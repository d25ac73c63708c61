"""Chaos: one run of the demo's size under a random sequence of faults, and its accounts at the end.

    python benchmarks/chaos.py --faults 20 --seed 0        (or: make chaos)

Each fault is real: signals to the driver or to a worker, damage to the newest checkpoint, a tracking server that goes
away or hangs, files that can't grow, a sample whose loss is not finite. After each, what a user would do is done (the
same command again, where the driver is gone), and the time to the first step of the next attempt is measured. What a
fault waits for may not come (a save, a bad sample's step); then it is not counted, and given again later. At the end
every planned sample must have been trained on exactly once in the surviving history. Ends with code 1 otherwise, and,
after its accounts, when the run was finished before all faults were given.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.shards.tensors import tensor_views
from domainshuttle.platform.checkpoint.store import MANIFEST_NAME
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.sample_audit import audit_samples

CLI = [sys.executable, "-m", "domainshuttle.platform.cli"]
PATIENCE = 300.0
"""Seconds in which a run must get on after a fault."""
MANY_STEPS = 20
PLAN_HANDED_OUT = "SIGKILL of Ray Data's coordinator"
"""It hands out the plan, hundreds of steps ahead: after the whole of it nothing misses it, and the workers go on."""
console = Console()


def size_of(path: Path) -> int:
    """0 for what was removed meanwhile, as old checkpoints are."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def processes_of(driver: int, name: str = "RayTrainWorker") -> list[psutil.Process]:
    """The processes of a driver's cluster whose title has a name: without one the training workers."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            if name in child.name() or name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


@dataclass
class Entry:
    """One fault and what became of it."""

    fault: str
    segment: str
    step: int
    seconds_to_step: float


class Server:
    """A real MLflow server of the run's own, which can be taken away and brought back."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folder = self.folder
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        with (folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.5)
        raise SystemExit(f"the MLflow server did not start: see {folder / 'server.log'}")

    def stop(self) -> None:
        if self.process:
            end_tree(self.process.pid)
            self.process = None

    def hang(self, hangs: bool) -> None:
        """It takes connections and never answers, or answers again."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGSTOP if hangs else signal.SIGCONT)


class Chaos:
    """A run, its driver, and the faults that it can be given."""

    def __init__(self, config: Path, run: Run, server: Server, dice: random.Random, log: Path) -> None:
        self.config, self.run, self.server, self.dice, self.log = config, run, server, dice, log
        self.driver: subprocess.Popen[bytes] | None = None
        self.given = 0.0
        """When the fault was given; what it waited for before does not count."""
        self.faults: dict[str, Callable[[], bool]] = {  # each says whether what it is called happened
            "SIGKILL of a worker": self.kill_worker,
            "SIGKILL of a worker, and of another while they start again": self.kill_in_start,
            "SIGKILL of a worker while a checkpoint is written": self.kill_in_write,
            "SIGKILL of Ray Train's controller": lambda: self.kill("TrainController"),
            PLAN_HANDED_OUT: lambda: self.kill("SplitCoordinator"),
            "SIGKILL of Ray Data's statistics, then of a worker": lambda: (
                self.kill("_StatsActor") and self.kill_worker()
            ),
            "SIGKILL of Ray Data's autoscaler, then of a worker": lambda: (
                self.kill("Autoscaling") and self.kill_worker()
            ),
            "SIGSTOP of a worker (it hangs)": self.freeze_worker,
            "SIGKILL of the driver": self.kill_driver,
            "Ctrl-C": lambda: self.signal_driver(signal.SIGINT),
            "SIGTERM": lambda: self.signal_driver(signal.SIGTERM),
            "newest checkpoint: one bit flipped, then SIGKILL": self.flip_bit,
            "newest checkpoint: cut short, then SIGKILL": self.cut_short,
            "newest checkpoint: manifest gone, then SIGKILL": self.remove_manifest,
            "MLflow away, or back again, and SIGKILL of a worker": self.server_away,
            "MLflow hangs, and SIGKILL of a worker": self.server_hangs,
            "a save fails for want of room, then SIGKILL": self.no_room,
            "a step's loss is not finite, then SIGKILL": self.bad_step,
        }

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                [*CLI, "train", str(self.config)], stdout=log, stderr=log, start_new_session=True
            )

    def ensure_driver(self) -> None:
        """Starts the command again if it has ended, as a user or a job scheduler would."""
        if self.driver is None or self.driver.poll() is not None:
            self.start()

    def finished(self) -> bool:
        return all(segment.finished for segment in self.run.segments())

    def wait_for_step(self, attempt_after: int, steps: int = 1, may_go_on: bool = False) -> None:
        """Waits until an attempt later than `attempt_after` has made some steps, or the run is finished.

        With `may_go_on` also until that attempt itself has made many more: what died may have done its work before.
        """
        deadline, before = time.monotonic() + PATIENCE, self.run.read_progress()
        while time.monotonic() < deadline:
            state = self.run.read_progress()
            new = state and state["attempt"] > attempt_after and state["step"] >= state["first_step"] + steps
            goes_on = may_go_on and state["attempt"] == attempt_after and (
                state["segment"] != before["segment"] or state["step"] >= before["step"] + MANY_STEPS
            )  # fmt: skip
            if self.finished() or new or goes_on:
                return
            if self.driver and self.driver.poll() not in (None, 0):
                self.start()
            time.sleep(0.1)
        raise SystemExit(f"no step for {PATIENCE:.0f} s: see {self.log}")

    def workers(self) -> list[psutil.Process]:
        assert self.driver
        return processes_of(self.driver.pid)

    def kill_worker(self) -> bool:
        return self.kill("RayTrainWorker")

    def kill(self, name: str) -> bool:
        assert self.driver
        self.given = time.monotonic()
        if found := processes_of(self.driver.pid, name):
            self.dice.choice(found).kill()
        return bool(found)

    def kill_in_start(self) -> bool:
        """The second dies in its imports or while the group is set up: before it could write its first line."""
        before = {worker.pid for worker in self.workers()}
        attempts = Ledger(self.run.ledger_path).summary().attempts
        self.kill_worker()
        if not self.wait_until(lambda: len([w for w in self.workers() if w.pid not in before]) > 1):
            return False
        time.sleep(self.dice.uniform(0.5, 6.0))
        new = [worker for worker in self.workers() if worker.pid not in before]
        if not new or Ledger(self.run.ledger_path).summary().attempts > attempts:
            return False
        self.given = time.monotonic()
        self.dice.choice(new).kill()
        return True

    def freeze_worker(self) -> bool:
        if workers := self.workers():
            self.dice.choice(workers).suspend()
        return bool(workers)

    def kill_in_write(self) -> bool:
        def in_write() -> bool:
            folders = self.run.checkpoints.glob("*-step*")
            return any(not (folder / MANIFEST_NAME).exists() for folder in folders)

        return self.wait_until(in_write, every=0.002) and self.kill_worker()

    def kill_driver(self) -> bool:
        assert self.driver
        end_tree(self.driver.pid)
        self.driver.wait()
        return True

    def signal_driver(self, number: signal.Signals) -> bool:
        assert self.driver
        self.driver.send_signal(number)
        self.driver.wait(timeout=PATIENCE)
        return True

    def damage(self, act: Callable[[Path], None]) -> bool:
        whole = [f for f in self.run.checkpoints.glob("*-step*") if (f / MANIFEST_NAME).exists()]
        if not whole:
            return False
        act(max(whole, key=lambda folder: folder.stat().st_mtime))
        return self.kill_worker()

    def flip_bit(self) -> bool:
        def act(folder: Path) -> None:
            path = self.dice.choice([p for p in folder.rglob("*") if p.is_file() and size_of(p) > 10_000])
            with path.open("r+b") as file:
                place = self.dice.randrange(path.stat().st_size)
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << self.dice.randrange(8)]))

        return self.damage(act)

    def cut_short(self) -> bool:
        def act(folder: Path) -> None:
            path = max((p for p in folder.rglob("*") if p.is_file()), key=size_of)
            os.truncate(path, self.dice.randrange(path.stat().st_size))

        return self.damage(act)

    def remove_manifest(self) -> bool:
        return self.damage(lambda folder: (folder / MANIFEST_NAME).unlink())

    def server_away(self) -> bool:
        if self.server.process:
            self.server.stop()
        else:
            self.server.start()
        return self.kill_worker()

    def server_hangs(self) -> bool:
        """From here to the next fault."""
        there = self.server.process is not None
        self.server.hang(True)
        return self.kill_worker() and there

    def no_room(self) -> bool:
        """Files of the workers can't grow to the size of a checkpoint's until one has failed."""
        largest = max(map(size_of, self.run.checkpoints.rglob("zero/*")), default=0)
        workers = self.workers() if largest else []
        for worker in workers:
            worker.rlimit(psutil.RLIMIT_FSIZE, (largest // 2, psutil.RLIM_INFINITY))
        failed = self.run.failed_checkpoints_path
        before = failed.stat().st_size if failed.exists() else 0
        seen = bool(workers) and self.wait_until(lambda: failed.exists() and failed.stat().st_size > before)
        for worker in workers:
            if worker.is_running():
                worker.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        return self.kill_worker() and seen

    def bad_step(self) -> bool:
        """A sample of the stage has latents that are finite, and a loss that is not, until a step was dropped."""
        config, stage = self.run.config, self.run.segment(self.run.read_progress()["segment"]).stage
        index = Index.load(f"{config.corpus(self.dice.choice(sorted(stage.mixture)), 'encoded').folder}/{INDEX_NAME}")
        row = index.row(self.dice.randrange(len(index)))
        member = next(member for member in row.members if member.extension == "safetensors")
        shard = Path(row.folder) / row.shard
        content = shard.read_bytes()[member.offset : member.offset + member.size]
        body = bytes(tensor_views(memoryview(content))["target"].buffer)
        at = member.offset + content.index(body)

        def overwrite(data: bytes) -> None:
            with shard.open("r+b") as file:
                file.seek(at)
                file.write(data)

        dropped = self.run.folder / "dropped"
        before = sum(path.stat().st_size for path in dropped.glob("*"))
        overwrite(struct.pack("<f", 4e37)[2:] * (len(body) // 2))
        seen = self.wait_until(lambda: sum(path.stat().st_size for path in dropped.glob("*")) > before)
        overwrite(body)
        return self.kill_worker() and seen

    def wait_until(self, happened: Callable[[], bool], seconds: float = 60.0, every: float = 0.05) -> bool:
        """Waits, not longer than `seconds` or to the run's end: what a fault waits for may also not come."""
        deadline = time.monotonic() + seconds
        while not (came := happened()) and time.monotonic() < deadline and not self.finished():
            time.sleep(every)
        return came


def end_tree(pid: int) -> None:
    """SIGKILL for a process and all that it started."""
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    for process in [parent, *parent.children(recursive=True)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def prepare(folder: Path, server: Server, faults: int) -> RunConfig:
    """The demo's model and data, with steps enough for the faults and a checkpoint each 5 steps."""
    overrides = [
        f"data={folder}/data", f"output={folder}/runs", "name=chaos", "checkpoint.every=5", "checkpoint.keep=3",
        "tracking.every=1", "tracking.experiment=chaos", f"tracking.uri=http://127.0.0.1:{server.port}",
        "cluster.max_failures=1000", "guard.hang_seconds=30", "stages.base.steps=20",
        "stages.base.warmup_steps=10", "stages.stage1.warmup_steps=10", "stages.stage2.warmup_steps=10",
        f"stages.stage1.steps={10 + 7 * faults}", f"stages.stage2.steps={10 + 20 * faults}",
        "stages.base.global_batch=16", "stages.base.micro_batch=8", "stages.stage1.global_batch=16",
        "stages.stage1.micro_batch=8", "stages.stage2.global_batch=16", "stages.stage2.micro_batch=8",
        "corpora.sprites-images.build.samples=256", "corpora.sprites-videos.build.samples=128",
    ]  # fmt: skip
    config = load_config("demo", overrides)
    (folder / "chaos.yaml").write_text(config.to_yaml())
    for verb in ("build", "encode"):
        subprocess.run([*CLI, "data", verb, str(folder / "chaos.yaml")], check=True)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the sequence of faults")
    parser.add_argument("--folder", type=Path, default=Path("chaos"), help="is removed first")
    parser.add_argument("--out", type=Path, help="write the account as JSON here")
    options = parser.parse_args()
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dice, server = random.Random(options.seed), Server(folder)
    server.start()
    config = prepare(folder, server, options.faults)
    run = Run(config)
    chaos = Chaos(folder / "chaos.yaml", run, server, dice, folder / "driver.log")
    names = list(chaos.faults)
    sequence = [*names, *dice.choices(names, k=max(0, options.faults - len(names)))][: options.faults]
    dice.shuffle(sequence)
    left = deque(sequence)
    entries: list[Entry] = []
    began = time.monotonic()
    try:
        chaos.start()
        chaos.wait_for_step(0)
        while left:
            fault = left.popleft()
            chaos.wait_for_step(0, steps=dice.randint(1, 9))
            if chaos.finished():
                break
            before = run.read_progress()
            console.print(f"{len(entries) + 1:3d}  {before['segment']} step {before['step']:3d}: {fault}")
            server.hang(False)
            chaos.given = time.monotonic()
            seen = chaos.faults[fault]()
            chaos.ensure_driver()
            if not seen:
                console.print("     that did not come: again later")
                left.append(fault)
                continue
            chaos.wait_for_step(before["attempt"], may_go_on=fault == PLAN_HANDED_OUT)
            entries.append(Entry(fault, before["segment"], before["step"], time.monotonic() - chaos.given))
        server.hang(False)
        if not server.process:
            server.start()
        while not chaos.finished():
            chaos.ensure_driver()
            time.sleep(0.5)
        assert chaos.driver
        chaos.driver.wait(timeout=PATIENCE)
        report(config, run, entries, time.monotonic() - began, options.out)
        if left:
            raise SystemExit(f"the run was finished before these could be given: {', '.join(left)}")
    finally:
        if chaos.driver:
            end_tree(chaos.driver.pid)
        server.stop()


def report(config: RunConfig, run: Run, entries: list[Entry], seconds: float, out: Path | None) -> None:
    books = audit_samples(config)
    ledger = Ledger(run.ledger_path).summary()
    table = Table(title=f"{len(entries)} faults in {seconds / 60:.0f} min")
    for column in ("fault", "times", "median s to the next step", "longest"):
        table.add_column(column)
    for fault in sorted({entry.fault for entry in entries}):
        times = [entry.seconds_to_step for entry in entries if entry.fault == fault]
        table.add_row(fault, str(len(times)), f"{median(times):.0f}", f"{max(times):.0f}")
    console.print(table)
    recomputed = books.recomputed // config.stages[-1].global_batch
    console.print(
        f"Samples planned {books.planned}, trained {books.trained}, lost {books.lost}, repeated {books.repeated}; "
        f"steps recomputed {recomputed}; {ledger.attempts} attempts; device-hours used {ledger.used:.3f}, productive "
        f"{ledger.productive:.3f}, lost {ledger.lost:.3f}, starting {ledger.starting:.3f}: goodput {ledger.goodput:.0%}"
    )
    if out:
        account = {
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPUs, {platform.machine()}",
            "entries": [asdict(entry) for entry in entries],
            "books": asdict(books),
            "ledger": asdict(ledger),
        }
        out.write_text(json.dumps(account, indent=2))
    if books.lost or books.repeated:
        raise SystemExit("the books do not balance")
    console.print("Nothing was lost and nothing repeated.")


if __name__ == "__main__":
    main()
