"""The command line. Each verb imports what it needs when it runs, so that `--help` answers at once."""

import contextlib
import json
import logging
import math
import re
import shlex
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from domainshuttle.pipelines.quarantine import MOST_BAD_IN_CORPUS
from domainshuttle.platform import output
from domainshuttle.platform.report.help import Application, Group

if TYPE_CHECKING:
    from domainshuttle.cluster.local import Connection
    from domainshuttle.cluster.submit import Job
    from domainshuttle.platform.config.schema import CorporaConfig, RunConfig

app = Application(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Train DomainShuttle, a subject-driven text-to-video model, on Ray and DeepSpeed ZeRO-3.\n\n"
        "A run is one YAML file. The usual way: `data build` and `data encode` make the corpora, `train` runs the "
        "schedule (again after any stop: it goes on where it was), `compare` shows runs side by side, `export` and "
        "`generate` use the result. `demo` does all of it at desk size. What a run does: `status`.\n\n"
        "Exit codes:\n\n"
        "    0    done\n"
        "    1    a check failed, damage was found, or a fault of this program\n"
        "    2    a mistake in what was asked for, or a fault of the environment\n"
        "    3    training was stopped, or its budget is spent: the same command goes on\n"
        "    130  stopped by Ctrl-C\n"
        "    141  nobody reads the output any more (`| head`)"
    ),
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        sys.stdout.write(f"domainshuttle {version('domainshuttle')}\n")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


cluster = Application(no_args_is_help=True, help="Render manifests for KubeRay or VMs, and check those that you have.")
app.add_typer(cluster, name="cluster")

data = Application(no_args_is_help=True, help="Build, index, pair, encode, verify and inspect corpora.")
app.add_typer(data, name="data")


