"""The command line. Each verb imports what it needs when it runs, so that `--help` answers at once."""

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from domainshuttle.platform.config import RunConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Train DomainShuttle, a subject-driven text-to-video model, on Ray and DeepSpeed ZeRO-3.\n\n"
        "A run is one YAML file. The usual way: **data build** and **data encode** make the corpora, **train** runs "
        "the schedule (again after any stop: it goes on where it was), **compare** shows runs side by side, **export** "
        "and **generate** use the result. **demo** does all of it at desk size."
    ),
)
data = typer.Typer(no_args_is_help=True, help="Build, encode and inspect corpora.")
app.add_typer(data, name="data")

Config = Annotated[
    str, typer.Argument(help="A YAML file, or the name of one that ships with the package, such as demo.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key: --set cluster.workers=4 --set stages.stage1.steps=50"
    ),
]
Corpus = Annotated[list[str] | None, typer.Option("--corpus", help="Only these corpora; without it all of the file.")]


@data.command("build")
def data_build(config: Config, set_: Set = None, corpus: Corpus = None) -> None:
    """Build the raw corpora of a configuration: WebDataset shards and a Parquet index. Goes on after a stop."""
    from domainshuttle.platform.corpora import build_corpora

    settings = _load(config, set_)
    with _connected(settings, cpus=1):
        build_corpora(settings, corpus)


@data.command("encode")
def data_encode(config: Config, set_: Set = None, corpus: Corpus = None) -> None:
    """Encode raw corpora into latents and text features on a pool of Ray actors. Goes on after a stop."""
    from domainshuttle.platform.corpora import encode_corpora

    settings = _load(config, set_)
    with _connected(settings, cpus=1):
        encode_corpora(settings, corpus)


@data.command("inspect")
def data_inspect(
    index: Annotated[Path, typer.Argument(help="An index.parquet, or the folder it is in.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet PNG of samples here.")] = None,
    samples: Annotated[int, typer.Option(help="Samples on the sheet.")] = 8,
    where: Annotated[str | None, typer.Option(help="A filter, such as: frames > 1 and references >= 2")] = None,
) -> None:
    """Show what a corpus holds: counts by source, bucket, domain and references; and pictures of it."""
    from domainshuttle.platform.corpora import inspect_corpus

    inspect_corpus(index, sheet, samples, where)


@app.command()
def plan(config: Config, set_: Set = None) -> None:
    """Show what a run would train: stages, data, buckets, trained parameters and the cost of a step."""
    from domainshuttle.platform.planner import print_plan

    print_plan(_load(config, set_))


@app.command()
def train(
    config: Config,
    set_: Set = None,
    fresh: Annotated[bool, typer.Option(help="Remove what a run of this name has made, and start anew.")] = False,
) -> None:
    """Train the schedule of a configuration, or go on with it: the same command starts and resumes a run.

    Ctrl-C writes a checkpoint and stops; a second one stops at once, and the next start goes back to the checkpoint
    before.
    """
    from domainshuttle.platform.driver import prepare_run, run_training

    settings = _load(config, set_)
    run = prepare_run(settings, fresh)
    needs = settings.cluster.workers * settings.cluster.cpus_per_worker + 1
    with _connected(settings, cpus=needs, gpus=settings.cluster.workers * settings.cluster.gpus_per_worker):
        raise SystemExit(run_training(run))


@app.command()
def submit(
    config: Config,
    set_: Set = None,
    address: Annotated[str, typer.Option(help="The cluster's dashboard.", envvar="RAY_API_SERVER_ADDRESS")] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Follow the job's log until it ends.")] = False,
) -> None:  # fmt: skip
    """Submit a training run to a Ray cluster, as `ray job submit -- domainshuttle train CONFIG` would."""
    from domainshuttle.cluster.submit import submit_training
    from domainshuttle.platform.console import console

    settings = _load(config, set_)
    job = submit_training(settings.to_yaml(), settings.name, address)
    console.print(f"Submitted job [bold]{job.id}[/] to {address}. Follow it with: ray job logs --follow {job.id}")
    if wait:
        for text in job.follow():
            sys.stdout.write(text)
        raise SystemExit(0 if job.succeeded() else 1)


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run's folder: <output>/<name> of its configuration.")]) -> None:
    """Show where a run is: stages, progress, last losses, checkpoints, device-hours, quarantine."""
    from domainshuttle.platform.status import print_status

    print_status(run)


