"""An answer of a language model as a checked value: strict JSON of a known form, or the reason why it is none."""

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Form = TypeVar("Form", bound=BaseModel)

_THOUGHT = re.compile(r"\A(?!\s*[{`]).*?</think>", re.DOTALL)
"""Up to its end: its beginning may stand in the question, where a chat template puts it."""
_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"\A\W*(?:i['’]?m sorry|sorry|i apologi[sz]e|i can(?:no|['’])?t|i(?: a|['’]?)m (?:unable|not able)"
    r"|unfortunately,? i|as an ai)\b",
    re.IGNORECASE,
)


class BadAnswer(ValueError):
    """An answer that has not the form that was asked for."""


class Declined(BadAnswer):
    """What a form raises of a text in it that declines the task, as a model writes that is held to the form."""


def parse_answer(text: str, form: type[Form]) -> Form:
    """The value of an answer: one JSON object, alone, in a code fence, or after what a model thought aloud.

    Nothing is guessed: text around the object, a second one, a key that comes twice, NaN, and values of another type
    are faults. Raises BadAnswer, of which Declined is one.
    """
    body = _THOUGHT.sub("", text)
    if fenced := _FENCE.match(body):
        body = fenced[1]
    try:
        content = json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant)
        if not isinstance(content, dict):
            raise BadAnswer(f"no JSON object: {_shown(text)}")
        return form.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        for one in error.errors():
            if isinstance(declined := one.get("ctx", {}).get("error"), Declined):
                raise declined from None
        faults = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'answer'}: {one['msg']}" for one in error.errors()[:3])
        raise BadAnswer(f"not the form that was asked for: {faults}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadAnswer):
            raise
        raise BadAnswer(f"no JSON ({str(error)[:80]}): {_shown(text)}") from None


def is_refusal(text: str) -> bool:
    """Whether a text that is no JSON declines the task."""
    return bool(_REFUSAL.match(_THOUGHT.sub("", text)))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise BadAnswer(f"a key comes twice among {[name for name, _ in pairs][:8]}")
    return content


def _no_constant(name: str) -> None:
    raise BadAnswer(f"{name} is no JSON number")


def _shown(text: str) -> str:
    return repr(text[:80])