class _ModelsFirst(Group):
    """`evaluate MODEL` is short for the command `evaluate models MODEL`: what is no command's name is a model or an
    option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["models", *args]
        return super().parse_args(ctx, args)


evaluation = Application(
    no_args_is_help=True,
    cls=_ModelsFirst,
    help=(
        "Judge models on a test set: `evaluate MODEL --cases paper` makes and measures clips and writes a report. "
        "`evaluate models --help` has all options."
    ),
)
app.add_typer(evaluation, name="evaluate")


def _local(value: Any) -> Any:
    """Refuses the address of a store where a path is expected: a folder of that name would be made here.

    A Path has already made one slash of two.
    """
    for one in value if isinstance(value, list) else [value]:
        found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):(/.*)", str(one)) if isinstance(one, Path) else None
        if found is not None and not one.exists():
            from domainshuttle.platform.config.schema import ConfigError

            given = f"{found[1]}:{'//' if found[1] == 'file' else '/'}{found[2]}"
            raise ConfigError(f"{given} is an address, and a local or shared path is needed")
    return value


RunFolder = Annotated[Path, typer.Argument(callback=_local, help="A run's folder: OUTPUT/NAME of its configuration.")]
Config = Annotated[
    str, typer.Argument(help="A YAML file, or the name of one that ships with the package, such as demo.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the configuration: --set cluster.workers=4 --set stages.stage1.steps=50.",
    ),
]
EvaluationSet = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the evaluation, such as repeats=3."),
]
Fresh = Annotated[bool, typer.Option(help="Remove what a run of this name has made, and start anew.")]
Stage = Annotated[str | None, typer.Option(metavar="STAGE", help="Only this stage, or this segment of it.")]
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|NAME|PATH|none",
        help="Where to go on: auto, the newest whole checkpoint; one by its name or path; none, the stage's beginning.",
    ),
]
MostBad = Annotated[
    float, typer.Option(min=0, max=1, metavar="SHARE", help="Largest share of bad samples or shards that is accepted.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="Ray's own address of a running cluster, port 6379. Without it RAY_ADDRESS; else one is started here.",
    ),
]
Dashboard = Annotated[
    str | None,
    typer.Option(
        "--dashboard",
        metavar="URL",
        help="The cluster's dashboard, http://HOST:8265. Without it RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else that of "
        "this machine.",
    ),
]
FormerDashboard = Annotated[str | None, typer.Option("--address", hidden=True)]  # its name until November 2026
Corpus = Annotated[
    list[str] | None, typer.Option("--corpus", metavar="NAME", help="Only this corpus; without it all of the file.")
]


@data.command("build")
def data_build(config: Config, set_: Set = None, corpus: Corpus = None, most_bad: MostBad = MOST_BAD_IN_CORPUS) -> None:
    """Build the raw corpora of a configuration: WebDataset shards and a Parquet index. Goes on after a stop."""
    settings = _load_corpora(config, set_)
    from domainshuttle.platform.commands.data import build_corpora, check_sources
    from domainshuttle.platform.driver.ray_cluster import connected

    check_sources(settings, corpus)  # before a cluster is asked for anything
    with connected(settings):
        build_corpora(settings, corpus, most_bad)


@data.command("pair")
def data_pair(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|CORPUS",
            help="A YAML file, or the name of one that ships with the package; or a raw corpus's folder or index.",
        ),
    ],
    set_: Set = None,
    corpus: Corpus = None,
    to: Annotated[
        Path | None,
        typer.Option(callback=_local, help="For one CORPUS: the folder for its pairs, without it `paired` beside it."),
    ] = None,
    most_bad: MostBad = MOST_BAD_IN_CORPUS,
    address: RayAddress = None,
) -> None:
    """Cut the subjects of raw corpora out of other frames and other clips, so that each has several pictures.

    For each subject's word Grounding DINO finds boxes in frames of the clip, of other clips of its video, or of the
    clip that an edited one was made of; SAM 2 makes masks of them, and what they cover is cut out on white. DINOv2 and
    CLIP keep what is the same subject and no near-duplicate. A multimodal model may look at each pair.

    The corpus's `pair` section names the models' folders, which you download first, such as:

        hf download IDEA-Research/grounding-dino-tiny --local-dir models/detector
        hf download facebook/sam2.1-hiera-large --local-dir models/sam2
        hf download facebook/dinov2-base --local-dir models/dinov2
        hf download openai/clip-vit-base-patch32 --local-dir models/clip

    Raw shards are made in DATA/NAME/paired, which `data encode` then reads. From a configuration, or of a corpus
    without one:

        domainshuttle data pair configs/corpora/ditto.yaml
        domainshuttle data pair data/mine/raw \\
            --set pair.models.detector=models/detector \\
            --set pair.models.segmenter=models/sam2 \\
            --set pair.models.dino=models/dinov2 --set pair.models.clip=models/clip

    Goes on after a stop. With other thresholds (docs/datasets.md) only the choice is made again, in minutes and without
    GPUs. What was rejected and why:

        domainshuttle data inspect DATA/NAME/paired --page pairs.html
    """
    from domainshuttle.pipelines.storage.uri import is_remote

    if is_remote(config) or Path(config).is_dir() or config.endswith(".parquet"):
        from domainshuttle.platform.config.loading import load_pair

        if corpus:
            from domainshuttle.platform.config.schema import ConfigError

            raise ConfigError("--corpus chooses among those of a configuration: leave it out beside a corpus's folder")
        pair = load_pair(set_)
        from domainshuttle.platform.commands.data_pair import folder_job, pair_corpora

        job = folder_job(config, pair, to)
        with _ray(address):
            pair_corpora([job], most_bad)
        return
    settings = _load_corpora(config, set_)
    from domainshuttle.platform.commands.data_pair import configured_jobs, pair_corpora
    from domainshuttle.platform.driver.ray_cluster import connected

    jobs = configured_jobs(settings, corpus)
    with connected(settings):
        pair_corpora(jobs, most_bad)


@data.command("label")
def data_label(
    corpus: Annotated[
        str, typer.Argument(metavar="CORPUS|CONFIG", help="The folder or URI of a raw corpus, or a configuration.")
    ],
    set_: Set = None,
    only: Corpus = None,
    ask_again: Annotated[
        bool, typer.Option("--ask-again", help="Ask a model again where it refused or gave no proper answer.")
    ] = False,
    address: RayAddress = None,
) -> None:
    """Label raw corpora: captions, subjects' words, and each subject's domain in the target. Goes on after a stop.

    By default what is missing is labelled: captions that are empty or edit commands, subjects without a word,
    domains that no source gave. Labels lie beside the shards, in `labels/`, so that no clip is copied; encoding
    and training read them. When a corpus grows, only what is new is labelled.

    Who labels is said by `labels` in the configuration (docs/datasets.md), or on the command line:

    Word lists, which need no model and write no captions:

        domainshuttle data label data/uno/raw

    An OpenAI-compatible endpoint, such as `vllm serve Qwen/Qwen3-VL-8B-Instruct`:

        domainshuttle data label data/uno/raw --set labels.labeller=endpoint \\
            --set labels.endpoint.url=http://gpu-node:8000/v1 \\
            --set labels.endpoint.model=Qwen/Qwen3-VL-8B-Instruct

    A model of transformers on the cluster's own GPUs:

        domainshuttle data label data/uno/raw --set labels.labeller=transformers \\
            --set labels.model=models/Qwen3-VL-8B-Instruct \\
            --set labels.actors.gpus=1

    What a model refuses, or answers badly or with little certainty, word lists label; each such sample is counted
    and listed with its reason in `labels/failed.jsonl`. All answers are kept, so that nothing is asked or paid twice.
    """
    from domainshuttle.pipelines.storage.uri import is_remote, parent

    if is_remote(corpus) or Path(corpus).is_dir() or corpus.endswith(".parquet"):
        from domainshuttle.platform.config.loading import load_labels

        if only:
            from domainshuttle.platform.config.schema import ConfigError

            raise ConfigError("--corpus chooses among those of a configuration: leave it out beside a corpus's folder")
        labels = load_labels(set_)
        from domainshuttle.platform.commands.labels import folder_job, label_corpora

        with _ray(address):
            label_corpora([folder_job(parent(corpus) if corpus.endswith(".parquet") else corpus)], labels, ask_again)
        return
    settings = _load_corpora(corpus, set_)
    from domainshuttle.platform.commands.data import chosen_corpora, label_configured
    from domainshuttle.platform.driver.ray_cluster import connected

    chosen_corpora(settings, only)
    with connected(settings):
        label_configured(settings, only, ask_again)


@data.command("encode")
def data_encode(
    config: Config,
    set_: Set = None,
    corpus: Corpus = None,
    most_bad: MostBad = MOST_BAD_IN_CORPUS,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove whole encoded corpora of other data or encoders.")
    ] = False,
    where: Annotated[
        str | None, typer.Option(metavar="FILTER", help="Only raw samples for which a filter holds: seconds >= 2")
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", hidden=True)] = False,  # its name until November 2026
) -> None:
    """Encode raw corpora into latents and text features on a pool of Ray actors. Goes on after a stop.

    After samples were added, changed or removed, only those are encoded; of new captions only the captions.
    """
    settings = _load_corpora(config, set_)
    from domainshuttle.pipelines.index.filter import RowFilter
    from domainshuttle.platform.commands.data import chosen_corpora, encode_corpora
    from domainshuttle.platform.driver.ray_cluster import connected

    chosen_corpora(settings, corpus)
    if where is not None:
        RowFilter.columns(where)
    with connected(settings):
        encode_corpora(settings, corpus, overwrite or anew, most_bad, where)


@data.command("index")
def data_index(
    folder: Annotated[str, typer.Argument(help="Folder or URI of the shards: name.tar, uncompressed WebDataset tars.")],
    corpus: Annotated[
        str | None, typer.Option(metavar="NAME", help="The corpus's name; without it that of the index before.")
    ] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(metavar="FxHxW", help="Frames x height x width to fit samples to, such as 81x480x832."),
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(metavar="480p|720p", help="All shapes of a class, with --frames.")
    ] = None,
    frames: Annotated[list[int] | None, typer.Option(help="Number of frames, for --resolution: 1 for images.")] = None,
    fps: Annotated[
        float | None, typer.Option(help="Rate at which clips are sampled; without it each clip's own.")
    ] = None,
    most_bad: MostBad = MOST_BAD_IN_CORPUS,
    shards: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only shards of this pattern, without .tar, such as 'part-00*'.")
    ] = "*",
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the index file in the folder.")] = "index.parquet",
    merge: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Join this index of the folder with others, instead of reading shards."),
    ] = None,
    address: RayAddress = None,
) -> None:
    """Index shards that exist already, a Ray task a shard; again after changes: only new and changed ones are read.

    Each sample is `key.json` (caption, subjects, references: docs/corpus.md), its target and its reference pictures.
    What is not whole or not understood is left out and listed in `quarantine.jsonl` with shard, key and reason.

        domainshuttle data index data/mine/raw --corpus mine --resolution 480p \\
            --frames 81 --frames 1 --fps 16

    Two jobs can share a folder: each with its own `--shards 'a-*' --name a.parquet`, and at the end
    `--merge a.parquet --merge b.parquet`.
    """
    from domainshuttle.platform.commands import data_index as data_checks

    if merge:
        data_checks.join_indexes(merge, folder, most_bad, name)
        return
    buckets = data_checks.chosen_buckets(bucket or [], resolution, frames or [])
    described = data_checks.described_as(folder, corpus, fps, buckets)
    with _ray(address):
        data_checks.index_shards(folder, described, buckets, most_bad, shards, name)


@data.command("verify")
def data_verify(
    index: Annotated[str, typer.Argument(help="An index.parquet, or the folder or URI it is in.")],
    checksums: Annotated[bool, typer.Option(help="Read every byte and compare it with the index's checksum.")] = True,
    decode: Annotated[str, typer.Option(metavar="N|all", help="Samples to decode, evenly spread.")] = "100",
    where: Annotated[
        str | None, typer.Option(metavar="FILTER", help="Only samples for which a filter holds: references >= 2")
    ] = None,
    address: RayAddress = None,
) -> None:
    """Check a corpus against its index: bytes, members, descriptions, pictures, clips and latents.

    Every fault is a row of `verify.jsonl` beside the index. The exit code is 1 where there are any.
    """
    from domainshuttle.platform.commands.data_index import require_verifiable, verify_corpus

    require_verifiable(index, decode, where)
    with _ray(address):
        whole = verify_corpus(index, checksums, decode, where)
    raise SystemExit(0 if whole else 1)


@data.command("inspect")
def data_inspect(
    index: Annotated[str, typer.Argument(help="An index.parquet, or the folder or URI it is in.")],
    sheet: Annotated[
        Path | None, typer.Option(callback=_local, help="Write a contact sheet PNG of samples here.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            callback=_local, help="Write an HTML page here: counts as plots, the sheet, what was found and rejected."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples on the sheet and on the page.")] = 8,
    where: Annotated[
        str | None, typer.Option(metavar="FILTER", help="A filter, such as: frames > 1 and references >= 2")
    ] = None,
) -> None:
    """Show what a corpus holds: counts by source, bucket, domain and references; and pictures of it.

    The page of cross pairs has, of some samples, the boxes and masks on the frames, what was cut out and became a
    reference picture, and what was rejected with the reason.
    """
    _require_png("--sheet", sheet)
    from domainshuttle.platform.commands.data import inspect_corpus

    inspect_corpus(index, sheet, samples, where, page)


@cluster.command("render")
def cluster_render(
    target: Annotated[
        Literal["kuberay", "vm", "mlflow", "monitoring"],
        typer.Argument(help="What manages the cluster, or a part of it."),
    ],
    config: Config,
    spec: Annotated[
        str,
        typer.Option(
            "--cluster", metavar="CLUSTER", help="The cluster's description: a YAML file, or h100-1, h100-8, h100-64."
        ),
    ],
    out: Annotated[Path, typer.Option(callback=_local, help="Folder for the files.")] = Path("manifests"),
    set_: Set = None,
    spec_set: Annotated[
        list[str] | None,
        typer.Option(
            "--cluster-set", metavar="KEY=VALUE", help="Override a key of the cluster, such as trainers.nodes=4."
        ),
    ] = None,
) -> None:
    """Write what starts a run on a cluster, from one description of it (docs/cluster.md).

    `kuberay`: RayJob, RayCluster, disruption budget, network policy, MLflow, monitors, alerts. `vm`: the YAML of
    `ray up`, Prometheus' files and a dashboard. `mlflow` and `monitoring`: these alone.
    """
    settings = _load(config, set_)
    from domainshuttle.platform.commands.cluster import render_cluster
    from domainshuttle.platform.config.loading import load_cluster

    render_cluster(target, settings, load_cluster(spec, spec_set), out)


@cluster.command("check")
def cluster_check(
    files: Annotated[
        list[Path],
        typer.Argument(callback=_local, exists=True, dir_okay=False, help="YAML files with RayJobs, RayClusters."),
    ],
) -> None:
    """Print what KubeRay's operator would refuse of manifests that their schema accepts; code 1 where it would."""
    from domainshuttle.platform.commands.cluster import check_manifests

    raise SystemExit(0 if check_manifests(files) else 1)


