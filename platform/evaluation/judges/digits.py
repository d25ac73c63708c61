"""A grade from an answer: the digit that was said or, where the log-probabilities of its alternatives came along, the
expectation over the five digits, which varies less from call to call."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SCORE = re.compile(r'"score"\s*:\s*([1-5])')


def expected_grade(raw: str, logprobs: Any) -> float | None:
    """The expectation over 1 to 5 at the place of the digit in the answer; None where it can't be told: there are no
    log-probabilities, their tokens do not spell the answer, or the digit is not a token of its own."""
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        return None
    try:
        text = "".join(one["token"] for one in tokens)
        places, said = list(_SCORE.finditer(text)), _SCORE.findall(raw)
        if not places or not said or places[-1][1] != said[-1]:
            return None
        end, at = places[-1].start(1), 0
        for one in tokens:
            if at <= end < at + len(one["token"]):
                return _expectation([one, *(one.get("top_logprobs") or [])]) if _digit(one["token"]) else None
            at += len(one["token"])
    except (KeyError, TypeError, AttributeError, OverflowError):
        return None
    return None


def _expectation(alternatives: Sequence[Mapping[str, Any]]) -> float | None:
    shares: dict[int, float] = {}
    for one in alternatives:
        if (digit := _digit(one["token"])) and math.isfinite(chance := math.exp(one["logprob"])):
            shares[digit] = max(shares.get(digit, 0.0), chance)  # the chosen token is among the alternatives too
    total = sum(shares.values())
    return sum(digit * share for digit, share in shares.items()) / total if total > 0 else None


def _digit(token: str) -> int | None:
    """The grade that a token is, with no more than space around it."""
    text = token.strip()
    return int(text) if len(text) == 1 and text in "12345" else None
