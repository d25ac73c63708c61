"""How fast encoding was, stage by stage, and what follows for corpora that are still to be encoded.

An actor reads and decodes on threads of its own while it encodes and writes, so its rate is that of the busier side.
Nothing here brings torch: `plan` reads it too.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.parts import WORK_NAME
from domainshuttle.pipelines.storage.files import exists, read_bytes, write_bytes
from domainshuttle.pipelines.storage.uri import Location, join

READ, DECODE, TEXT, VIDEO, WRITE = "read", "decode", "text", "video", "write"
AHEAD, BEHIND = (READ, DECODE), (TEXT, VIDEO, WRITE)
"""The stages on the threads that prepare samples, and on the one that encodes them."""
THROUGHPUT_NAME = f"{WORK_NAME}/throughput.json"


@dataclass
class Throughput:
    """What encoding took. `samples` are those whose latents were encoded, not those that were copied; `bytes` what they
    take in shards; `busy` seconds of actors; `seconds` by stage, `threads` that prepared samples in each actor."""

    samples: int = 0
    bytes: int = 0
    busy: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1

    def add(self, samples: int, size: int, busy: float, seconds: dict[str, float]) -> None:
        """Counts what one actor did."""
        self.samples += samples
        self.bytes += size
        self.busy += busy
        self.seconds.update(seconds)

    @property
    def rate(self) -> float:
        """Samples a second of one actor."""
        return self.samples / self.busy if self.busy else 0.0

    def stage_rates(self) -> dict[str, float]:
        """Samples a second that each stage alone would make in one actor."""
        threads = {**dict.fromkeys(AHEAD, self.threads), **dict.fromkeys(BEHIND, 1)}
        return {
            stage: count * self.samples / self.seconds[stage]
            for stage, count in threads.items()
            if self.seconds[stage] > 0
        }

    @property
    def bottleneck(self) -> str:
        """The slowest stage of the busier side; empty where nothing was measured."""
        threads = {AHEAD: self.threads, BEHIND: 1}
        sides = {side: sum(self.seconds[stage] for stage in side) / count for side, count in threads.items()}
        busier = max(sides, key=lambda side: sides[side])
        return max(busier, key=lambda stage: self.seconds[stage]) if sides[busier] > 0 else ""

    def note(self) -> str:
        """The bottleneck and the rate in a few words, for progress; empty where nothing was measured."""
        return f"{self.rate:.3g}/s an actor, bottleneck {self.bottleneck}" if self.samples and self.bottleneck else ""

    def sentence(self) -> str:
        """All stages and the bottleneck in a line; empty where nothing was measured."""
        if not self.samples or not self.bottleneck:
            return ""
        rates = ", ".join(f"{stage} {rate:.3g}" for stage, rate in self.stage_rates().items())
        return (
            f"Samples a second of one actor: {self.rate:.3g}; each stage alone: {rates}. Bottleneck: {self.bottleneck}"
        )

    def estimate(self, samples: int) -> tuple[int, float]:
        """Bytes and hours of one actor that so many samples of this kind take. Needs measured samples."""
        return round(samples * self.bytes / self.samples), samples / self.rate / 3600

    def save(self, folder: Location) -> None:
        """Writes it beside an encoded corpus's notes."""
        write_bytes(join(folder, THROUGHPUT_NAME), json.dumps(vars(self)).encode())

    @classmethod
    def load(cls, folder: Location) -> "Throughput | None":
        """What was measured of a corpus; None where nothing was."""
        if not exists(place := join(folder, THROUGHPUT_NAME)):
            return None
        try:
            values: dict[str, Any] = json.loads(read_bytes(place))
            found = cls(**{**values, "seconds": Counter(values["seconds"])})
        except (ValueError, TypeError, KeyError, DataError):
            return None
        return found if found.samples and found.busy else None