@app.command()
def plan(
    config: Config,
    set_: Set = None,
    parameters: Annotated[bool, typer.Option(help="Print which parameters each stage trains, by group.")] = False,
    deepspeed: Annotated[bool, typer.Option(help="Print DeepSpeed's derived configuration of each stage.")] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Estimate time and disk space to encode so many samples per corpus.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="CLUSTER",
            help="What the run is to be trained on: a cluster's YAML file, or h100-1, h100-8, h100-64.",
        ),
    ] = None,
    cluster_set: Annotated[
        list[str] | None,
        typer.Option(
            "--cluster-set", metavar="KEY=VALUE", help="Override a key of the cluster, such as trainers.nodes=4."
        ),
    ] = None,
) -> None:
    """Show what a run would train and what it takes: stages, data, memory, time, hours, cost, and layouts that fit.

    Needs no GPU, no weights and no network for Wan's sizes (docs/planning.md).
    """
    settings = _load(config, set_)
    from domainshuttle.platform.commands.plan import print_parameters, print_plan
    from domainshuttle.platform.engine.deepspeed_config import deepspeed_configs

    if parameters:
        print_parameters(settings)
    elif deepspeed:
        sys.stdout.write(json.dumps(deepspeed_configs(settings), indent=2) + "\n")
    else:
        from domainshuttle.platform.config.loading import load_cluster
        from domainshuttle.platform.config.schema import ConfigError

        if cluster_set and not cluster:
            raise ConfigError("--cluster-set changes the cluster that --cluster names: give both, such as h100-8")
        print_plan(settings, samples, load_cluster(cluster, cluster_set) if cluster else None)


