"""The client of OpenAI-compatible endpoints, against a real server. Run: python -m pytest tests/pipelines/endpoints"""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import Reply, openai_server
from pydantic import BaseModel, ConfigDict, Field

from domainshuttle.pipelines.endpoints.answers import Answers
from domainshuttle.pipelines.endpoints.client import ChatClient, EndpointError, Question
from domainshuttle.pipelines.endpoints.config import EndpointConfig
from domainshuttle.pipelines.endpoints.json_answer import BadAnswer, parse_answer
from domainshuttle.pipelines.endpoints.limits import CostLimitError, Limits
from domainshuttle.pipelines.errors import DataError


class Score(BaseModel):
    model_config = ConfigDict(extra="forbid")
    score: int = Field(ge=1, le=5)
    why: str


GOOD = '{"score": 3, "why": "as it is"}'


def question(text: str = "how good?", *pictures: bytes) -> Question:
    return Question("judge-1", "You judge pictures.", text, Score, pictures)


def client(url: str, folder: Path, **changes: Any) -> ChatClient:
    return ChatClient(EndpointConfig(url=url, model="m", **{"at_once": 4, "patience": 20.0, **changes}), folder)


def test_a_question_with_pictures_is_asked_once_in_its_life(tmp_path: Path) -> None:
    with openai_server(lambda *_: Reply(GOOD)) as server:
        for _ in range(2):  # another process, as it were
            with client(server.url, tmp_path) as asks:
                answer = asks.ask(question("how good?", b"\xff\xd8one", b"\x89PNGtwo"))
                assert answer.state == "answered" and answer.value == Score(score=3, why="as it is")
                assert asks.ask(question("how good?", b"\xff\xd8one", b"\x89PNGtwo")).cached
        (body,) = server.requests
        urls = [part["image_url"]["url"] for part in body["messages"][1]["content"][:2]]
        assert urls[0].startswith("data:image/jpeg;base64,") and urls[1].startswith("data:image/png;base64,")
        assert body["response_format"]["json_schema"]["schema"] == Score.model_json_schema()
        with client(server.url, tmp_path) as asks:
            assert not asks.ask(question("how good?", b"\xff\xd8other")).cached
            assert not asks.ask(question("another")).cached
        assert len(server.requests) == 3


def test_the_same_question_at_the_same_time_is_asked_once(tmp_path: Path) -> None:
    with openai_server(lambda *_: Reply(GOOD, after=0.2)) as server, client(server.url, tmp_path) as asks:
        assert {answer.state for answer in asks.ask_all([question()] * 8)} == {"answered"}
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Reply(code=429, headers={"Retry-After": "0"}),
        Reply(code=500, body=b"oops"),
        Reply(GOOD, cut=True),
        Reply(body=b"<html>a proxy's page</html>"),
        Reply(body=b'{"choices": []}'),
        Reply(GOOD, headers={"Content-Encoding": "gzip"}),
        Reply(body=b"[" * 100_000),
        Reply(body=b'{"choices": [{"message": {"content": "{}"}}], "usage": {"prompt_tokens": Infinity}}'),
        Reply(body=b'{"choices": [{"error": {"code": 502}, "finish_reason": "error", "message": {"content": ""}}]}'),
    ],
    ids=["429", "500", "cut connection", "nonsense", "no choices", "no gzip", "deep", "infinite", "choice's error"],
)
def test_what_says_nothing_of_the_question_is_tried_again(tmp_path: Path, fault: Reply) -> None:
    with openai_server(lambda _, number: fault if number < 2 else Reply(GOOD)) as server:
        with client(server.url, tmp_path) as asks:
            assert asks.ask(question()).state == "answered"
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "state", "asked"),
    [
        (Reply("I'm sorry, but I can't help with that."), "refused", 1),
        (Reply(refusal="no people"), "refused", 1),
        (Reply("", finish="content_filter"), "refused", 1),
        (Reply(code=400, body=b'{"error": {"code": "content_filter", "message": "filtered"}}'), "refused", 1),
        (Reply('{"score": 9, "why": ""}'), "bad_answer", 3),
        (Reply("about three"), "bad_answer", 3),
        (Reply(GOOD[:9], finish="length"), "bad_answer", 3),
        (Reply(code=400, body=b'{"error": {"message": "too many tokens"}}'), "bad_answer", 3),
        (Reply('{"score": 1, "why": "a copy"}'), "answered", 1),
        (Reply("I\u2019m sorry, but I can\u2019t help with that."), "refused", 1),
        (Reply('{"score": 1, "why": "half a face: \ud83d"}'), "bad_answer", 3),
        (Reply(f"first {{...}}, then\n</think>\n\n{GOOD}"), "answered", 1),
        (Reply('{"score": 1, "why": "it says </think>"}'), "answered", 1),
    ],
)
def test_a_refusal_a_bad_answer_and_a_low_score_are_three(tmp_path: Path, reply: Reply, state: str, asked: int) -> None:
    with openai_server(lambda *_: reply) as server:
        for _ in range(2):
            with client(server.url, tmp_path) as asks:
                assert asks.ask(question()).state == state
        assert len(server.requests) == asked  # kept, whatever it was


