"""Cross pairs of a corpus: candidates are found once, then pairs are chosen of them and written as raw shards.

Both halves go on where they were after a stop. Choosing is CPUs' work of minutes, so that thresholds can be tried: the
report and `trace.jsonl` say what became of each candidate.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.curation.model_folders import model_digest
from domainshuttle.pipelines.curation.pairs.candidates import STORE_NAME, Candidates, CandidateStore, names_in
from domainshuttle.pipelines.curation.pairs.choose_step import Choose
from domainshuttle.pipelines.curation.pairs.config import ROLES, PairConfig
from domainshuttle.pipelines.curation.pairs.find import FindJob, find_steps
from domainshuttle.pipelines.curation.pairs.quality import PROMPT
from domainshuttle.pipelines.curation.stage import Staged, Step, pass_through, run_stage
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.parts import WORK_NAME
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.quarantine import MOST_BAD_IN_CORPUS
from domainshuttle.pipelines.ray_tasks import Progress
from domainshuttle.pipelines.values import ActorPool

STAGE_NAME = "pair"
ANSWERS_NAME = f"{WORK_NAME}/answers"
"""The folder of what the quality filter answered, in that of the corpus."""
_VERSION = 1
"""Of what is found and chosen of the same samples and settings; a change makes all anew."""


def pair_corpus(
    raw: CorpusSpec,
    folder: Path,
    config: PairConfig,
    pools: Mapping[str, ActorPool],
    finding: Progress,
    choosing: Progress,
    most_bad: float = MOST_BAD_IN_CORPUS,
    samples_per_part: int = 32,
    shard_bytes: int = 256 << 20,
) -> Staged:
    """Makes the cross pairs of a raw corpus on the Ray cluster that is connected; its shards, index and report lie in
    `folder`. `pools` are actors by the names of the configuration's.

    Raises DataError for models that are missing or not whole, where nothing at all is detected, and where more than
    `most_bad` of the samples have no subject; EndpointError where the quality filter does not answer.
    """
    recipe, store = find_recipe(raw, folder, config)
    if config.quality is not None:
        config.quality.key()  # a missing one is told now, and not by an actor
    index = Index.load(raw.index)
    names = names_in(index)
    store.folder.mkdir(parents=True, exist_ok=True)
    for stale in store.folder.parent.iterdir():
        if stale != store.folder and stale.is_dir():
            shutil.rmtree(stale)
    known = store.gather(names, config.video)
    missing = tuple(number for number, name in enumerate(names) if name not in known)
    finding(len(names) - len(missing), len(names))
    if missing:
        job = FindJob(raw, store, missing)
        done = len(names) - len(missing)
        for finished in pass_through(job, range(job.parts), find_steps(config, dict(pools))):
            done += finished
            finding(done, len(names))
        known = store.gather(names, config.video)
    _require_found(known, len(names), raw, config)
    at_once = config.quality.at_once if config.quality is not None else 1
    answers = folder / ANSWERS_NAME
    step = Step(Choose, (store, config, answers), pools["choose"], parts_at_once=2 if at_once > 1 else 1)
    settings = {"version": _VERSION, "find": recipe, **config.choosing()}
    if config.quality is not None:
        settings["prompt"] = PROMPT
    return run_stage(
        STAGE_NAME,
        raw,
        folder,
        settings,
        [step],
        choosing,
        samples_per_part,
        shard_bytes=shard_bytes,
        most_bad=most_bad,
    )


def find_recipe(raw: CorpusSpec, folder: Path, config: PairConfig) -> tuple[dict[str, Any], CandidateStore]:
    """What decides the candidates of a corpus, and where they are kept. Raises DataError for missing models."""
    digests = {role: model_digest(getattr(config.models, role), role) for role in ROLES}
    recipe = {"version": _VERSION, **config.finding(), "models": digests}
    named = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=8).hexdigest()
    return recipe, CandidateStore(folder / STORE_NAME / named)


def _require_found(known: Candidates, samples: int, raw: CorpusSpec, config: PairConfig) -> None:
    if known.boxes or known.scenes:
        return
    if len(known.faults) == samples:
        raise DataError(
            f"none of the {samples} samples of {raw.folder} could be looked into, such as: {known.faults[0]}"
        )
    raise DataError(
        f"the detector found nothing in {samples} samples of {raw.folder}: no box of a subject's word is surer than "
        f"pair.least_detection={config.least_detection:g}. Do the samples name their subjects (pair.words for those "
        "that don't), and is pair.models.detector a trained Grounding DINO?"
    )