@app.command()
def train(
    config: Config,
    set_: Set = None,
    fresh: Fresh = False,
    stage: Stage = None,
    resume: Resume = "auto",
    stopped_code: Annotated[
        int,
        typer.Option(
            min=0,
            max=255,
            help="Exit code after a stop, or when the budget is spent. Give 0 where failed jobs are started again.",
        ),
    ] = 3,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Check the cluster first, as `preflight` does; train only if it passes.")
    ] = False,
) -> None:
    """Train the schedule of a configuration, or go on with it: the same command starts and resumes a run.

    Ctrl-C writes a checkpoint and stops; a second one stops at once, and the next start goes back to the checkpoint
    before.
    """
    from domainshuttle.cluster.local import in_job

    if in_job():
        output.date_lines()
    settings = _load_run(config, set_)  # before what takes seconds to import: a mistake is answered at once
    from domainshuttle.platform.driver.driver import STOPPED, train_run

    if preflight:
        from domainshuttle.platform.commands.preflight import require_preflight

        require_preflight(settings)
    code = train_run(settings, fresh, stage, resume)
    if code == STOPPED:
        code = stopped_code
        if in_job():
            from domainshuttle.cluster.submit import exit_line

            sys.stdout.write(exit_line(code, "stopped") + "\n")
    raise SystemExit(code)


class CheckedPart(StrEnum):
    """A part of a preflight."""

    NODES = "nodes"
    STORAGE = "storage"
    SERVICES = "services"
    GROUP = "group"


