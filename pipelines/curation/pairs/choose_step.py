"""The step that chooses pairs: on CPUs, without the models that found the candidates."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.curation.pairs.candidates import CandidateStore, name_of
from domainshuttle.pipelines.curation.pairs.choose import NoSubject, choose
from domainshuttle.pipelines.curation.pairs.config import PairConfig
from domainshuttle.pipelines.curation.pairs.quality import judge_pair
from domainshuttle.pipelines.curation.stage import Work, attempt
from domainshuttle.pipelines.endpoints.client import ChatClient
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import SampleFault, fault_kind


class Choose:
    """Chooses pairs among candidates."""

    def __init__(self, store: CandidateStore, config: PairConfig, answers: Path) -> None:
        self.config = config
        self.candidates = store.open()
        self.client = ChatClient(config.quality, answers) if config.quality is not None else None

    def __call__(self, works: list[Work]) -> None:
        if self.client is None:
            attempt(works, self._choose)
            return
        with ThreadPoolExecutor(self.client.config.at_once, "choose") as pool:
            for _ in pool.map(lambda work: attempt([work], self._choose), works):
                pass

    def _choose(self, work: Work) -> None:
        name = name_of(work.row)
        own = self.candidates.find(name)
        if own is None:
            raise DataError(f"{work.row.key}: nobody looked into it: run the command again")
        if own.fault:
            kind, _, detail = own.fault.partition(": ")
            raise SampleFault(kind, detail or own.fault)
        judge: Callable[[str, bytes, bytes], tuple[str, float]] | None = None
        files: dict[str, Any] = {}
        if self.client is not None:
            judge = partial(judge_pair, self.client, self.config.least_quality)
            files = {one: data for one, data in work.sample().files.items() if one.startswith("ref")}
        others = [one for one in self.candidates.beside(name, self.config.other_clips) if not one.fault]
        try:
            chosen = choose(work.info, own, others, self.config, judge, files)
        except NoSubject as error:
            work.trace = {"candidates": error.trace}
            work.notes += _notes(error.trace)
            raise
        trace = [one.trace() for one in chosen.outcomes]
        work.info, work.files = chosen.info, chosen.files
        work.trace = {"candidates": trace, **({"missing": chosen.missing} if chosen.missing else {})}
        work.notes += _notes(trace)
        work.notes += ["subjects left out: none or too few pictures"] * len(chosen.missing)
        work.notes += ["pairs"] * chosen.pairs
        if not chosen.pairs:
            work.notes.append("samples without a pair")


def _notes(trace: list[dict[str, Any]]) -> list[str]:
    reasons = [fault_kind(one["rejected"]) for one in trace if "rejected" in one]
    return [f"candidates rejected: {reason}" for reason in reasons]
