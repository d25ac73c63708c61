"""Judges against a server on loopback: grades, expectations, repeats, and answers that are none."""

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metric_inputs import clip, work
from openai_server import Reply, openai_server

from domainshuttle.pipelines.endpoints.client import EndpointError
from domainshuttle.platform.evaluation.judges.digits import expected_grade
from domainshuttle.platform.evaluation.judges.judge import CDScore
from domainshuttle.platform.evaluation.judges.prompts import QUESTIONS, Prompt
from domainshuttle.platform.evaluation.metrics.config import MetricsConfig
from domainshuttle.platform.evaluation.metrics.metric import MetricCase, Models, Reference, Score, Work


def judges(url: str, folder: Path, endpoint: dict[str, Any] | None = None, **choices: Any) -> list[Any]:
    """The metrics of one judge."""
    settings = {"url": url, "model": "judge-2025-01-01", "patience": 0.3, **(endpoint or {})}
    config = MetricsConfig.model_validate({"cd_score": {"endpoint": settings, "frames": 4, **choices}})
    return config.build(Models(folder=folder))


def one_case(seed: int = 0, references: int = 2) -> Work:
    pictures = [Reference(clip(seed + n)[0], "dog", n, domain="Fantasy") for n in range(references)]
    case = MetricCase(f"case{seed}", "a dog of clay", tuple(pictures), "mixed")
    return Work(case, work(clip(seed, frames=9)).video)


def grade(score: int) -> Reply:
    return Reply(json.dumps({"score": score}))


