"""A multimodal model looks at two pictures: are they of one subject, and good enough to learn from?"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from domainshuttle.pipelines.endpoints.client import ChatClient, Question

PROMPT = "pair-quality-1"
_SYSTEM = (
    "You check pairs of pictures for training a model that keeps a subject's identity. Each picture shows a subject "
    "that was cut out of a frame, on white. Answer with one JSON object and nothing else."
)
_TEXT = (
    "Both pictures should show the same {word}: the same individual or object, not merely one of the same kind. "
    "Differences of pose, viewpoint, light and background are wanted. Answer with "
    '{{"same_subject": true or false, "score": 0 to 4, "reason": "a short sentence"}}. Score how well the second '
    "picture serves as a reference of the subject: 4 whole and sharp, 3 good, 2 parts are missing or blurred, 1 hardly "
    "to be recognised, 0 another thing or a part of one."
)


class PairQuality(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="forbid")

    same_subject: bool
    score: Annotated[float, Field(ge=0, le=4)]
    reason: str


def judge_pair(client: ChatClient, least: float, word: str, first: bytes, second: bytes) -> tuple[str, float]:
    """Why two pictures are no pair ('' where they are one), and the score. A refusal, an answer without the form, and a
    low score are three reasons. Raises EndpointError, CostLimitError."""
    question = Question(PROMPT, _SYSTEM, _TEXT.format(word=word), PairQuality, (first, second))
    answer = client.ask(question)
    if answer.state == "refused":
        return f"refused by the quality filter: {answer.reason}", 0.0
    if answer.state == "bad_answer":
        return f"bad answer of the quality filter: {answer.reason}", 0.0
    found: PairQuality = answer.value
    if not found.same_subject:
        return f"another subject for the quality filter: {found.reason}", found.score
    if found.score < least:
        return f"low quality: {found.score:g}, least_quality is {least:g}: {found.reason}", found.score
    return "", found.score