@app.command("preflight")
def preflight_command(
    config: Config,
    set_: Set = None,
    spec: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="CLUSTER", help="The cluster's description, whose devices and links are expected."
        ),
    ] = None,
    only: Annotated[
        list[CheckedPart] | None,
        typer.Option(help="Only this part."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list, for programs.")] = False,
) -> None:
    """Check a cluster for a run: nodes and GPUs, storage, MLflow, data, links, and two steps of the largest batch.

    Each check passes, warns (a tool is missing, or a doubt) or fails, with the node or link and what to do. Code 1
    where one failed.
    """
    settings = _load(config, set_)
    from domainshuttle.platform.commands.preflight import preflight
    from domainshuttle.platform.config.loading import load_cluster

    good = preflight(settings, load_cluster(spec) if spec else None, [str(one) for one in only or []], json_)
    raise SystemExit(0 if good else 1)


@app.command()
def submit(
    config: Config,
    set_: Set = None,
    fresh: Fresh = False,
    stage: Stage = None,
    resume: Resume = "auto",
    dashboard: Dashboard = None,
    address: FormerDashboard = None,
    wait: Annotated[bool, typer.Option(help="Follow the job's log until it ends, and end with its exit code.")] = False,
    preflight: Annotated[bool, typer.Option(help="Check the cluster first, as `preflight` does.")] = True,
) -> None:  # fmt: skip
    """Submit a training run to a Ray cluster, as `ray job submit -- domainshuttle train CONFIG` would.

    This tree goes with it, as a wheel; the cluster's image has the dependencies. A run that is being trained is not
    submitted a second time; one that has stopped goes on.
    """
    from domainshuttle.cluster.submit import overriding_address, submit_training
    from domainshuttle.platform.console import console, errors
    from domainshuttle.platform.report.text import Advice, Prose
    from domainshuttle.platform.run.folder import Run

    settings = _load_run(config, set_)
    Run(settings).choose(stage)  # before the cluster is asked for anything
    options = [*(["--fresh"] if fresh else []), *(["--stage", stage] if stage else []), "--resume", resume]
    options += ["--preflight"] if preflight else []
    dashboard = dashboard or address
    if told := overriding_address(dashboard):
        errors.print(Prose(told))
    about = {"output": settings.output, "config": settings.digest()}
    grace = math.ceil(settings.grace_seconds)
    job = submit_training(settings.to_yaml(), settings.name, dashboard, options, grace, about)
    if warning := job.open_warning():
        errors.print(Prose(warning))
    console.print(Prose(f"Submitted job {job.id} to {job.address}."))
    console.print(Advice("Follow it:", job.log_command()))
    console.print(Advice("Stop it, with a checkpoint:", job.stop_command()))
    if wait:
        raise SystemExit(_follow(job))


def _follow(job: "Job") -> int:
    """Prints a job's log until it ends; its exit code."""
    try:
        last = "\n"
        for text in job.follow():
            sys.stdout.write(text)
            sys.stdout.flush()
            last = text or last
        if not last.endswith("\n"):  # as Ray ends the log of a job that it lost
            sys.stdout.write("\n")
        return job.exit_code()
    except KeyboardInterrupt:
        if not output.reader_gone():
            from domainshuttle.platform.console import errors
            from domainshuttle.platform.report.text import Advice

            errors.print(Advice("The job goes on. Follow it:", job.log_command()))
        raise


@app.command()
def jobs(
    dashboard: Dashboard = None,
    address: FormerDashboard = None,
    follow: Annotated[
        str | None, typer.Option(metavar="JOB", help="Follow this job's log until it ends; end with its exit code.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list, for programs.")] = False,
) -> None:  # fmt: skip
    """List the jobs of a cluster that train runs, the newest first; or follow one."""
    from domainshuttle.cluster.submit import find_job, list_jobs, overriding_address
    from domainshuttle.platform.commands.jobs import print_jobs
    from domainshuttle.platform.console import errors
    from domainshuttle.platform.report.text import Prose

    dashboard = dashboard or address
    if told := overriding_address(dashboard):
        errors.print(Prose(told))
    if follow:
        raise SystemExit(_follow(find_job(follow, dashboard)))
    print_jobs(list_jobs(dashboard), json_)


@app.command()
def status(
    run: RunFolder,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
    watch: Annotated[
        float | None, typer.Option(min=0.5, metavar="SECONDS", help="Print it again every so many seconds.")
    ] = None,
) -> None:
    """Show where a run is: what it does now and why, stages, workers, losses, checkpoints, device-hours, quarantine."""
    from domainshuttle.platform.commands.status import print_status, status_record, watch_status

    if watch is not None:
        watch_status(run, watch, json_)
    elif json_:
        sys.stdout.write(json.dumps(status_record(run), indent=2, allow_nan=False) + "\n")
    else:
        print_status(run)


@app.command()
def runs(
    folder: Annotated[
        Path, typer.Argument(callback=_local, help="The folder of the runs: OUTPUT of their configurations.")
    ],
) -> None:
    """List the runs of a folder: what each does, its stage and step, loss, device-hours."""
    from domainshuttle.platform.commands.runs import print_runs

    print_runs(folder)


@app.command()
def stop(
    run: RunFolder,
    wait: Annotated[bool, typer.Option(help="Wait until it has stopped.")] = True,
) -> None:
    """Stop a run that is at work, from any machine that sees its folder: a checkpoint, then `train` ends with code 3.

    The exit code is 1 where it failed meanwhile.
    """
    from domainshuttle.platform.commands.runs import stop_run

    raise SystemExit(0 if stop_run(run, wait) else 1)


@app.command()
def logs(
    run: RunFolder,
    rank: Annotated[int, typer.Option(min=0, help="The worker's rank.")] = 0,
    attempt: Annotated[
        int | None,
        typer.Option(min=1, help="The start of the workers, as `status` counts them; without it the last."),
    ] = None,
    follow: Annotated[bool, typer.Option(help="Go on printing what comes, until the run ends.")] = False,
) -> None:
    """Show what a worker of a run printed: its steps, its libraries' warnings, an error's traceback."""
    from domainshuttle.platform.commands.logs import print_logs

    print_logs(run, rank, attempt, follow)


@app.command()
def stacks(
    run: RunFolder,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Print the stacks of this worker's threads; without it where each is.")
    ] = None,
) -> None:
    """Show where the workers of a run at work are in their code, without stopping them. Code 1: one did not answer."""
    from domainshuttle.platform.commands.look import print_stacks

    raise SystemExit(0 if print_stacks(run, rank) else 1)


