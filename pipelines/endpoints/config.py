"""What an endpoint that speaks OpenAI's protocol is told, and how much may be asked of it."""

import os
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from domainshuttle.pipelines.errors import DataError, mask_secrets
from domainshuttle.pipelines.values import Count, Real, Seconds, Section, Text, Whole

MOST_AT_ONCE = 1024


def _url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("should begin with http:// or https:// and end before /chat/completions")
    if mask_secrets(value) != value:
        raise ValueError("has a secret in it: name the variable that holds the key as key_variable")
    parts = urlsplit(value)  # whose port raises ValueError where it is none
    if not parts.hostname or parts.port == 0 or set(value) & set("?#\\ ") or not value.isprintable():
        raise ValueError("should be a machine, a port and a path: no query, no fragment, no spaces")
    return value.rstrip("/").removesuffix("/chat/completions")


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint: vLLM's, or a hosted one."""

    url: Annotated[Text, AfterValidator(_url)] = Field(description="such as http://gpu-node:8000/v1")
    model: Text = Field(description="the model's name, as the endpoint knows it; pin a dated one where there is one")
    key_variable: Text | None = Field(None, description="environment variable that holds the key; none: no key")
    at_once: Whole = Field(32, ge=1, le=MOST_AT_ONCE, description="requests at the same time")
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    most_cost: Real | None = Field(None, gt=0, le=1e9, description="of all answers that are kept, in the prices' money")
    price_in: Real = Field(0.0, ge=0, le=1e6, description="of a million tokens that are sent")
    price_out: Real = Field(0.0, ge=0, le=1e6, description="of a million tokens that are answered")
    answers: Whole = Field(3, ge=1, le=20, description="how often it is asked until an answer has the form")
    answer_tokens: Whole = Field(1024, ge=1, le=1 << 17, description="most tokens of an answer")
    temperature: Real = Field(0.0, ge=0, le=2)
    seed: Whole = Field(0, ge=0, le=1 << 31)
    json_form: Literal["schema", "object", "none"] = Field(
        "schema", description="response_format: json_schema, json_object, or none where the endpoint has neither"
    )
    logprobs: bool = Field(False, description="ask for the log-probabilities of the answer's tokens, and keep them")
    timeout: Seconds = Field(120.0, description="seconds for one answer")
    patience: Seconds = Field(3600.0, description="seconds without any answer (429, 5xx, no connection) before it ends")

    def key(self) -> str | None:
        """The key. Raises DataError where its variable is not set."""
        if self.key_variable is None:
            return None
        if not (key := os.environ.get(self.key_variable, "").strip()):
            raise DataError(f"{self.url}: the key is to be in {self.key_variable}, which is not set: export it")
        if not (key.isascii() and key.isprintable()):
            raise DataError(
                f"{self.url}: what is in {self.key_variable} is no key: it has a line break, or characters that are "
                "no ASCII, as where it was copied out of a text: export it again"
            )
        return key

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Of a request, in the prices' money."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6
