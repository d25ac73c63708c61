"""One client for endpoints that speak OpenAI's protocol: questions with pictures, answers of a checked form.

It serves the labelling of corpora and the judges of evaluation. An answer is one of three: `answered` with a value of
the form, `refused` (the model or a filter declines), or `bad_answer` (no JSON of the form, or cut). Whether a value is
good enough, such as a score, is for who asked. All three are kept (`Answers`), so that nothing is asked or paid twice.
What says nothing of the question, 429, 5xx, a lost connection, is tried again for `patience` seconds and then raised.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import httpx2
from pydantic import BaseModel
from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception_type, wait_random_exponential

from domainshuttle.pipelines.endpoints.answers import Answers
from domainshuttle.pipelines.endpoints.config import EndpointConfig
from domainshuttle.pipelines.endpoints.json_answer import BadAnswer, Declined, is_refusal, parse_answer
from domainshuttle.pipelines.endpoints.limits import Limits
from domainshuttle.pipelines.errors import StorageError, one_line

State = Literal["answered", "refused", "bad_answer"]
_PICTURE_TOKENS = 1600
"""What a picture is taken for before the endpoint says how many tokens it was."""
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 507, *range(520, 531)})
_ODD_ANSWERS = 5
"""Answers with code 200 that are no chat completion, in a row, after which it is no such endpoint."""


class EndpointError(StorageError):
    """An endpoint that is not there, refuses us, or is none: nothing is known of the questions."""


class PictureForm(BaseModel):
    """The form of an answer that is a picture: the value is its bytes."""


@dataclass(frozen=True)
class Question:
    """What is asked: `prompt` names the texts' version, `pictures` are JPEG or PNG bytes, `form` the answer's."""

    prompt: str
    system: str
    text: str
    form: type[BaseModel]
    pictures: tuple[bytes, ...] = ()
    repeat: int = 0
    """The same question may be asked several times: each repeat is another question, with a seed of its own."""


@dataclass(frozen=True)
class Answer:
    """What came: `value` is of the question's form where the state is `answered`, `reason` says why it is not;
    `digest` is its name in the store, `raw` the model's own text."""

    state: State
    digest: str
    raw: str = ""
    value: Any = None
    reason: str = ""
    cached: bool = False
    logprobs: Any = None


class _TryAgain(Exception):
    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _Stopped(Exception):
    """Another thread met what ends the work."""


