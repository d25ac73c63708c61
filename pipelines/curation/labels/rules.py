"""Which samples need labels, and what an answer, or the lack of one, makes of a sample. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.corpora.words import (
    CAPTION_IS_INSTRUCTION,
    FROM_WORDS,
    WORDS_DIGEST,
    domain_of,
    is_unnamed,
    known_words,
)
from domainshuttle.pipelines.curation.labels.config import LabelConfig, LabelName
from domainshuttle.pipelines.curation.labels.questions import MOST_SUBJECTS, Needs
from domainshuttle.pipelines.endpoints.client import Answer
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.sample import Label, LabelState, SampleInfo, Subject

SCORE = "label_score"
"""The model's own certainty, 1 to 5, as a score of the sample."""
_WORDS = f"words-{WORDS_DIGEST}"


def state_name(state: str) -> str:
    """A state for people, and as the kind of a reason: 'bad answer'."""
    return state.replace("_", " ")


@dataclass(frozen=True)
class Asked:
    """What came of asking a model: of an answer its state and value, else why there is none."""

    by: Literal["endpoint", "transformers"]
    model: str
    prompt: str
    state: LabelState
    reason: str = ""
    answer: str = ""
    value: Any = None

    @classmethod
    def of(
        cls, by: Literal["endpoint", "transformers"], model: str, prompt: str, answer: Answer, least_score: int
    ) -> "Asked":
        """An answer judged: one whose score is too low counts for nothing."""
        if answer.state != "answered":
            return cls(by, model, prompt, answer.state, answer.reason, answer.digest)
        if answer.value.score < least_score:
            reason = f"a score of {answer.value.score}, at least {least_score} is wanted"
            return cls(by, model, prompt, "low_score", reason, answer.digest, answer.value)
        return cls(by, model, prompt, "labelled", "", answer.digest, answer.value)


@dataclass
class Labelled:
    """What became of a sample: its description, what is counted of it, and by value what stood there before."""

    info: SampleInfo
    counts: list[str] = field(default_factory=list)
    was: dict[str, Any] = field(default_factory=dict)


def needs_of(config: LabelConfig, info: SampleInfo) -> Needs:
    """What of a sample is to be labelled."""
    every, values = config.which == "all", config.values
    unnamed = tuple(one.id for one in info.subjects if every or is_unnamed(one.word))
    return Needs(
        caption="caption" in values and (every or not info.caption.strip() or CAPTION_IS_INSTRUCTION in info.scores),
        words=unnamed if "words" in values else (),
        domains="domains" in values and bool(info.subjects) and (every or _is_guessed(info)),
        find="words" in values and not info.subjects,
    )


def _is_guessed(info: SampleInfo) -> bool:
    """Whether no source knew the domains of all subjects."""
    return FROM_WORDS in info.scores or any(one.domain < 0 for one in info.subjects)


def may_need(config: LabelConfig, index: Index) -> np.ndarray:
    """Which samples of an index may need labels, by its columns alone: all that do, and a few more."""
    if config.which == "all":
        return np.ones(len(index), bool)
    table, needed = index.table, np.zeros(len(index), bool)
    subjects = pc.list_value_length(table.column("subjects")).to_numpy(zero_copy_only=False)
    if "caption" in config.values:
        needed |= index.column("caption_length") <= _BLANK_CAPTION
        needed |= _with_score(table, CAPTION_IS_INSTRUCTION)
    if "domains" in config.values:
        needed |= _with_score(table, FROM_WORDS) & (subjects > 0)
        needed |= _with_entry(table, "domains", lambda domain: domain < 0)
    if "words" in config.values:
        needed |= (subjects == 0) | _with_entry(table, "subjects", is_unnamed)
    return needed


_BLANK_CAPTION = 8
"""Characters of a caption up to which it may be blank; the index has only its length."""


def _with_entry(table: pa.Table, name: str, holds: Callable[[Any], bool]) -> np.ndarray:
    """Which rows have an entry in a column of lists for which this holds."""
    column = table.column(name).combine_chunks()
    entries = pc.list_flatten(column).dictionary_encode()
    chosen = np.array([holds(value) for value in entries.dictionary.to_pylist()], bool)
    rows = pc.list_parent_indices(column).to_numpy()
    found = np.zeros(len(table), bool)
    if len(rows):
        found[rows[chosen[entries.indices.to_numpy()]]] = True
    return found


def _with_score(table: pa.Table, name: str) -> np.ndarray:
    column = table.column("scores").combine_chunks()
    offsets = column.offsets.to_numpy()
    names = column.keys.slice(offsets[0], offsets[-1] - offsets[0])
    rows = np.repeat(np.arange(len(table)), np.diff(offsets))
    found = np.zeros(len(table), bool)
    found[rows[pc.equal(names, name).to_numpy(zero_copy_only=False)]] = True
    return found