def test_a_score_is_the_mean_over_references_frames_and_repeats(tmp_path: Path) -> None:
    given = []

    def answer(request: dict[str, Any], number: int) -> Reply:
        given.append(1 + number % 5)
        return grade(given[-1])

    with openai_server(answer) as server:
        (metric,) = judges(server.url, tmp_path, questions=["cross_domain"], repeats=2)
        found = metric.score(one_case())
        assert len(server.requests) == 2 * 4 * 2
        first = server.requests[0]
        content = first["messages"][1]["content"]
        assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
        assert "a dog of clay" in content[2]["text"] and "Fantasy" in content[2]["text"]
        schema = first["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["properties"]["score"]["enum"] == [1, 2, 3, 4, 5]
        again = judges(server.url, tmp_path, questions=["cross_domain"], repeats=2)[0].score(one_case())
        assert len(server.requests) == 2 * 4 * 2  # every answer is kept
    assert found.beside["raw"] == pytest.approx(np.mean(given))
    assert found.value == pytest.approx((np.mean(given) - 1) / 4) and again.value == found.value
    rows = found.details["asked"]
    assert {(row["reference"], row["frame"], row["repeat"]) for row in rows} == {
        (reference, frame, repeat) for reference in (0, 1) for frame in (0, 2, 5, 8) for repeat in (0, 1)
    }
    assert all(json.loads(row["raw"]) == {"score": row["said"]} for row in rows)
    fifth = judges("http://127.0.0.1:9/v1", tmp_path, questions=["cross_domain"], normalise="fifth")[0]
    assert fifth.digest != metric.digest


def logprobs(said: int, shares: dict[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(share)} for token, share in shares.items()]
    tokens = [{"token": part, "logprob": 0.0, "top_logprobs": []} for part in ('{"', "score", '":')]
    digit = {"token": f" {said}", "logprob": math.log(shares[f" {said}"]), "top_logprobs": top}
    return {"content": [*tokens, digit, {"token": "}", "logprob": 0.0, "top_logprobs": []}]}


def test_a_grade_is_the_expectation_where_there_are_logprobs(tmp_path: Path) -> None:
    said = {"content": '{"score": 4}', "logprobs": logprobs(4, {" 4": 0.6, " 5": 0.2, " 3": 0.1, " the": 0.1})}
    expected = (0.6 * 4 + 0.2 * 5 + 0.1 * 3) / 0.9
    assert expected_grade(said["content"], said["logprobs"]) == pytest.approx(expected)

    def answer(request: dict[str, Any], number: int) -> Reply:
        assert request["logprobs"] and request["top_logprobs"] >= 5
        choice = {"message": {"content": said["content"]}, "finish_reason": "stop", "logprobs": said["logprobs"]}
        return Reply(body=json.dumps({"choices": [choice], "usage": {}}).encode())

    with openai_server(answer) as server:
        (metric,) = judges(server.url, tmp_path, {"logprobs": True}, questions=["cross_domain"])
        assert metric.score(one_case()).beside["raw"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "given",
    [
        None, {}, {"content": None}, {"content": [{"token": '{"score": 4}', "logprob": 0.0}]},
        {"content": [{"logprob": 0.0}]}, {"content": [{"token": '{"score": ', "logprob": 0}, {"token": "44"}]},
        {"content": "text"}, {"content": [{"token": '{"score": '}, {"token": "2", "logprob": 0.0}]},
        {"content": [{"token": '{"score": '}, {"token": "4", "logprob": 1e6}]},
    ],
)  # fmt: skip
def test_without_logprobs_of_the_digit_the_digit_stands(given: Any) -> None:
    assert expected_grade('{"score": 4}', given) is None


def test_a_refusal_an_unparsable_answer_and_a_low_grade_are_three_states(tmp_path: Path) -> None:
    def answer(request: dict[str, Any], number: int) -> Reply:
        kind = request["messages"][1]["content"][2]["text"]
        if "belongs to" in kind:
            return Reply(refusal="I can't help with that.", text="")
        return Reply("4 out of 5, I think") if "same dog" in kind else grade(1)

    with openai_server(answer) as server:
        metrics = judges(server.url, tmp_path, {"answers": 2})
        low, refused, unparsable = (metric.score(one_case()) for metric in metrics)
    assert [metric.label for metric in metrics] == [
        "cd_score", "cd_score.domain_reached", "cd_score.subject_kept",
    ]  # fmt: skip
    assert (low.state, low.value) == ("measured", 0)
    assert (refused.state, refused.value) == ("refused", None)
    assert (unparsable.state, unparsable.value) == ("failed", None)
    assert unparsable.details["asked"][0]["raw"] == "4 out of 5, I think"
    assert not metrics[0].void([low]) and "8 of 8" in metrics[1].void([refused])


def test_too_many_answers_that_are_none_void_a_metric(tmp_path: Path) -> None:
    with openai_server(lambda _, number: Reply("no") if number == 3 else grade(5)) as server:
        (metric,) = judges(server.url, tmp_path, {"answers": 1, "at_once": 1}, questions=["cross_domain"])
        found = metric.score(one_case())
    assert found.state == "measured" and found.value == 1 and found.beside["answered"] == 7 / 8
    assert "1 of 8" in metric.void([found])
    other = Score.from_dict({**found.to_dict(), "details": {"answers": {"answered": 92}}})
    assert metric.void([found, other]) == ""  # 1 of 100


def test_an_endpoint_that_is_away_says_nothing_of_the_case(tmp_path: Path) -> None:
    (metric,) = judges("http://127.0.0.1:9/v1", tmp_path, questions=["cross_domain"])
    with pytest.raises(EndpointError):
        metric.score(one_case())


def test_an_endpoint_is_kept_busy_over_several_cases(tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def answer(request: dict[str, Any], number: int) -> Reply:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        return grade(3)

    with openai_server(answer) as server:
        (metric,) = judges(server.url, tmp_path, {"at_once": 12}, questions=["cross_domain"], frames=2)
        works = [one_case(seed, 1) for seed in range(0, 60, 10)]
        found = list(metric.score_all(works))
    assert [score.value for score in found] == [0.5] * 6
    assert 2 < most[0] <= 12  # one case alone has two questions


def test_what_a_judge_is_asked_is_part_of_the_digest(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    (metric,) = judges(url, tmp_path, questions=["cross_domain"])
    same = judges("http://elsewhere/v1", tmp_path, {"at_once": 3}, questions=["cross_domain"], most_failed=0.5)[0]
    assert metric.digest == same.digest
    others: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"model": "b"}, {}), ({"temperature": 0.5}, {}), ({}, {"repeats": 2}), ({}, {"frames": 5}),
    ]  # fmt: skip
    for endpoint, choices in others:
        assert judges(url, tmp_path, endpoint, questions=["cross_domain"], **choices)[0].digest != metric.digest
    prompts = [QUESTIONS["cross_domain"], *(Prompt("cross_domain", version, "a", "b") for version in (1, 2))]
    assert len({prompt.digest for prompt in prompts}) == 3
    assert not CDScore.applies(metric, MetricCase("a", "", split="in_domain"))
