"""The types of settings: how numbers may be written, and how large they may be.

Values come as the texts that were typed (platform/config/yaml_text.py) or as numbers. Every number of a section has a
least and a most: beyond them are mistakes, and numbers that what works with them could not hold.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from domainshuttle.pipelines.sample import LEAST_FPS, MOST_FPS


def _no_octal(text: str) -> None:
    if re.fullmatch(r"[+-]?0[0-9_]+(\.\d*)?", text):
        raise ValueError("a zero before a number may mean octal: leave it out")


def whole(value: Any) -> Any:
    """The number of a text such as `12`, `1_000`, `0x10` or `1e9`; what is none of them is left to pydantic."""
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    if not isinstance(value, str):
        return value
    text = value.strip()
    _no_octal(text)
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        number = Decimal(text)
    except InvalidOperation:
        return value
    small = number.is_finite() and abs(number.adjusted()) < 30  # beyond, also a computer's memory ends
    return int(number) if small and number == number.to_integral_value() else value


def _real(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    if isinstance(value, str):
        _no_octal(value.strip())
        if value.strip().lower().lstrip("+-") in (".inf", ".nan"):
            return float(value.strip().lower().replace(".", ""))
    return value


def _devices(value: float) -> float:
    """What Ray can reserve: a share of one GPU, or whole ones."""
    if value > 1 and value != int(value):
        raise ValueError("should be a share of one GPU, such as 0.5, or a whole number of them")
    return value


def _resource(value: float) -> float:
    if 0 < value < _LEAST_RESOURCE:
        raise ValueError(f"should be 0, or at least {_LEAST_RESOURCE:g}, the least that Ray reserves")
    return value


_LEAST_RESOURCE = 0.0001
MOST_BATCH = 1 << 17
"""Samples of a global batch: what the step plan's integers hold."""
MOST_STEPS = 10_000_000
"""Steps of a stage; Ray Data is given the plan in tasks of 4096."""
MOST_COUNT = 1 << 53
"""Of what is only counted: the last integer that JSON and a float64 hold exactly."""

Whole = Annotated[int, BeforeValidator(whole)]
Real = Annotated[float, BeforeValidator(_real)]
"""Finite in a Section."""
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[Whole, Field(ge=1, le=MOST_COUNT)]
Steps = Annotated[Whole, Field(ge=1, le=MOST_STEPS)]
Batch = Annotated[Whole, Field(ge=1, le=MOST_BATCH)]
Share = Annotated[Real, Field(ge=0, le=1)]
Time = Annotated[Real, Field(ge=0, le=1)]
"""A shifted timestep of flow matching."""
Seconds = Annotated[Real, Field(gt=0, le=1e9)]
Hours = Annotated[Real, Field(gt=0, le=1e9)]
Fps = Annotated[Real, Field(ge=LEAST_FPS, le=MOST_FPS)]
Rate = Annotated[Real, Field(ge=1e-12, le=1e3)]
"""A learning rate: Adam moves a weight by about as much in a step."""
Cpus = Annotated[Real, Field(ge=0, le=1e5), AfterValidator(_resource)]
Gpus = Annotated[Real, Field(ge=0, le=1e5), AfterValidator(_resource), AfterValidator(_devices)]


class Section(BaseModel):
    """A part of a configuration: immutable, strict about names, with finite numbers.

    One without any key, as where all of them are commented out, has its defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, content: Any) -> Any:
        return {} if content is None else content


class ActorPool(Section):
    """The actors that encode, and what each reserves, which may be a fraction."""

    actors: Count = 1
    cpus: Cpus = Field(1.0, description="CPUs of an actor, on any node")
    gpus: Gpus = Field(0.0, description="GPUs of an actor: those beside the trainers, or shares of them")
