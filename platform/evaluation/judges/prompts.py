"""What judges are asked. A prompt's digest is part of every value: whoever changes a word changes the metric."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict

QuestionName = Literal["cross_domain", "domain_reached", "subject_kept"]


class Grade(BaseModel):
    """An answer to a question of 1 to 5, and nothing else."""

    model_config = ConfigDict(extra="forbid")

    score: Literal[1, 2, 3, 4, 5]


class Preference(BaseModel):
    """An answer to a question of two pictures."""

    model_config = ConfigDict(extra="forbid")

    better: Literal["first", "second", "neither"]


@dataclass(frozen=True)
class Prompt:
    """A versioned text. `text` has the places {caption}, {subject} and {domain}."""

    name: str
    version: int
    system: str
    text: str

    @cached_property
    def digest(self) -> str:
        content = "\0".join((self.name, str(self.version), self.system, self.text))
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    @property
    def id(self) -> str:
        """Its name in the kept answers."""
        return f"{self.name}.v{self.version}.{self.digest}"

    def filled(self, caption: str, subject: str, domain: str) -> str:
        """The text for one reference. A word that is not known is left out by what stands for it."""
        named = subject.strip() or "the subject of the reference picture"
        wanted = f"the domain {domain.strip()!r}" if domain.strip() else "the domain that the caption describes"
        return self.text.format(caption=caption.strip(), subject=named, domain=wanted)


_SYSTEM = (
    "You judge pictures strictly and answer with one number. You are shown a reference picture first and one frame of "
    "a generated video second. Judge only what can be seen, not how beautiful it is."
)

CROSS_DOMAIN = Prompt(
    "cross_domain",
    1,
    _SYSTEM,
    """The video was generated from the reference picture and this caption:
{caption}

The subject ({subject}) was to be carried into {domain}, and to stay recognisable. Give a score from 1 to 5:
5: the domain has changed as asked, and most intrinsic features of the subject are kept: shape, colour, texture, looks.
4: the domain has changed, the key features of the subject are right, with small flaws.
3: some key features only are kept or carried over, such as the body, while the rest did not change or is wrong.
2: only the background or trifles have changed.
1: the subject is a copy of the reference without any change of domain, or the subject is lost.""",
)
"""The paper's rubric, in words of our own. Its 1 mixes two opposite failures, which the next two tell apart."""

DOMAIN_REACHED = Prompt(
    "domain_reached",
    1,
    _SYSTEM,
    """The video was generated from the reference picture and this caption:
{caption}

Does {subject} in the frame look as if it belongs to {domain}? Do not judge whether it resembles the reference picture.
Give a score from 1 to 5:
5: wholly of that domain, in form, material and light.
4: clearly of that domain, with small remains of another.
3: half of that domain.
2: hardly of that domain: only the surroundings or trifles are.
1: not of that domain, or there is no such subject in the frame.""",
)

SUBJECT_KEPT = Prompt(
    "subject_kept",
    1,
    _SYSTEM,
    """The video was generated from the reference picture and this caption:
{caption}

Is it the same {subject} in the frame as in the reference picture, allowing for another style, material, pose, view and
light? Do not judge which domain or style it has. Give a score from 1 to 5:
5: the same individual beyond doubt: all features that tell it apart are there.
4: the same, with small differences.
3: alike: some features that tell it apart are there, others are wrong.
2: only of the same kind.
1: another thing, or there is no such subject in the frame.""",
)

PAIR = Prompt(
    "pair",
    1,
    "You compare pictures strictly. You are shown a reference picture first, then two frames of two generated videos. "
    "Judge only what can be seen, not how beautiful it is.",
    """Both videos were generated from the reference picture and this caption:
{caption}

The subject ({subject}) was to be carried into {domain}, and to keep the features that tell it apart. Which of the two
frames does this better? Answer "first" or "second"; "neither" where they do it equally well or equally badly.""",
)

QUESTIONS: dict[QuestionName, Prompt] = {
    "cross_domain": CROSS_DOMAIN, "domain_reached": DOMAIN_REACHED, "subject_kept": SUBJECT_KEPT,
}  # fmt: skip