def test_a_bad_answer_is_asked_again_with_another_seed(tmp_path: Path) -> None:
    with openai_server(lambda _, number: Reply(GOOD if number else "{")) as server:
        with client(server.url, tmp_path, seed=5) as asks:
            assert asks.ask(question()).state == "answered"
        assert [body["seed"] for body in server.requests] == [5, 6]


def test_an_endpoint_that_is_none_is_one_message_for_all_threads(tmp_path: Path) -> None:
    with openai_server(lambda *_: Reply(code=429, headers={"Retry-After": "1"})) as server:
        with (
            client(server.url, tmp_path, patience=0.5) as asks,
            pytest.raises(EndpointError, match=r"no answer for 0\.5 s, the last try: HTTP 429.*run the command again"),
        ):
            list(asks.ask_all([question(str(number)) for number in range(20)]))
        assert len(server.requests) <= 12
    with openai_server(lambda *_: Reply(body=b"<html>")) as server, client(server.url, tmp_path) as asks:
        with pytest.raises(EndpointError, match="does not speak OpenAI's protocol"):
            asks.ask(question())
    with openai_server(lambda *_: Reply(code=404, body=b'{"error": {"message": "no model m"}}')) as server:
        with client(server.url, tmp_path) as asks, pytest.raises(EndpointError, match="HTTP 404 no model m"):
            asks.ask(question())
    with (
        client("http://127.0.0.1:9/v1", tmp_path, patience=0.2) as asks,
        pytest.raises(EndpointError, match="Is it up"),
    ):
        asks.ask(question())


def test_an_error_with_code_200_is_what_it_says(tmp_path: Path) -> None:
    """As gateways answer, which are busy more often in a row than an address that is none is asked."""
    busy = Reply(body=b'{"error": {"code": 429, "message": "slow down"}}', headers={"Retry-After": "0"})
    with openai_server(lambda _, number: busy if number < 6 else Reply(GOOD)) as server:
        with client(server.url, tmp_path, patience=600.0) as asks:
            asks._wait = lambda _: 0.0  # type: ignore[method-assign]
            assert asks.ask(question()).state == "answered"
    with openai_server(lambda *_: Reply(body=b'{"error": {"code": 401, "message": "no such key"}}')) as server:
        with client(server.url, tmp_path) as asks, pytest.raises(EndpointError, match="HTTP 401 no such key"):
            asks.ask(question("another"))
    moved = Reply(code=301, headers={"Location": "https://node/v1/chat/completions"})
    with openai_server(lambda *_: moved) as server, client(server.url, tmp_path) as asks:
        with pytest.raises(EndpointError, match="HTTP 301 it has moved to https://node/v1/chat/completions"):
            asks.ask(question("another"))