@app.command()
def profile(
    run: RunFolder,
    rank: Annotated[int, typer.Option(min=0, help="The worker's rank.")] = 0,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Seconds until it gives up.")] = 600.0,
) -> None:
    """Profile the next step of a worker of a run at work with torch's profiler, without stopping it."""
    from domainshuttle.platform.commands.look import print_profile

    print_profile(run, rank, timeout)


@app.command()
def checkpoints(
    run: RunFolder,
    verify: Annotated[bool, typer.Option(help="Read every byte and compare checksums.")] = False,
) -> None:
    """List a run's checkpoints: step, size, workers, whether each is whole, and why it is kept.

    With `--verify` the exit code is 1 where one is damaged.
    """
    from domainshuttle.platform.commands.checkpoints import print_checkpoints

    whole = print_checkpoints(run, verify)
    raise SystemExit(0 if whole or not verify else 1)


@app.command()
def flush(
    run: RunFolder,
    uri: Annotated[
        str | None, typer.Option(metavar="URI", help="Another MLflow server or store than the run's own.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Seconds until it gives up.")] = 600.0,
) -> None:
    """Send to MLflow what a run could not send while the server was unreachable. A run that goes on does it itself."""
    from domainshuttle.platform.commands.flush import flush_run

    raise SystemExit(0 if flush_run(run, uri, timeout) else 1)


@app.command()
def compare(
    experiment: Annotated[list[str], typer.Argument(help="Names of MLflow experiments.")],
    uri: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="MLflow server or store: http://HOST:5000, sqlite:///runs/mlflow.db.",
            envvar="MLFLOW_TRACKING_URI",
        ),
    ] = None,
    run: Annotated[list[str] | None, typer.Option(metavar="NAME|ID", help="Only runs of this name or id.")] = None,
    plot: Annotated[Path | None, typer.Option(callback=_local, help="Write the loss curves as PNG here.")] = None,
    page: Annotated[
        Path | None, typer.Option(callback=_local, help="Write table, curves and samples as one HTML page here.")
    ] = None,
) -> None:
    """Compare the runs of experiments: a table, and curves against steps and device-hours."""
    _require_png("--plot", plot)
    from domainshuttle.platform.commands import compare as comparison
    from domainshuttle.platform.console import console
    from domainshuttle.platform.report.text import Prose

    store = uri or _nearest_store()
    rows = comparison.compare(store, experiment, run or ())
    comparison.print_table(rows, console)
    if plot or page:
        from domainshuttle.platform.commands import compare_page, curves

        picture = curves.plot(store, rows, plot or page.with_suffix(".png"))  # type: ignore[union-attr]
        console.print(Prose(f"Curves: {picture}"))
        if page:
            written = compare_page.write_page(store, rows, picture, page, ", ".join(experiment))
            console.print(Prose(f"Page: {written}"))
    if shown := comparison.mlflow_page(store, rows):
        console.print(f"MLflow's page of these runs: {shown}", markup=False)


@app.command()
def ablate(
    ablation: Annotated[str, typer.Argument(help="A file, or the name of one that ships, such as demo.")],
    set_: Set = None,
    only: Annotated[list[str] | None, typer.Option(metavar="VARIANT", help="Only this variant.")] = None,
) -> None:
    """Train the variants of a configuration one after the other, evaluate and compare them. Goes on after a stop."""
    from domainshuttle.platform.commands.ablation import run_ablation

    run_ablation(ablation, set_ or [], only or [])