@dataclass
class ChatClient:
    """Asks one endpoint. Safe to share between threads; `ask_all` uses `at_once` of its own."""

    config: EndpointConfig
    folder: Path
    transport: httpx2.BaseTransport | None = None
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _fault: Exception | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        key = self.config.key()
        self.answers = Answers(self.folder)
        self.limits = Limits(self.config, self.answers.spent)
        self.requests = 0
        """How many were sent."""
        self._odd = 0
        self._last_good = time.monotonic()
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._at_once = threading.BoundedSemaphore(self.config.at_once)
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.config.timeout,
            limits=httpx2.Limits(max_connections=self.config.at_once, max_keepalive_connections=self.config.at_once),
            transport=self.transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._http.close()

    def ask(self, question: Question) -> Answer:
        """The answer that is kept, or a new one; of bad ones the last of `answers` tries. Raises EndpointError,
        CostLimitError."""
        answer = None
        for number in range(self.config.answers):
            key = self._digest(question, number)
            with self._lock:
                asking = self._asking.setdefault(key, threading.Lock())
            with asking:  # the same question at the same time is asked once
                kept = self.answers.find(key)
                cached = kept is not None
                content = self._guarded(question, key, number) if kept is None else kept
            with self._lock:
                self._asking.pop(key, None)
            answer = judged(question, key, content, cached)
            if answer.state != "bad_answer":
                return answer
        assert answer is not None
        return answer

    def ask_all(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Their answers in order, `at_once` at a time."""
        with self.threads() as pool:
            yield from pool.map(self.ask, questions)

    def threads(self) -> ThreadPoolExecutor:
        """Threads to ask from: more than are answered at once, so that the endpoint has its next question at hand
        while another is made ready or its answer is looked at."""
        return ThreadPoolExecutor(self.config.at_once + self.config.at_once // 4 + 2, "ask")

    def _guarded(self, question: Question, key: str, number: int) -> dict[str, Any]:
        """One fault ends all threads' waiting."""
        body = self._body(question, number)
        with self._at_once:
            if self._stop.is_set():
                raise self._fault or _Stopped()
            try:
                return self._request(question, key, body)
            except _Stopped:
                raise (self._fault or EndpointError(f"{self.config.url}: stopped")) from None
            except Exception as error:
                self._fault = self._fault or error
                self._stop.set()
                raise

    def _request(self, question: Question, key: str, body: bytes) -> dict[str, Any]:
        tokens_in = (len(question.system) + len(question.text)) // 3 + _PICTURE_TOKENS * len(question.pictures) + 200
        most = self.config.cost(tokens_in, self.config.answer_tokens)
        self.limits.reserve(most, self._stop.is_set)
        cost = 0.0
        try:
            tries = Retrying(
                retry=retry_if_exception_type(_TryAgain), stop=self._out_of_patience, wait=self._wait, sleep=self._pause
            )
            try:
                content = tries(self._send, body, tokens_in + self.config.answer_tokens)
            except RetryError as ended:
                raise EndpointError(
                    f"{self.config.url}: no answer for {self.config.patience:g} s, the last try: "
                    f"{ended.last_attempt.exception()}. Is it up, and are the limits (at_once={self.config.at_once}, "
                    "requests_per_minute, tokens_per_minute) within what it allows? All answers are kept: run the "
                    "command again"
                ) from None
            usage = content.get("usage") or {}
            tokens_out = len(content.get("text", "").encode()) // 3  # of endpoints that do not say how many
            cost = self.config.cost(usage.get("prompt_tokens", tokens_in), usage.get("completion_tokens", tokens_out))
            state = judged(question, key, content).state
            said = {"prompt": question.prompt, "model": self.config.model, "state": state}
            self.answers.keep(key, {**said, **content}, cost)
            return content
        finally:
            self.limits.settle(most, cost)

    def _send(self, body: bytes, tokens: int) -> dict[str, Any]:
        self._pause(self.limits.wait_time(tokens))
        with self._lock:
            self.requests += 1
        try:
            response = self._http.post(
                f"{self.config.url}/chat/completions", content=body, headers={"Content-Type": "application/json"}
            )
        except httpx2.RequestError as error:
            raise _TryAgain(f"{type(error).__name__}: {one_line(error)}") from None
        status = _status(response)
        if status in _AGAIN:
            raise _TryAgain(f"HTTP {status} {_said(response)}", _retry_after(response))
        if status in (400, 413, 422):
            self._last_good = time.monotonic()
            said = _said(response)
            filtered = "content_filter" in response.text or "content_policy" in response.text
            return {"status": status, "refusal": said} if filtered else {"fault": said}
        if status != 200:
            raise EndpointError(self._not_let_in(status, response))
        return self._completion(response)

    def _completion(self, response: httpx2.Response) -> dict[str, Any]:
        try:
            content = response.json()
            choice = content["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal")
            parts = [*(text if isinstance(text, list) else ()), *(message.get("images") or ())]
            pictures = [one["image_url"]["url"] for one in parts if "image_url" in one]
            if isinstance(text, list):
                text = "".join(one["text"] for one in text if "text" in one)
            if not isinstance(text, str | None) or not isinstance(refusal, str | None):
                raise TypeError("content is no text")
            usage = content.get("usage") or {}
            usage = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens") if usage.get(name)}
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            with self._lock:
                self._odd += 1
                odd = self._odd
            if odd >= _ODD_ANSWERS:
                raise EndpointError(
                    f"{self.config.url} does not speak OpenAI's protocol: {odd} answers in a row were no chat "
                    f"completion, such as {one_line(ValueError(response.text[:120]))!r}. Give the url that ends with "
                    "/v1 of a vLLM server or a hosted endpoint"
                ) from None
            raise _TryAgain(f"no chat completion: {response.text[:80]!r}") from None
        with self._lock:
            self._odd, self._last_good = 0, time.monotonic()
        return {
            "text": _writable(text or ""),
            "refusal": _writable(refusal or ""),
            "finish": choice.get("finish_reason") or "",
            "usage": usage,
            **({"logprobs": choice["logprobs"]} if choice.get("logprobs") else {}),
            **({"pictures": pictures} if pictures else {}),
        }

    def _not_let_in(self, status: int, response: httpx2.Response) -> str:
        said = _said(response)
        if status in (401, 403):
            where = f"the key in {self.config.key_variable}" if self.config.key_variable else "no key (key_variable)"
            return f"{self.config.url} refused the request with {where}: HTTP {status} {said}"
        if moved := response.headers.get("location"):
            said = f"it has moved to {moved[:200]}"
        return (
            f"{self.config.url}/chat/completions with model {self.config.model!r}: HTTP {status} {said}. "
            "Check url and model: curl URL/models lists what it serves"
        )

    def _out_of_patience(self, state: RetryCallState) -> bool:
        # of the endpoint and not of one question: while others are answered it is only busy
        since = max(self._last_good, time.monotonic() - (state.seconds_since_start or 0.0))
        return time.monotonic() - since >= self.config.patience

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        after = error.after if isinstance(error, _TryAgain) else 0.0
        return max(wait_random_exponential(multiplier=0.5, max=60.0)(state), min(after, self.config.patience))

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(max(seconds, 0.0)):
            raise _Stopped

    def _parameters(self, question: Question, number: int) -> dict[str, Any]:
        """What decides an answer, beside its texts. A bad answer is followed by one of another seed."""
        config = self.config
        return {
            "model": config.model,
            "temperature": config.temperature,
            "max_tokens": config.answer_tokens,
            "seed": config.seed + question.repeat * config.answers + number,
            **({"logprobs": True, "top_logprobs": 10} if config.logprobs else {}),
        }

    def _digest(self, question: Question, number: int) -> str:
        asked = {
            **self._parameters(question, number),
            "prompt": question.prompt, "system": question.system, "text": question.text,
            "form": _schema(question.form), "try": number, "json_form": self.config.json_form,
            "pictures": [hashlib.blake2b(data, digest_size=16).hexdigest() for data in question.pictures],
            **({"repeat": question.repeat} if question.repeat else {}),
        }  # fmt: skip
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _body(self, question: Question, number: int) -> bytes:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:{_type(data)};base64,{base64.b64encode(data).decode()}"}}
            for data in question.pictures
        ]
        content.append({"type": "text", "text": question.text})
        if question.form is PictureForm:
            system_text = [{"role": "system", "content": question.system}] if question.system else []
            messages: list[dict[str, Any]] = [*system_text, {"role": "user", "content": content}]
            picture = {**self._parameters(question, number), "messages": messages, "modalities": ["image", "text"]}
            return json.dumps(picture).encode()
        schema = _schema(question.form)
        system = f"{question.system}\nAnswer with one JSON object of this schema and nothing else: {json.dumps(schema)}"
        body = {
            **self._parameters(question, number),
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": content}],
        }
        if self.config.json_form == "schema":
            form = {"name": question.form.__name__, "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        elif self.config.json_form == "object":
            body["response_format"] = {"type": "json_object"}
        return json.dumps(body).encode()


@lru_cache(maxsize=256)
def _schema(form: type[BaseModel]) -> dict[str, Any]:
    return form.model_json_schema()


def judged(question: Question, key: str, content: dict[str, Any], cached: bool = False) -> Answer:
    """The state of what was answered: a function of what is kept (`text`, `refusal`, `finish`, `fault`)."""
    raw = content.get("text", "")
    if content.get("refusal") or content.get("finish") == "content_filter":
        return Answer("refused", key, raw, reason=content.get("refusal") or "content filter", cached=cached)
    if fault := content.get("fault"):
        return Answer("bad_answer", key, raw, reason=f"the endpoint does not take the question: {fault}", cached=cached)
    if content.get("finish") == "length":
        return Answer("bad_answer", key, raw, reason="cut: it has more tokens than answer_tokens", cached=cached)
    try:
        value = _picture(content) if question.form is PictureForm else parse_answer(raw, question.form)
    except BadAnswer as error:
        if is_refusal(raw) or isinstance(error, Declined):
            reason = str(error) if isinstance(error, Declined) else raw[:120]
            return Answer("refused", key, raw, reason=reason, cached=cached)
        return Answer("bad_answer", key, raw, reason=str(error), cached=cached)
    return Answer("answered", key, raw, value, cached=cached, logprobs=content.get("logprobs"))


def _picture(content: dict[str, Any]) -> bytes:
    """The bytes of the first picture of an answer, which is a data URL. Raises BadAnswer where there is none."""
    for url in content.get("pictures", ()):
        head, comma, data = str(url).partition(",")
        if comma and head.startswith("data:image/") and head.endswith(";base64"):
            try:
                return base64.b64decode(data, validate=True)
            except ValueError:
                break
    raise BadAnswer(f"no picture as a data URL: {content.get('text', '')[:80]!r}")


def _error(response: httpx2.Response) -> Any:
    """The error that an answer names, also with code 200, as gateways do: its own, or that of its choice."""
    try:
        content = response.json()
    except (ValueError, RecursionError):
        return None
    places = [content, *(content["choices"] if isinstance(content, dict) and content.get("choices") else ())]
    return next((one["error"] for one in places if isinstance(one, dict) and one.get("error")), None)


def _status(response: httpx2.Response) -> int:
    """The code of an answer; of an error that came with code 200 the one that it names, or 500."""
    if response.status_code != 200 or not (error := _error(response)):
        return response.status_code
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _said(response: httpx2.Response) -> str:
    error = _error(response)
    text = (error.get("message") or error) if isinstance(error, dict) else error or response.text
    return one_line(ValueError(_writable(str(text))[:200].strip() or "without a text"))


def _writable(text: str) -> str:
    """A text in which halves of surrogate pairs, which no UTF-8 can hold, are spelled out."""
    return text.encode(errors="backslashreplace").decode()


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the endpoint asks for, given as seconds or a date."""
    text = response.headers.get("retry-after", "")
    try:
        return max(float(text), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _type(data: bytes) -> str:
    return "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