def test_the_key_is_sent_and_never_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="MY_KEY, which is not set"):
        client("http://127.0.0.1:9/v1", tmp_path, key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with openai_server(lambda *_: Reply(code=401, body=b"{}")) as server:
        with client(server.url, tmp_path, key_variable="MY_KEY") as asks:
            with pytest.raises(EndpointError, match="the key in MY_KEY") as error:
                asks.ask(question())
        assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
        assert "very-secret" not in str(error.value) + repr(asks.config)
    for odd in ("sk-a\nb", "sk\u2013abc"):
        monkeypatch.setenv("MY_KEY", odd)
        with pytest.raises(DataError, match="what is in MY_KEY is no key"):
            client("http://127.0.0.1:9/v1", tmp_path, key_variable="MY_KEY")
    with pytest.raises(ValueError, match="has a secret in it"):
        EndpointConfig(url="http://me:pass@host/v1", model="m")


def test_an_address_is_asked_or_refused() -> None:
    for url in ("http://h/v1?api-version=1", "http://h/v1#a", "http://h:99999/v1", "http://h:x/v1", "http://ho st/v1",
                "http:///v1", "http://h\\v1"):  # fmt: skip
        with pytest.raises(ValueError, match=r"should be a machine|[Pp]ort"):
            EndpointConfig(url=url, model="m")
    for url in ("http://h:8000/v1", "http://[::1]:8000/v1/", "https://h/a%20b/v1/chat/completions"):
        assert EndpointConfig(url=url, model="m").url == url.removesuffix("/chat/completions").rstrip("/")


def test_the_cost_limit_is_never_passed_and_outlives_a_stop(tmp_path: Path) -> None:
    prices = {"price_in": 1000.0, "price_out": 1000.0, "answer_tokens": 10}  # each answer costs 0.11
    with openai_server(lambda *_: Reply(GOOD)) as server:
        for _ in range(2):
            with client(server.url, tmp_path, most_cost=1.0, **prices) as asks, pytest.raises(CostLimitError):
                list(asks.ask_all([question(str(number)) for number in range(40)]))
        spent = 0.11 * len(server.requests)
        assert 0.5 < spent <= 1.0
        with client(server.url, tmp_path, most_cost=5.0, **prices) as asks:
            assert asks.answers.spent == pytest.approx(spent)
            list(asks.ask_all([question(str(number)) for number in range(20)]))
        assert len(server.requests) == 20  # none of before is asked again


def test_answers_whose_tokens_are_not_said_are_paid_for(tmp_path: Path) -> None:
    text = json.dumps({"score": 3, "why": "so " * 1000})
    body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    with openai_server(lambda *_: Reply(body=body)) as server:
        with client(server.url, tmp_path, price_out=1e6, most_cost=4500.0) as asks, pytest.raises(CostLimitError):
            list(asks.ask_all([question(str(number)) for number in range(9)]))
        assert 1 <= len(server.requests) <= 4 and asks.answers.spent >= 1000 * len(server.requests)


def test_rates_are_kept() -> None:
    now = [0.0]
    config = EndpointConfig(url="http://x/v1", model="m", requests_per_minute=60, tokens_per_minute=600)
    limits = Limits(config, 0.0, lambda: now[0])
    assert [limits.wait_time(5) for _ in range(4)] == [0.0, 1.0, 2.0, 3.0]
    now[0] = 100.0
    assert [round(limits.wait_time(20), 6) for _ in range(3)] == [0.0, 2.0, 4.0]


def test_a_line_that_a_kill_cut_is_passed_over(tmp_path: Path) -> None:
    with openai_server(lambda *_: Reply(GOOD)) as server:
        with client(server.url, tmp_path) as asks:
            asks.ask(question("a"))
            asks.ask(question("b"))
        (path,) = tmp_path.glob("*.jsonl")
        path.write_bytes(path.read_bytes()[:-20])
        with client(server.url, tmp_path) as asks:
            assert asks.ask(question("a")).cached and not asks.ask(question("b")).cached
            assert asks.ask(question("b")).cached


def test_threads_share_at_once(tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def answer(*_: Any) -> Reply:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.05)
        with lock:
            now[0] -= 1
        return Reply(GOOD)

    with openai_server(answer) as server, client(server.url, tmp_path, at_once=3) as asks:
        list(asks.ask_all([question(str(number)) for number in range(12)]))
    assert most[0] == 3


@given(st.integers(-9, 9), st.text(max_size=40), st.sampled_from(["{}", "```json\n{}\n```", "<think>{{}}</think>\n{}"]))
def test_a_value_survives_being_written_and_parsed(score: int, why: str, around: str) -> None:
    text = around.replace("{{}}", "hm {").replace("{}", json.dumps({"score": score, "why": why}))
    if 1 <= score <= 5:
        assert parse_answer(text, Score) == Score(score=score, why=why)
    else:
        with pytest.raises(BadAnswer):
            parse_answer(text, Score)


@given(st.text() | st.sampled_from(["[" * 100_000, GOOD * 2, '{"score": 3, "score": 4, "why": ""}', '{"score": NaN}']))
def test_any_text_is_a_value_or_a_bad_answer(text: str) -> None:
    with pytest.raises(BadAnswer):
        parse_answer(text, Score)


@pytest.mark.parametrize(
    "text", ['{"score": "3", "why": ""}', '{"score": 3.0, "why": ""}', f"Here: {GOOD}", "3", "null"]
)
def test_nothing_is_guessed(text: str) -> None:
    with pytest.raises(BadAnswer):
        parse_answer(text, Score)


def test_answers_that_gave_nothing_can_be_asked_for_again_and_stay_paid(tmp_path: Path) -> None:
    texts = {"good": GOOD, "bad": "no JSON", "no": "I'm sorry, I can't."}
    prices = {"answers": 1, "price_in": 1.0, "price_out": 1.0}

    def answer(body: dict[str, Any], _: int) -> Reply:
        return Reply(texts[body["messages"][1]["content"][-1]["text"]])

    with openai_server(answer) as server:
        with client(server.url, tmp_path, **prices) as asks:
            assert [asks.ask(question(text)).state for text in texts] == ["answered", "bad_answer", "refused"]
            spent = asks.answers.spent
        assert Answers(tmp_path).forget(["bad_answer", "refused"]) == 2
        texts |= {"bad": GOOD, "no": GOOD}
        for again in (True, False):
            with client(server.url, tmp_path, **prices) as asks:  # each reads the files anew
                assert [asks.ask(question(text)).state for text in texts] == ["answered"] * 3
                assert len(server.requests) == 5 and asks.answers.spent == pytest.approx(spent * 5 / 3), again
        assert Answers(tmp_path).forget(["bad_answer", "refused"]) == 0