@app.command()
def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(callback=_local, help="Where to write the diffusers pipeline.")],
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="A finished stage; without it the last finished one.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH", help="A checkpoint's name or path, also of a stage half way, instead of a stage."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a pipeline that is there.")] = False,
    lora: Annotated[
        bool,
        typer.Option(
            "--lora", help="The adapters alone, for load_lora_weights of diffusers, of a stage that trains them."
        ),
    ] = False,
) -> None:
    """Export a trained model as a diffusers folder: transformer, encoders, tokenizer and scheduler.

    Another run can begin with it: `--set model.base=FOLDER`. Adapters of stages with `trained.lora` are merged into
    the weights, and lie in its folder `lora` too. Needs no cluster.
    """
    from domainshuttle.platform.console import console
    from domainshuttle.platform.generation.adapters import export_lora
    from domainshuttle.platform.generation.export import export_run
    from domainshuttle.platform.report.text import Advice, Prose
    from domainshuttle.platform.run.folder import find_run

    if lora:
        exported = export_lora(find_run(run), folder, stage, checkpoint=checkpoint, overwrite=overwrite)
        console.print(Prose(f"Exported {exported}"))
        console.print(Advice("Next, in Python:", f"pipeline.load_lora_weights({str(folder)!r})"))
        return
    exported = export_run(find_run(run), folder, stage, checkpoint=checkpoint, overwrite=overwrite)
    console.print(
        Advice(f"Exported {exported} to {folder}. Next:", f"domainshuttle generate {shlex.quote(str(folder))} --help")
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="An exported folder, or a hub id.")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the clip shows.")] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="PICTURE[:SUBJECT[:DOMAIN]]", help="A reference: photo.jpg:0:human."),
    ] = None,
    cases: Annotated[
        Path | None, typer.Option(callback=_local, help="A JSONL of cases in the release's format.")
    ] = None,
    out: Annotated[Path, typer.Option(callback=_local, help="Folder for the clips.")] = Path("generated"),
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames; 1 makes a picture.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the prompt; 1: none.")] = None,
    reference_guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of the references; without it none of their own.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
) -> None:
    """Generate clips with an exported model, from a prompt and reference pictures, or from a file of cases.

    Size, length, steps, guidance and rate are those that the exported model was trained with, unless they are given;
    of a model that does not say, 480x832, 81 frames, 40 steps, guidance 5, 16 frames a second.
    """
    from domainshuttle.platform.generation.generate import Sampling, generate_clips

    sampling = Sampling.of(
        model,
        height=height,
        width=width,
        frames=frames,
        steps=steps,
        guidance=guidance,
        reference_guidance=reference_guidance,
        fps=fps,
        seed=seed,
    )
    generate_clips(model, prompt, reference or [], cases, out, sampling)


