"""How much is asked of an endpoint: requests and tokens a minute, and money in all. Safe to share between threads."""

import threading
import time
from collections.abc import Callable

from domainshuttle.pipelines.endpoints.config import EndpointConfig
from domainshuttle.pipelines.errors import UserFacingError


class CostLimitError(UserFacingError):
    """What is left of the money is less than the next request may cost."""


class Limits:
    """Admits requests one by one. A rate may be used up at once for a second, and not saved up for longer.

    The cost limit is never passed: what a request may cost at most is set aside until it is known what it did cost.
    """

    def __init__(self, config: EndpointConfig, spent: float, now: Callable[[], float] = time.monotonic) -> None:
        self.config, self.now = config, now
        self.spent, self._reserved = spent, 0.0
        self._next = {"requests": now(), "tokens": now()}
        self._changed = threading.Condition()

    def wait_time(self, tokens: int) -> float:
        """Takes a request's share of the rates, and returns the seconds until it may be sent."""
        rates = (("requests", 1, self.config.requests_per_minute), ("tokens", tokens, self.config.tokens_per_minute))
        with self._changed:
            begin = self.now()
            for name, amount, rate in rates:
                if rate is not None:
                    begin = max(begin, self._next[name])
                    self._next[name] = max(self._next[name], self.now()) + 60 * amount / rate
            return begin - self.now()

    def reserve(self, most: float, stopped: Callable[[], bool] = lambda: False) -> None:
        """Sets aside what a request may cost, when others are settled where that must be. Raises CostLimitError."""
        limit = self.config.most_cost
        with self._changed:
            while limit is not None and self.spent + self._reserved + most > limit:
                if not self._reserved or stopped():
                    raise CostLimitError(
                        f"{self.config.url}: {self.spent:.4f} of most_cost={limit:g} is spent, and the next request "
                        f"may cost {most:.4f}. All answers are kept: raise most_cost and run the command again"
                    )
                self._changed.wait(0.2)
            self._reserved += most

    def settle(self, most: float, cost: float) -> None:
        """What was set aside did cost so much."""
        with self._changed:
            self._reserved = max(self._reserved - most, 0.0)
            self.spent += cost
            if self.config.most_cost is not None and self._reserved < 1e-12:
                self._reserved = 0.0
            self._changed.notify_all()
