"""A thread's time by what it goes to, without gaps and without overlaps."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator


class Timeline:
    """At every moment one category runs, and a block that is measured takes over from it.

    So the seconds of all categories add up to the time that passed, whatever is measured within what.
    """

    def __init__(self, category: str, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._category, self._since = clock, category, clock()
        self._totals: defaultdict[str, float] = defaultdict(float)

    @property
    def category(self) -> str:
        """Where time goes now; may be asked by any thread."""
        return self._category

    def switch(self, category: str) -> str:
        """From now on time goes to `category`; returns where it went until now."""
        before, now = self._category, self._clock()
        self._totals[before] += max(0.0, now - self._since)  # a clock that was set back counts nothing twice
        self._category, self._since = category, now
        return before

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """The time of the block, also of one that raises, goes to `category`."""
        before = self.switch(category)
        try:
            yield
        finally:
            self.switch(before)

    def totals(self) -> dict[str, float]:
        """Seconds by category since the beginning, the running one included."""
        self.switch(self._category)
        return dict(self._totals)


class Lap:
    """What a timeline adds between two looks at it. Each reader of a timeline has a lap of its own."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline, self._seen = timeline, timeline.totals()

    def take(self) -> dict[str, float]:
        """Seconds by category since the last call, or since the lap was made."""
        before, self._seen = self._seen, self._timeline.totals()
        return {name: seconds - before.get(name, 0.0) for name, seconds in self._seen.items()}
