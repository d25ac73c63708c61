"""The schedule on the driver: segment after segment, start after start, until all is trained or a stop is asked for."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from domainshuttle.platform.checkpoint.resume import AUTO, NONE, adopt_stages, begin, choose_start, require_fit
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointError, CheckpointStore
from domainshuttle.platform.config.schema import ConfigError, differences
from domainshuttle.platform.driver.worker_group import Fit
from domainshuttle.platform.engine.hub import commit_of
from domainshuttle.platform.engine.initialization import outline_model
from domainshuttle.platform.engine.trained_parameters import parameter_table, select_trained
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import PASSED_OVER, Notices
from domainshuttle.platform.run.ledger import ALLOWANCE, Ledger
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.weights_digest import sizes_digest, weights_identity
from domainshuttle.platform.tracking.mlflow import Tracker
from domainshuttle.platform.train import train_segment
from domainshuttle.platform.training.monitor import ROLLED_BACK, UNSAVED

Outcome = Literal["finished", "stopped", "budget spent"]


class DivergedError(RuntimeError):
    """The loss went wrong again and again, also without the steps that were passed over."""


def train(
    run: Run,
    tracker: Tracker,
    watch: Callable[[], None],
    say: Callable[[Any], None],
    stage: str | None = None,
    resume: str = AUTO,
) -> Outcome:
    """Trains what is left of a run's schedule, or of one stage; `watch` is called about twice a second meanwhile.

    `resume` says where the first unfinished segment starts (resume.py). Raises ConfigError for a stage whose weights to
    begin with are not there yet, CheckpointError, DivergedError, and what ended the workers for good.
    """
    ledger, store, digest = Ledger(run.ledger_path), CheckpointStore.of(run.config), run.config.digest()
    notices = Notices(run.notices_path)
    if (last := ledger.last_line()) is not None:
        heard = max(last, run.heard_from())
        ledger.end_open("its driver died", until=heard + ALLOWANCE)

    def tell(segment: str) -> None:
        """Shows what was noted of a segment, here or by Ray's processes; of checkpoints MLflow keeps it too."""
        for _, kind, text in notices.new():
            say(text)
            if kind == PASSED_OVER:
                tracker.tag({"checkpoints.passed_over": "\n".join(notices.told(segment, kind))}, segment)

    if resume not in (AUTO, NONE):
        adopt_stages(run, store, resume, say)
    for segment in run.choose(stage):
        if segment.finished:
            say(f"Stage {segment.name} is finished; its weights are in {segment.weights}")
            continue
        require_origin(run, segment)
        tracker.open_segment(segment.name, params=dataclasses.asdict(SegmentParams.of(segment)))
        feed = make_feed(run.config, segment)
        commit = commit_of(segment.origin)
        base = weights_identity(segment.origin, segment.seed, run.fingerprints_path, commit)
        selected = select_trained(outline_model(run.config.model_of(segment.expert)), segment.stage.trained)

        def choose(resume: str, segment: Segment = segment) -> Checkpoint | None:
            note = functools.partial(notices.add, segment.name, PASSED_OVER)
            try:
                return choose_start(store, segment.name, resume, digest, note)
            finally:
                tell(segment.name)

        start = choose(resume)
        if start:
            require_fit(start, segment, base, sizes_digest(selected.trained), feed)
            if start.state.config_digest != digest:
                before = start.state.config
                changes = differences(before, run.config.decisive()) if before else "it does not say which"
                say(f"Checkpoint {start.name} was trained with another configuration: {changes}")
        begin(store, segment.name, resume, start, digest)
        if resume != AUTO:
            segment.begin_anew()
        resume = AUTO
        for corpus, source, index_digest, samples in feed.corpora():
            tracker.log_dataset(corpus, index_digest, source, samples, segment.name)
        run.write_ids(tracker.ids.to_dict())
        say(parameter_table({segment.name: selected}))
        while not segment.finished:
            if ledger.summary(run.config.budget_gpu_hours).spent:
                return "budget spent"
            say(f"Stage {segment.name}: " + (f"goes on after step {start.state.step}" if start else "begins"))
            job = {"base": base, "commit": commit, "mlflow": tracker.ids.to_dict()}
            fit = Fit(train_segment, run, segment, feed, job, start)
            for _ in fit.running():
                watch()
                tell(segment.name)
            ledger.end_open("the workers ended without a last line")
            if fit.left:
                return "stopped"
            outcome = run.read_progress().get("state", "")
            if outcome == "budget spent":
                return "budget spent"
            if outcome.startswith(UNSAVED):
                raise CheckpointError(f"stage {segment.name}: {outcome.removeprefix(UNSAVED)}")
            if not segment.finished and outcome != ROLLED_BACK:
                return "stopped"
            if outcome == ROLLED_BACK:
                refuse_to_go_in_circles(run, segment, say)
                start = choose(AUTO)
    return "finished"


def require_origin(run: Run, segment: Segment) -> None:
    """Raises ConfigError when the segment begins with the weights of another that is not finished."""
    for other in run.segments():
        if segment.origin == str(other.weights) and not other.finished:
            raise ConfigError(f"stage {segment.name!r} begins with the weights of {other.name!r}: train that one first")


def refuse_to_go_in_circles(run: Run, segment: Segment, say: Callable[[str], None]) -> None:
    """After a rollback: says what is passed over, or raises DivergedError when there were too many."""
    rollbacks = run.passed_over(segment.name)
    where = run.dropped_path(segment.name, 0).parent
    if len(rollbacks) > run.config.guard.most_rollbacks:
        raise DivergedError(
            f"stage {segment.name} went back to a checkpoint {len(rollbacks)} times, the last time for steps "
            f"{rollbacks[-1]}: look at their samples in {where}, and raise guard.spike_factor or guard.most_rollbacks; "
            "or go on from a checkpoint with a lower learning rate, as a run of its own: --set name=... --set "
            f"stages.{segment.stage.name}.learning_rate=... --resume PATH; domainshuttle checkpoints {run.folder} lists"
            " them"
        )
    say(f"Stage {segment.name} went back: steps {rollbacks[-1]} were bad and are now passed over (samples in {where})")


@dataclass(frozen=True)
class SegmentParams:
    """What MLflow shows as the params of a segment's run."""

    stage: str
    number: int
    steps: int
    global_batch: int
    learning_rate: float
    trained: str
    mixture: str
    where: str
    cross_pair_weight: float

    @classmethod
    def of(cls, segment: Segment) -> "SegmentParams":
        stage = segment.stage
        return cls(
            stage=stage.name,
            number=segment.number,
            steps=stage.steps,
            global_batch=stage.global_batch,
            learning_rate=stage.learning_rate,
            trained=", ".join(stage.trained),
            mixture=stage.shown_mixture,
            where=", ".join(f"{name}: {text}" for name, text in stage.where.items()),
            cross_pair_weight=stage.loss.cross_pair_weight,
        )