def label(info: SampleInfo, needs: Needs, asked: Asked | None) -> Labelled:
    """A sample with labels: those of a model that was `asked` where its answer counts, else those of word lists, which
    write no captions and keep what the source knew.

    Each value that was to be labelled is in the sample's `labels` and in the counts, with what came of it.
    """
    work = _Labelling(info, asked)
    if needs.caption:
        work.caption()
    if needs.find:
        work.find()
    elif needs.words:
        work.words(needs.words)
    if needs.domains:
        work.domains()
    return work.finished()


class _Labelling:
    def __init__(self, info: SampleInfo, asked: Asked | None) -> None:
        self.info, self.asked = info, asked
        self.value = asked.value if asked is not None and asked.state == "labelled" else None
        self.subjects, self.scores = list(info.subjects), dict(info.scores)
        self.text, self.labels, self.guessed = info.caption, dict(info.labels), _is_guessed(info)
        self.counts: list[str] = []
        self.was: dict[str, Any] = {}
        if asked is not None and asked.value is not None:
            self.scores[SCORE] = float(asked.value.score)

    def caption(self) -> None:
        if self.value is not None:
            self.was["caption"], self.text = self.info.caption, self.value.caption
            self.scores.pop(CAPTION_IS_INSTRUCTION, None)
        self._note("caption", "source")

    def find(self) -> None:
        """Subjects of a sample that has none."""
        if self.value is not None:
            found = [(one.word, DOMAINS.index(one.domain)) for one in self.value.subjects]
        else:
            found = [(word, domain_of(word)) for word in known_words(self.info.caption)[:MOST_SUBJECTS]]
            if found:
                self.scores[FROM_WORDS] = 1.0
        self.was["subjects"] = []
        self.subjects = [Subject(id=number, word=word, domain=domain) for number, (word, domain) in enumerate(found)]
        self._note("words", "words" if found else "source")
        if found:
            self._note("domains", "words")

    def words(self, wanted: Sequence[int]) -> None:
        """Words of subjects that have none, or of all."""
        self.was["subjects"] = before = [one.word for one in self.info.subjects]
        named = known_words(self.info.caption) if len(before) == 1 else []  # of several it can't be told which
        for number in wanted:
            one = self.subjects[number]
            if self.value is not None:
                self.subjects[number] = one.model_copy(update={"word": self.value.subjects[number].word})
            elif named and is_unnamed(one.word):
                # a domain that followed from the word that stood for one follows from the new one
                follows = self.guessed and one.domain == domain_of(one.word)
                domain = domain_of(named[0]) if follows else one.domain
                self.subjects[number] = Subject(id=number, word=named[0], domain=domain)
        self._note("words", "words" if [one.word for one in self.subjects] != before else "source")

    def domains(self) -> None:
        self.was["domains"] = [one.domain for one in self.info.subjects]
        for number, one in enumerate(self.subjects):
            if self.value is not None:
                domain = DOMAINS.index(self.value.subjects[number].domain)
            else:
                domain = one.domain if one.domain >= 0 else domain_of(one.word)
            self.subjects[number] = one.model_copy(update={"domain": domain})
        if self.value is not None:
            self.scores.pop(FROM_WORDS, None)
        elif self.guessed:
            self.scores[FROM_WORDS] = 1.0
        self._note("domains", "words" if self.guessed else "source")

    def finished(self) -> Labelled:
        update = {
            "caption": self.text, "subjects": self.subjects, "scores": self.scores,
            "labels": dict(sorted(self.labels.items())),
        }  # fmt: skip
        return Labelled(self.info.model_copy(update=update), self.counts, self.was)

    def _note(self, name: LabelName, else_by: Literal["words", "source"]) -> None:
        """Who made a value: the model, or where it gave none, `else_by`."""
        asked = self.asked
        if asked is None:
            if else_by == "source":
                self.counts.append(f"{name}: as the source has it")
                return
            self.labels[name] = Label(by="words", state="labelled", prompt=_WORDS)
            self.counts.append(f"{name}: by word lists")
            return
        by = asked.by if self.value is not None else else_by
        self.labels[name] = Label(by=by, state=asked.state, model=asked.model, prompt=asked.prompt, answer=asked.answer)
        stands = {"words": "by word lists instead", "source": "as the source has it"}
        self.counts.append(f"{name}: {state_name(asked.state)}, {stands.get(by, f'by {by}')}")