@app.command()
def compare(
    experiment: Annotated[list[str], typer.Argument(help="Names of MLflow experiments.")],
    uri: Annotated[str | None, typer.Option(help="MLflow server or store.", envvar="MLFLOW_TRACKING_URI")] = None,
    run: Annotated[list[str] | None, typer.Option(help="Only runs of this name or id.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the loss curves as PNG here.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write table and curves as one HTML page here.")] = None,
) -> None:
    """Compare the runs of experiments: a table, and curves against steps and device-hours."""
    from domainshuttle.platform import compare as comparison
    from domainshuttle.platform.console import console

    store = uri or _nearest_store()
    rows = comparison.compare(store, experiment, run or ())
    comparison.print_table(rows, console)
    if plot or page:
        picture = comparison.plot(store, rows, plot or page.with_suffix(".png"))  # type: ignore[union-attr]
        console.print(f"Curves: {picture}")
        if page:
            console.print(f"Page: {comparison.write_page(rows, picture, page, ', '.join(experiment))}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the diffusers pipeline.")],
    stage: Annotated[str | None, typer.Option(help="A finished stage; without it the last finished one.")] = None,
) -> None:
    """Export a trained model as a diffusers folder: transformer, encoders, tokenizer and scheduler."""
    from domainshuttle.platform.console import console
    from domainshuttle.platform.export import export_run
    from domainshuttle.platform.schedule import find_run

    exported = export_run(find_run(run), folder, stage)
    console.print(f"Exported {exported} to {folder}. Next: domainshuttle generate {folder} --help")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="An exported folder, or a hub id.")],
    prompt: Annotated[str | None, typer.Option(help="What the clip shows.")] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="PICTURE[:SUBJECT[:DOMAIN]]", help="A reference: photo.jpg:0:human. Repeat for more."),
    ] = None,
    cases: Annotated[Path | None, typer.Option(help="A JSONL of cases in the release's format.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the clips.")] = Path("generated"),
    height: int = 480,
    width: int = 832,
    frames: int = 81,
    steps: int = 40,
    guidance: float = 5.0,
    reference_guidance: Annotated[
        float | None, typer.Option(help="Also move away from the clip without references.")
    ] = None,
    fps: float = 16.0,
    seed: int = 0,
) -> None:  # fmt: skip
    """Generate clips with an exported model, from a prompt and reference pictures, or from a file of cases."""
    from domainshuttle.platform.generate import Sampling, generate_clips

    sampling = Sampling(height, width, frames, steps, guidance, reference_guidance, fps, seed)
    generate_clips(model, prompt, reference or [], cases, out, sampling)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, whose configuration names the held-out corpus.")],
    model: Annotated[Path, typer.Argument(help="The exported model.")],
    out: Annotated[Path, typer.Option(help="Folder for table, grid and clips.")] = Path("evaluation"),
) -> None:
    """Measure on held-out identities whether clips show their own subject; write the table, a grid and clips."""
    from domainshuttle.platform.evaluation.identity import evaluate_run
    from domainshuttle.platform.schedule import find_run

    evaluate_run(find_run(run), model, out)


@app.command()
def demo(
    config: Annotated[str, typer.Argument(help="The configuration to run.")] = "demo",
    set_: Set = None,
    keep: Annotated[bool, typer.Option(help="Go on with what an earlier demo left, instead of starting anew.")] = False,
) -> None:
    """Run the whole job at desk size: corpora, both stages with a stop and a resume, export, clips, evaluation."""
    from domainshuttle.platform.demo import run_demo

    run_demo(config, set_ or [], keep)


def _load(config: str, overrides: list[str] | None) -> "RunConfig":
    from domainshuttle.platform.config import load_config

    return load_config(config, overrides)


@contextlib.contextmanager
def _connected(settings: "RunConfig", cpus: float, gpus: float = 0.0) -> Iterator[None]:
    from domainshuttle.cluster.local import Connection, Resources

    remedy = "Add nodes, or ask for less: --set cluster.workers=1, or --set cluster.cpus_per_worker=0.5"
    with Connection(settings.cluster.address, Resources(cpus, gpus, remedy), settings.cluster.dashboard_port):
        yield


def _nearest_store() -> str:
    """The sqlite store of the demo in this folder."""
    from domainshuttle.platform.config import ConfigError

    path = Path("demo/runs/mlflow.db")
    if not path.is_file():
        raise ConfigError("which MLflow store? Give --uri sqlite:///path/to/mlflow.db or a server's address")
    return f"sqlite:///{path.absolute()}"


def main() -> Any:
    """The entry point: known mistakes end with one message, Ctrl-C with exit code 130."""
    # a shell may start us with SIGINT ignored; Ctrl-C from another program and SIGTERM must stop us all the same
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # imported by a library of a library, it warns on every start that it found no GPU
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        from domainshuttle.platform.console import errors

        errors.print("Stopped. The same command goes on where it was.")
        raise SystemExit(130) from None
    except Exception as error:
        if not _is_known(error):
            raise
        from domainshuttle.platform.console import fail

        raise fail(str(error)) from None


def _is_known(error: Exception) -> bool:
    """Whether an error is a message for the user rather than a fault of ours."""
    known = ("ConfigError", "DataError", "ClusterError", "CheckpointError", "LookupError", "ConnectionError")
    return any(kind.__name__ in known for kind in type(error).__mro__)


if __name__ == "__main__":
    main()
