"""The steps of labelling: samples become pictures, a model is asked of them, and its answers become labels.

Answers are kept by a hash of all that was asked, so that nothing is asked twice, also by another start.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from domainshuttle.model.pictures import Pixels, resized
from domainshuttle.pipelines.curation.labels.config import LabelConfig
from domainshuttle.pipelines.curation.labels.questions import PROMPT, Needs, question_of
from domainshuttle.pipelines.curation.labels.rules import Asked, label, needs_of, state_name
from domainshuttle.pipelines.curation.pairs.config import fit_pools
from domainshuttle.pipelines.curation.stage import Step, Work
from domainshuttle.pipelines.endpoints.client import Answer, ChatClient, Question
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.cut import frames_at
from domainshuttle.pipelines.media.decode import decode_image, encode_jpeg
from domainshuttle.pipelines.quarantine import fault_reason, of_sample, percent
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.values import ActorPool

SAMPLES_PER_UNIT = 64
_ENOUGH = 50
"""Answers after which a share of failures says something."""


class ByWords:
    """Labels by word lists."""

    def __init__(self, config: LabelConfig) -> None:
        self.config = config

    def __call__(self, works: list[Work]) -> None:
        for work in works:
            _take(work, needs_of(self.config, work.info), None)


class Show:
    """Makes of each sample that needs labels the pictures that a model is shown."""

    def __init__(self, config: LabelConfig) -> None:
        self.config = config

    def __call__(self, works: list[Work]) -> None:
        for work in works:
            if not (needs := needs_of(self.config, work.info)):
                continue
            work.carried["needs"] = needs
            try:
                with of_sample(work.row.key):
                    work.carried["shown"] = self._shown(work.sample(), needs)
            except DataError as error:
                work.carried["fault"] = fault_reason(error)

    def _shown(self, sample: RawSample, needs: Needs) -> tuple[int, list[int], list[bytes]]:
        """How many pictures are of the target, of which subjects the others are, and all pictures."""
        info, pictures = sample.info, []
        if info.kind == "image":
            targets = [decode_image(sample.target, sample.key)]
        else:
            count = min(self.config.frames, info.frames)
            numbers = sorted({(2 * place + 1) * info.frames // (2 * count) for place in range(count)})
            found = frames_at(sample.target, set(numbers), sample.key)
            targets = [found[number] for number in numbers]
        pictures = [self._small(picture) for picture in targets]
        shown: list[int] = []
        if needs.words or needs.domains:
            for reference in info.references:
                if reference.subject not in shown:
                    shown.append(reference.subject)
                    pictures.append(self._small(decode_image(sample.files[reference.file], reference.file)))
        return len(targets), shown, pictures

    def _small(self, picture: Pixels) -> bytes:
        height, width = picture.shape[:2]
        if (longer := max(height, width)) > self.config.side:
            size = (max(1, height * self.config.side // longer), max(1, width * self.config.side // longer))
            picture = np.asarray(resized(picture, size))
        return encode_jpeg(picture, 90)


class Model(Protocol):
    """What is asked: its name as labels have it, and its answers."""

    by: Literal["endpoint", "transformers"]
    name: str

    def answers(self, questions: Sequence[Question]) -> Iterable[Answer]:
        """The answers in the order of the questions; safe for threads."""
        ...


class EndpointModel:
    """An OpenAI-compatible endpoint."""

    by: Literal["endpoint", "transformers"] = "endpoint"

    def __init__(self, config: LabelConfig, answers: str) -> None:
        assert config.endpoint is not None
        self.name = config.endpoint.model
        self.client = ChatClient(config.endpoint, Path(answers))
        self.pool = self.client.threads()  # of all parts that are asked at a time

    def answers(self, questions: Sequence[Question]) -> Iterable[Answer]:
        return self.pool.map(self.client.ask, questions)


class Ask:
    """Asks a model of each sample that was made ready, and labels it by the answer, or by word lists."""

    def __init__(self, config: LabelConfig, make: type[Any], *arguments: Any) -> None:
        self.config = config
        self.model: Model = make(config, *arguments)
        self.states: Counter[str] = Counter()
        self.example = ""
        self._lock = threading.Lock()

    def __call__(self, works: list[Work]) -> None:
        ready = [work for work in works if "shown" in work.carried]
        questions = []
        for work in ready:
            count, shown, pictures = work.carried.pop("shown")
            questions.append(question_of(work.info, work.carried["needs"], count, shown, pictures))
        for work, answer in zip(ready, self.model.answers(questions), strict=True):
            self._count(answer)
            asked = Asked.of(self.model.by, self.model.name, PROMPT, answer, self.config.least_score)
            _take(work, work.carried["needs"], asked)
        for work in works:
            if fault := work.carried.get("fault"):
                asked = Asked(self.model.by, self.model.name, PROMPT, "unreadable", fault)
                _take(work, work.carried["needs"], asked)

    def _count(self, answer: Answer) -> None:
        """Raises DataError where so many fail that going on would only cost."""
        with self._lock:
            self.states[answer.state] += 1
            if answer.state != "answered":
                self.example = self.example or f"{state_name(answer.state)}: {answer.reason}"
            states = dict(self.states)
        asked = sum(states.values())
        failed = asked - states.get("answered", 0)
        if asked >= _ENOUGH and failed > self.config.most_failed * asked:
            counted = ", ".join(f"{state_name(state)} {count}" for state, count in sorted(states.items()))
            raise DataError(
                f"{self.model.name}: {failed} of {asked} answers give no labels ({counted}), at most "
                f"{percent(self.config.most_failed)} may. The first: {self.example}. Repair the endpoint or the model, "
                "and run the command again with --ask-again, or accept it: --set labels.most_failed=1. Nothing is lost"
            )


def _take(work: Work, needs: Needs, asked: Asked | None) -> None:
    if not needs:
        return
    made = label(work.info, needs, asked)
    work.info = made.info
    work.notes += made.counts
    work.trace = {"was": made.was}
    if asked is not None and asked.state != "labelled":
        work.trace["failed"] = f"{state_name(asked.state)}: {asked.reason}"
    work.carried["labelled"] = bool(made.info.labels)


def steps_of(config: LabelConfig, answers: str, nodes: Sequence[Mapping[str, float]]) -> list[Step]:
    """The steps that label samples as a configuration says, with as many actors as fit on the cluster's nodes, given by
    their resources as Ray names them. Raises DataError where one of each does not."""
    if config.labeller == "words":
        return [Step(ByWords, (config,), fit_pools({"readers": config.readers}, nodes, "labels")["readers"])]
    # an endpoint is asked by one actor, which keeps the limits of its rate and cost
    asking = ActorPool(cpus=0.5) if config.labeller == "endpoint" else config.actors
    pools = fit_pools({"readers": config.readers, "actors": asking}, nodes, "labels")
    show = Step(Show, (config,), pools["readers"])
    if config.labeller == "endpoint" and config.endpoint is not None:
        # while the slowest answers of some parts are awaited, others have theirs asked
        at_once = config.endpoint.at_once // SAMPLES_PER_UNIT + 4
        return [show, Step(Ask, (config, EndpointModel, answers), pools["actors"], parts_at_once=at_once)]
    from domainshuttle.pipelines.curation.labels.local_labeller import LocalModel  # brings llguidance

    return [show, Step(Ask, (config, LocalModel, answers), pools["actors"])]
