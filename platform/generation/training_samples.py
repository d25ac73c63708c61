"""Samples while a run trains: clips of fixed cases every so many steps, by step in MLflow.

They are made from a snapshot of the whole weights, never by the model that trains: that one is divided over the ranks,
and all of them would have to take part in each of its forwards. All ranks write the snapshot together; then a Ray task
generates from it beside the training or, where the cluster has no resources free, rank 0 does between two steps. A
generation that fails or takes too long is a warning and a tag of the MLflow run, and the training goes on.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.pipelines.storage.uri import join
from domainshuttle.platform.config.schema import RunConfig, SamplingSection
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.weights_origin import WeightsOrigin

if TYPE_CHECKING:
    from domainshuttle.platform.generation.cases import Case
    from domainshuttle.platform.generation.grid import Column

# What generates is imported by the functions that do: every worker imports this module, and few generate.

OVER_STEPS_NAME = "over_steps.png"
_MOST_COLUMNS = 12
"""Steps on the picture over steps: the first, the last, and those evenly between."""


def sample_cases(config: RunConfig) -> "list[Case]":
    """The fixed cases; raises ConfigError or DataError for those that are not there."""
    from domainshuttle.platform.generation.cases import cases_of_file, load_cases

    section = required_sampling(config)
    if section.cases_file is not None:
        return cases_of_file(Path(section.cases_file))
    assert config.evaluation is not None  # held by the configuration
    folder = config.corpus(config.evaluation.corpus, "raw").folder
    return load_cases(Index.load(join(folder, INDEX_NAME)), section.cases, spread=True)


def generate_samples(
    config: RunConfig,
    segment: str,
    weights: Path,
    out: Path,
    device: str,
    timeout: float,
    origins: Mapping[str, WeightsOrigin],
) -> None:
    """Generates all cases from the folder of a segment's transformer into `out`, which appears whole or not at all.

    `origins` is what each segment of the run begins with: of two experts both generate.
    It gets grid.png and grid.mp4, and of each case a still and a clip; beside it the picture over steps is drawn again.
    Cases without a target have the size of the stage's largest bucket. Raises TimeoutError after `timeout` seconds.
    """
    from domainshuttle.platform.generation.assemble import assemble_pipeline
    from domainshuttle.platform.generation.cases import generate_cases
    from domainshuttle.platform.generation.grid import GridRow, write_grid
    from domainshuttle.platform.generation.networks import networks_beside

    deadline = time.monotonic() + timeout
    cases, sampling = sample_cases(config), config.generation
    run = Run(config)
    stage = run.segment(segment).stage
    networks = networks_beside(run, run.segment(segment), weights, origins)
    pipeline: Any = assemble_pipeline(config, networks.folders, networks.boundary, device)
    pipeline.set_progress_bar_config(disable=True)

    def in_time(_: int) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the samples took more than {timeout:g} s: raise sampling.timeout, or ask for fewer")

    buckets = [bucket for corpus in stage.mixture for bucket in config.corpora[corpus].parsed_buckets]
    largest = max(buckets, key=lambda bucket: bucket.frames * bucket.height * bucket.width)
    rows = []
    for case in cases:
        size = case.target.shape[:3] if case.target is not None else (largest.frames, largest.height, largest.width)
        # one at a time, as memory grows with each
        (clip,) = generate_cases(pipeline, [case], size, sampling.steps, sampling.guidance, config.seed, in_time)
        rows.append(GridRow(case.caption, case.domain, case.references, clip, case.target))
    with atomic_folder(out) as aside:
        write_grid(rows, aside, sampling.fps)
        for number, row in enumerate(rows, 1):
            Image.fromarray(row.generated[len(row.generated) // 2]).save(aside / f"case-{number:02d}.png")
            if len(row.generated) > 1:
                (aside / f"case-{number:02d}.mp4").write_bytes(encode_mp4(row.generated, sampling.fps))
        (aside / "cases.json").write_text(json.dumps([[case.key, case.caption, case.domain] for case in cases]))
    draw_over_steps(out.parent)


def draw_over_steps(folder: Path) -> Path:
    """Draws `over_steps.png` in a segment's folder of samples: a row a case, a column a step.

    Of steps whose cases were others than those of the last one nothing is shown.
    """
    from domainshuttle.platform.generation.grid import draw_table

    steps = sorted(path.parent for path in folder.glob("step-*/cases.json"))
    cases = json.loads((steps[-1] / "cases.json").read_text())
    steps = [step for step in steps if json.loads((step / "cases.json").read_text()) == cases]
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(_MOST_COLUMNS, len(steps))).round().astype(int))
    columns: list[Column] = []
    for step in (steps[place] for place in chosen):
        stills = [np.asarray(Image.open(step / f"case-{number:02d}.png")) for number in range(1, len(cases) + 1)]
        columns.append((f"step {int(step.name.removeprefix('step-')):,}", list(stills)))
    first = columns[0][1][0]
    assert first is not None
    page = draw_table([(text, f"domain: {domain}") for _, text, domain in cases], columns, len(first) / len(first[0]))
    picture = folder / OVER_STEPS_NAME
    Image.fromarray(page).save(picture)
    return picture


def required_sampling(config: RunConfig) -> SamplingSection:
    if config.sampling is None:
        raise ValueError("this run takes no samples: it has no `sampling`")
    return config.sampling
