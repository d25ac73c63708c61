"""A profile of one step of one worker, when somebody asks for it (`domainshuttle profile`)."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from domainshuttle.pipelines.errors import one_line
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.requests import answer

logger = logging.getLogger(__name__)

_ROWS = 25
"""Operations in the table: those that took the most time."""


class StepProfiler:
    """Torch's profiler around whole steps that somebody asked for. `wanted` gives the question that waits, once.

    Whatever goes wrong is the answer: it never ends the training.
    """

    def __init__(self, run: Run, segment: str, rank: int, wanted: Callable[[], str | None]) -> None:
        self._run, self._segment, self._rank, self._wanted = run, segment, rank, wanted
        self._profile: Any = None
        self._token = ""

    def between_steps(self, done: int) -> None:
        """After each step, `done` of them: ends the profile of that one, and begins one of the next if it is asked
        for."""
        if self._profile is not None:
            self._finish(done)
        if (token := self._wanted()) is not None:
            self._token = token
            try:
                activities = [ProfilerActivity.CPU]
                if torch.cuda.is_available():
                    activities.append(ProfilerActivity.CUDA)
                self._profile = profile(activities=activities, record_shapes=True)
                self._profile.start()
            except Exception as error:
                self._fail(error)

    def close(self, reason: str = "the worker ended before its next step did") -> None:
        """Gives up a profile that is under way."""
        if self._profile is not None:
            with contextlib.suppress(Exception):
                self._profile.stop()  # one that still runs when the process ends takes it down: SIGSEGV in torch
            self._fail(RuntimeError(reason))

    def _finish(self, done: int) -> None:
        running, self._profile = self._profile, None
        try:
            running.stop()
            trace = self._run.folder / "profiles" / f"{self._segment}-step-{done:06d}.rank{self._rank:05d}.json.gz"
            trace.parent.mkdir(exist_ok=True)
            running.export_chrome_trace(str(trace))
            by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = Path(str(trace).removesuffix(".json.gz") + ".txt")
            table.write_text(running.key_averages().table(sort_by=by, row_limit=_ROWS))
            found = {"step": done, "segment": self._segment, "trace": str(trace), "table": str(table)}
            answer(self._run, self._token, found)
            logger.info("step %d was profiled: %s", done, trace)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._profile = None
        logger.warning("no profile: %s", one_line(error))
        answer(self._run, self._token, {"error": f"{type(error).__name__}: {one_line(error)}"})
