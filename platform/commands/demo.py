"""The demo: the whole job at desk size, by the same commands that a user would type.

Corpora are built and encoded, the schedule is trained, stage 2 is stopped half way by Ctrl-C and started again, the
model is exported, clips are generated and judged. The sample audit then checks that every planned sample was trained on
once.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.panel import Panel

from domainshuttle.pipelines.errors import counted
from domainshuttle.platform.checkpoint.store import CheckpointStore
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.console import console
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.sample_audit import SampleAudit, audit_samples
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.workers import attempts
from domainshuttle.platform.tracking.mlflow import RunIds, page_of


@dataclass
class Timer:
    """Seconds by part of the demo."""

    parts: dict[str, float]

    def run(self, name: str, *arguments: str, expect: int = 0, stop_at: tuple[Run, str, int] | None = None) -> None:
        """Runs `domainshuttle ARGUMENTS`; with `stop_at`, sends Ctrl-C when a stage has reached a step."""
        console.rule(f"[bold]{name}")
        console.print(f"$ domainshuttle {' '.join(arguments)}", style="dim")
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "domainshuttle.platform.cli", *arguments], start_new_session=True
        )
        try:
            if stop_at:
                _interrupt_at(process, *stop_at)
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
            raise
        self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - began
        if code != expect:
            raise ConfigError(f"`domainshuttle {' '.join(arguments)}` ended with code {code}; its message is above")


def run_demo(config_name: str, overrides: list[str], keep: bool) -> None:
    """Runs the demo and prints its summary.

    Raises ConfigError when a part of it fails, or samples were lost or repeated.
    """
    began = time.monotonic()
    config = load_config(config_name, overrides)
    folder = Path(config.output).parent
    if not keep:
        for path in (config.output, config.data):
            shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "config.yaml"
    source.write_text(config.to_yaml())
    run, exported, evaluation = Run(config), folder / "exported", folder / "evaluation"
    last, timer = run.segments()[-1], Timer({})
    middle = last.stage.duration.planned_steps // 2
    timer.run("Build the corpora", "data", "build", str(source))
    timer.run("Encode them", "data", "encode", str(source))
    sheet = folder / "samples.png"
    first = config.corpus(next(iter(config.corpora)), "raw").folder
    timer.run("Look at the data", "data", "inspect", str(first), "--sheet", str(sheet))
    if not _has_begun(config, last):  # an earlier demo has stopped there, or gone further
        stop_at = run, last.name, middle
        timer.run(f"Train, and stop {last.name} half way", "train", str(source), expect=3, stop_at=stop_at)
    timer.run("Train on, from the checkpoint", "train", str(source))
    timer.run("Export", "export", str(run.folder), str(exported), "--overwrite")
    timer.run("Generate and judge clips", "evaluate", str(exported), "--run", str(run.folder), "--out", str(evaluation))
    timer.run("Compare", "compare", config.tracking.experiment, "--uri", config.tracking_uri,
              "--page", str(folder / "compare.html"))  # fmt: skip
    audit = audit_samples(config)
    result = json.loads((evaluation / "identity.json").read_text())
    _print_summary(config, run, audit, result, timer, time.monotonic() - began, evaluation)
    if not result["learned"]:
        raise ConfigError(
            "the clips are not clearly closer to their own references than to others: see the table above"
        )


def _has_begun(config: RunConfig, segment: Segment) -> bool:
    """Whether a segment is trained, or has a checkpoint to go on from."""
    return segment.finished or bool(CheckpointStore.of(config).names(segment.name))


def _interrupt_at(process: subprocess.Popen[bytes], run: Run, stage: str, step: int) -> None:
    """Sends SIGINT, as Ctrl-C would, once the stage has passed a step; returns at once if the process ends before."""
    began = time.time()
    while process.poll() is None:
        state = run.read_progress()
        if state and state["time"] > began and state["segment"] == stage and state["step"] >= step:
            console.print(f"The demo now presses Ctrl-C, at step {state['step']} of {stage}.")
            os.kill(process.pid, signal.SIGINT)
            return
        time.sleep(0.2)


def _print_summary(
    config: RunConfig,
    run: Run,
    audit: SampleAudit,
    result: dict[str, float],
    timer: Timer,
    seconds: float,
    evaluation: Path,
) -> None:
    hours = Ledger(run.ledger_path).summary()
    parts = "\n".join(f"  {name:<34}{spent:6.0f} s" for name, spent in timer.parts.items())
    console.print(
        Panel.fit(
            f"[bold]Time[/]\n{parts}\n  {'in all':<34}{seconds:6.0f} s\n\n"
            f"[bold]Samples[/]  planned {audit.planned}, trained {audit.trained}, lost {audit.lost}, repeated "
            f"{audit.repeated}, trained again after a restore {audit.recomputed}, substituted {audit.substituted}\n"
            f"[bold]Workers[/]  {counted(len(attempts(run)), 'start')}, goodput {hours.goodput:.0%} of "
            f"{hours.used:.3f} device-hours\n"
            f"[bold]Learning[/] clips closest to their own reference among {int(result['candidates'])}: "
            f"[bold]{result['own']:.0%}[/]; with another subject's reference {result['other']:.0%}; chance "
            f"{result['chance']:.0%}; real clips {result['target']:.0%}\n\n"
            f"[bold]Look at[/]  {evaluation / 'report' / 'index.html'}, {evaluation / 'grid.png'} and grid.mp4\n"
            f"[bold]MLflow[/]   {page_of(RunIds.from_dict(run.read_ids() or {}, config.tracking_uri))}\n"
            f"[bold]Again[/]    domainshuttle generate {shlex.quote(str(evaluation.parent / 'exported'))} --help",
            title="The demo is done",
        ),
        soft_wrap=False,
    )
    if audit.lost or audit.repeated:
        raise ConfigError(f"the sample audit found samples that were lost or repeated: {audit}")
