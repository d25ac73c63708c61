"""Where a start of the worker group begins: one decision for data and weights alike.

The newest whole checkpoint gives the weights and, because the data order is a pure function of the step, the data. Ray
loads this module into its controllers, so nothing here imports torch, which would cost each of them seconds.
"""

import time
from collections.abc import Sequence
from typing import Any

from ray.train import DataConfig

from domainshuttle.pipelines.loading.ray_source import Blocks, LivePool, plan_dataset
from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.platform.checkpoint.resume import AUTO, choose_start
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointStore
from domainshuttle.platform.driver.restarts import tell_restart
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.journal import PASSED_OVER, Notices
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.segments import Segment, Shard


class PlannedData(DataConfig):
    """Builds the workers' data at every start of the worker group, beginning at the newest whole checkpoint.

    The bytes of `verified`, from which the driver chose to start, are not read again.
    """

    def __init__(self, run: Run, segment: Segment, feed: Feed, verified: Checkpoint | None) -> None:
        super().__init__()
        self.asked = time.time()
        self.run, self.segment, self.feed, self.verified = run, segment, feed, verified

    def _tell_resize(self) -> None:
        """An attempt of this fit that nobody has ended made room for another number of workers, or for a lost node."""
        last = Ledger(self.run.ledger_path).last_line()
        if last is not None and last >= self.asked:
            tell_restart(self.run, self.segment.name, "the group was resized, or a node went")

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """One decision for data and weights alike, made here and carried to every rank."""
        config, name, steps = self.run.config, self.segment.name, self.segment.last_step
        notices = Notices(self.run.notices_path)

        def note(line: str) -> None:
            notices.add(name, PASSED_OVER, line)

        self._tell_resize()
        newest = choose_start(CheckpointStore.of(config), name, AUTO, config.digest(), note, self.verified)
        first = newest.state.step if newest else 0
        blocks: Sequence[Blocks | tuple[()]] = [()] * world_size
        if first < steps:
            live = config.encoders.live
            pool = LivePool(**live.model_dump()) if live else None
            blocks = plan_dataset(self.feed, first, steps, world_size, pool)
        checkpoint, attempt = newest.where if newest else None, time.time_ns()
        over = frozenset(step for bad in self.run.passed_over(name) for step in bad)
        return [{"plan": Shard(own, first, checkpoint, attempt, over)} for own in blocks]