@evaluation.command("models")
def evaluate_models(
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="An exported folder, a folder of a WanVACEPipeline, a hub id, or a folder of videos CASE.mp4; with a "
            "name before it: NAME=PATH.",
        ),
    ],
    cases: Annotated[
        str | None,
        typer.Option(metavar="CASES", help="The evaluation's YAML file, or one that ships: paper, opens2v or demo."),
    ] = None,
    set_: EvaluationSet = None,
    out: Annotated[
        Path, typer.Option(callback=_local, help="Folder of the evaluation; one that is there goes on.")
    ] = Path("evaluation"),
    run: Annotated[
        Path | None,
        typer.Option(callback=_local, help="A run's folder: its held-out corpus is the test set, unless --cases is "
                     "given, and the results are logged to its MLflow run."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Try once more what failed before.")] = False,
    address: RayAddress = None,
) -> None:  # fmt: skip
    """Make the clips of a test set, measure them, and write a report. Goes on after a stop."""
    from domainshuttle.platform.evaluation.evaluate import chosen_config, run_evaluation
    from domainshuttle.platform.run.folder import find_run

    found = find_run(run) if run is not None else None
    settings = chosen_config(cases, found.config if found else None, set_ or [])
    isolated = any(metric.needs().packages for metric in settings.metrics.build())
    on_ray = address is not None or isolated or settings.generation.pool is not None or settings.scoring is not None
    with _ray(address) if on_ray else contextlib.nullcontext():
        run_evaluation(model, settings, out, found, again)


@evaluation.command("report")
def evaluate_report(
    folder: Annotated[Path, typer.Argument(callback=_local, help="Folder of an evaluation.")] = Path("evaluation"),
) -> None:
    """Write the report of an evaluation again, from what is there; nothing is made or measured."""
    from domainshuttle.platform.evaluation.evaluate import publish, read_results

    publish(folder, read_results(folder))


@evaluation.command("rate")
def evaluate_rate(
    folder: Annotated[
        Path, typer.Argument(callback=_local, help="Folder of an evaluation with two models or more.")
    ] = Path("evaluation"),
    answers: Annotated[
        list[Path] | None,
        typer.Option(callback=_local, help="A JSONL that the page saved: add it, and write the report again."),
    ] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Only so many pairs; without it all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of pairs and sides.")] = 0,
) -> None:
    """Make a page of blind pairs for people, or add their answers: how much do they and the metrics agree?"""
    from domainshuttle.platform.evaluation.evaluate import publish, rate, read_results

    if answers:
        rate(folder, answers)
        publish(folder, read_results(folder))
    else:
        from domainshuttle.platform.console import console
        from domainshuttle.platform.evaluation.rating import make_pages
        from domainshuttle.platform.report.text import Advice, Prose

        console.print(Prose(f"Page: {make_pages(folder, read_results(folder), pairs, seed)}"))
        answering = f"domainshuttle evaluate rate {shlex.quote(str(folder))} --answers FILE.jsonl"
        console.print(Advice("Next:", answering))


@app.command()
def demo(
    config: Annotated[str, typer.Argument(help="The configuration to run.")] = "demo",
    set_: Set = None,
    fresh: Annotated[
        bool, typer.Option(help="Remove what an earlier demo has made, and start anew; or go on with it.")
    ] = True,
    keep: Annotated[bool, typer.Option("--keep", hidden=True)] = False,  # its name until November 2026
) -> None:
    """Run the whole job at desk size: corpora, both stages with a stop and a resume, export, clips, evaluation."""
    from domainshuttle.platform.commands.demo import run_demo

    run_demo(config, set_ or [], keep or not fresh)


def _load(config: str, overrides: list[str] | None) -> "RunConfig":
    from domainshuttle.platform.config.loading import load_config

    return load_config(config, overrides)


def _load_run(config: str, overrides: list[str] | None) -> "RunConfig":
    """The configuration of a run that is to be trained."""
    settings = _load(config, overrides)
    from domainshuttle.platform.run.folder import require_meant

    require_meant(config, overrides or [], settings)
    return settings


def _load_corpora(config: str, overrides: list[str] | None) -> "RunConfig | CorporaConfig":
    from domainshuttle.platform.config.loading import load_corpora

    return load_corpora(config, overrides)


def _require_png(option: str, path: Path | None) -> None:
    from domainshuttle.platform.config.schema import ConfigError

    if path is not None and path.suffix.lower() != ".png":
        raise ConfigError(f"{option} {path}: expected a name that ends with .png")


def _ray(address: str | None) -> "Connection":
    from domainshuttle.cluster.local import Connection, Resources
    from domainshuttle.platform.console import errors
    from domainshuttle.platform.report.text import Prose

    made = Connection(address, Resources(1.0, remedy="Add nodes to it, or leave out --address to use this machine"))
    if made.note:
        errors.print(Prose(made.note))
    return made


def _nearest_store() -> str:
    """The sqlite store of the demo in this folder."""
    from domainshuttle.platform.config.schema import ConfigError

    path = Path("demo/runs/mlflow.db")
    if not path.is_file():
        raise ConfigError("which MLflow store? Give --uri sqlite:///path/to/mlflow.db or a server's address")
    return f"sqlite:///{path.absolute()}"


def main() -> Any:
    """The entry point: mistakes and faults of the place end with one message and code 2, Ctrl-C with code 130, a reader
    that goes away (`domainshuttle status RUN | head`) with code 141 and without a word."""
    # a shell may start us with SIGINT ignored; Ctrl-C from another program and SIGTERM must stop us all the same
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    # imported by a library of a library, it warns on every start that it found no GPU
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from domainshuttle.cluster.local import quiet_ray

    quiet_ray()  # which takes its settings when it is imported, whoever does that first
    output.watch_readers()
    code = 1  # of a fault of ours, which has a traceback
    try:
        code = _run()
    except KeyboardInterrupt:  # while the message of an error was printed
        code = _INTERRUPTED
    finally:
        output.flush()
        if output.reader_gone() and code in (0, _INTERRUPTED):
            raise SystemExit(output.CLOSED) from None
    raise SystemExit(code)


_INTERRUPTED = 130
_signals: list[int] = []
"""Those that asked this command to end: a library may turn the exception into one of its own, or into a text."""


def _interrupt(number: int, frame: object) -> None:
    _signals.append(number)
    raise KeyboardInterrupt


_GOING_ON = ("data build", "data pair", "data label", "data encode", "train", "demo", "ablate", "evaluate")
"""Commands whose work goes on when they are called again."""
_ENDING = ("evaluate report", "evaluate rate")
"""Of these, commands without such work."""


def _run() -> int:
    """Does what the command line says; the exit code."""
    try:
        app(standalone_mode=True)
        return 0
    except (SystemExit, KeyboardInterrupt) as end:
        code = _INTERRUPTED if isinstance(end, KeyboardInterrupt) else end.code
        if code == _INTERRUPTED:  # typer has made a code of Ctrl-C
            return _interrupted()
        if code is not None and not isinstance(code, int):
            raise  # a text, which Python prints
        return code or 0
    except Exception as error:
        if _signals:
            return _interrupted()
        message = _message(error)
        if message is None:
            raise  # a fault of ours: a traceback and code 1
        from domainshuttle.platform.console import fail

        return fail(message)


def _interrupted() -> int:
    """Says how the work goes on when the command is called again, where it does; the exit code."""
    if (told := _goes_on(sys.argv[1:])) and not output.reader_gone():
        from domainshuttle.platform.console import errors

        errors.print(f"Stopped. {told}")
    return _INTERRUPTED


def _goes_on(arguments: list[str]) -> str:
    """By which command the work of the command of these arguments goes on; empty where it does not."""
    names = {" ".join(arguments[:1]), " ".join(arguments[:2])}
    if not names.intersection(_GOING_ON) or names.intersection(_ENDING):
        return ""
    if "demo" in names and not {"--no-fresh", "--keep"}.intersection(arguments):
        return "The same command with --no-fresh goes on where it was."
    anew = re.findall(r"--fresh\b|--resume(?=[ =](?!auto\b))", " ".join(arguments))
    if "train" in names and anew:
        return f"The same command without {' and '.join(anew)} goes on where it was."
    return "The same command goes on where it was."


def _message(error: BaseException | None) -> str | None:
    """What to show of a mistake of the user's, or a fault of the environment; None: it is neither.

    These are UserFacingError and ClusterError, of a room that imports no other, and what the operating system reports
    of a place: an OSError with its number. Of an error in a task of Ray's its cause counts.
    """
    from domainshuttle.cluster.local import ClusterError
    from domainshuttle.pipelines.errors import UserFacingError

    if error is None or (message := _message(getattr(error, "cause", None))) is not None:
        return None if error is None else message
    if isinstance(error, UserFacingError | ClusterError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        places = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{places}: {error.strerror}" if places else str(error.strerror)
    return None


if __name__ == "__main__":
    main()
