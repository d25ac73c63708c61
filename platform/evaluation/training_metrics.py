"""Metrics while a run trains: the clips of `sampling` are measured where they were made, for curves by step.

The cases are few and fixed, so a point is no judgement of a model: it says whether a curve rises.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.evaluation.cases import read_case_file
from domainshuttle.platform.evaluation.config import load_evaluation
from domainshuttle.platform.evaluation.metrics.metric import Metric, MetricCase, Models, Reference, Video, Work
from domainshuttle.platform.evaluation.stages import say_terms
from domainshuttle.platform.evaluation.statistics import estimate
from domainshuttle.platform.generation.cases import Case
from domainshuttle.platform.generation.training_samples import sample_cases

METRICS_NAME = "metrics.json"
"""In the folder of a step's samples: what they measured, by the names of MLflow's metrics."""


def check_training_metrics(config: RunConfig) -> None:
    """Raises ConfigError for an evaluation that is not there, for cases whose labels or split are none, and what its
    metrics say is wrong with their models."""
    if config.sampling is not None and config.sampling.metrics is not None:
        if config.sampling.cases_file is not None:
            read_case_file(Path(config.sampling.cases_file))
        metrics = load_evaluation(config.sampling.metrics).metrics.build()
        for metric in metrics:
            metric.check()
        say_terms(metrics)


def measure_samples(config: RunConfig, out: Path, device: str, work: Path) -> None:
    """Measures the samples in `out` with the metrics that `sampling.metrics` names; nothing where it names none.

    `work` is for what metrics keep, such as a judge's answers. Raises what a metric does of an endpoint that is away.
    """
    if config.sampling is None or config.sampling.metrics is None:
        return
    settings = load_evaluation(config.sampling.metrics)
    values = measured(settings.metrics.build(Models(device, work)), sample_cases(config), out)
    found: dict[str, float] = {}
    for name, given in values.items():
        one = estimate(np.array(given), settings.statistics.confidence, 999, settings.statistics.seed)
        found |= {f"samples/{name}": one.mean, f"samples/{name}_cases": float(one.cases)} if one.cases else {}
        if one.low == one.low:
            found |= {f"samples/{name}_low": one.low, f"samples/{name}_high": one.high}
    write_bytes(out / METRICS_NAME, json.dumps(found).encode())


def measured(metrics: Sequence[Metric[Any]], cases: Sequence[Case], out: Path) -> dict[str, list[float]]:
    """The value of each case by metric, NaN where there is none."""
    works = []
    for number, case in enumerate(cases, 1):
        clip, still = out / f"case-{number:02d}.mp4", out / f"case-{number:02d}.png"
        if clip.exists():
            video = Video.read(clip)
        else:
            video = Video(np.asarray(Image.open(still))[None], 1.0, hashlib.sha256(still.read_bytes()).hexdigest())
        words = case.words or ("",) * len(case.references)
        names = ["" if domain < 0 else DOMAINS[domain] for domain in case.domains]
        references = tuple(
            Reference(picture, word or "", subject, name == "background", name)
            for picture, word, subject, name in zip(case.references, words, case.subjects, names, strict=True)
        )
        works.append(Work(MetricCase(case.key, case.caption, references, case.split), video))
    found: dict[str, list[float]] = {}
    for metric in metrics:
        # samples of a corpus are of no split: a metric that is named for them is measured
        chosen = [work for work in works if not work.case.split or metric.applies(work.case)]
        scores = metric.score_all(chosen)
        found[metric.label] = [float("nan") if one.value is None else one.value for one in scores]
    return found


def read_metrics(out: Path) -> dict[str, float]:
    """What the samples of a step measured; nothing where they were not measured."""
    try:
        content: dict[str, float] = json.loads((out / METRICS_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return content
