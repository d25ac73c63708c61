"""Pairs against a server on loopback: both orders, ties where the order decides, nothing asked twice."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metric_inputs import clip
from openai_server import Reply, openai_server
from PIL import Image
from scipy.stats import binomtest

from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.platform.evaluation.cases import EvaluationCase, ReferencePicture
from domainshuttle.platform.evaluation.judges.pairs import PairJudge, summed
from domainshuttle.platform.evaluation.metrics.choices import PairChoices
from domainshuttle.platform.evaluation.metrics.metric import Score
from domainshuttle.platform.evaluation.videos import Clip, Column

COLUMNS = [Column("dark", "", False), Column("light", "", False), Column("dark~none", "", True, "none", "dark")]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[EvaluationCase], list[Clip]]:
    """Six cases with a dark and a light video each, the last of them in-domain."""
    folder, found, clips = tmp_path_factory.mktemp("pairs"), [], []
    for number in range(6):
        picture = folder / f"{number}.png"
        Image.fromarray(clip(number)[0]).save(picture)
        sha256 = hashlib.sha256(picture.read_bytes()).hexdigest()
        split = "in_domain" if number == 5 else "mixed"
        found.append(EvaluationCase(f"c{number}", split, "a", (ReferencePicture(picture, sha256, 0, "cup", 1),)))
        for column, level in (("dark", 60), ("light", 180)):
            path = folder / f"{column}{number}.mp4"
            shown = np.arange(level + number, level + number + 50, 10, np.uint8)  # no two frames are the same question
            path.write_bytes(encode_mp4(np.broadcast_to(shown[:, None, None, None], (5, 32, 32, 3)).copy(), 8))
            clips.append(Clip(column, f"c{number}", 0, path, hashlib.sha256(path.read_bytes()).hexdigest(), "", {}))
    return found, clips


def levels(request: dict[str, Any]) -> list[float]:
    """The mean level of each picture that a judge is shown."""
    parts = [one["image_url"]["url"].split(",")[1] for one in request["messages"][1]["content"][:-1]]
    return [float(np.asarray(Image.open(io.BytesIO(base64.b64decode(part))).convert("L")).mean()) for part in parts]


def judge(url: str, folder: Path, **choices: Any) -> PairJudge:
    endpoint = {"url": url, "model": "judge", "patience": 30, "answers": 1}
    return PairJudge(PairChoices.model_validate({"endpoint": endpoint, "frames": 2, **choices}), folder)


def test_the_better_one_wins_in_both_orders_and_nothing_is_asked_twice(cases: Any, tmp_path: Path) -> None:
    found, clips = cases

    def lightest(request: dict[str, Any], number: int) -> Reply:
        _, first, second = levels(request)
        return Reply(json.dumps({"better": "first" if first > second else "second"}))

    with openai_server(lightest) as server:
        pairs = judge(server.url, tmp_path)
        assert pairs.measure(found, COLUMNS, clips) == 5
        assert len(server.requests) == 5 * 2 * 2  # cases, frames, orders
        assert pairs.measure(found, COLUMNS, clips) == 0
        again = judge(server.url, tmp_path)
        assert again.measure(found, COLUMNS, clips) == 0 and len(server.requests) == 20
        assert judge(server.url, tmp_path, cases="all").measure(found, COLUMNS, clips) == 1
    (result,) = again.results(found, COLUMNS, clips)
    assert (result.left, result.right, result.cases) == ("dark", "light", 5)
    assert (result.wins, result.losses, result.ties, result.preference) == (0, 5, 0, -1)
    assert result.order_dependent == 0 and result.p == pytest.approx(binomtest(0, 5).pvalue)


def test_a_verdict_that_depends_on_the_order_is_a_tie(cases: Any, tmp_path: Path) -> None:
    found, clips = cases
    with openai_server(lambda *_: Reply('{"better": "first"}')) as server:
        pairs = judge(server.url, tmp_path)
        pairs.measure(found, COLUMNS, clips)
    (result,) = pairs.results(found, COLUMNS, clips)
    assert (result.wins, result.losses, result.ties) == (0, 0, 5)
    assert (result.order_dependent, result.preference, result.p) == (1, 0, 1)


def test_no_answer_in_one_order_is_no_verdict(cases: Any, tmp_path: Path) -> None:
    found, clips = cases

    def refuses_light_first(request: dict[str, Any], number: int) -> Reply:
        _, first, second = levels(request)
        return Reply(refusal="no") if first > second else Reply('{"better": "neither"}')

    with openai_server(refuses_light_first) as server:
        pairs = judge(server.url, tmp_path)
        pairs.measure(found, COLUMNS, clips)
    (result,) = pairs.results(found, COLUMNS, clips)
    assert (result.cases, result.missing, result.wins) == (0, 5, 0)


def test_cases_are_counted_by_the_side_of_their_preference() -> None:
    scores = [Score("measured", value, beside={"order_dependent": 0.5}) for value in (0.25, 1, -0.5, 0)]
    result = summed("a", "b", [*scores, Score("failed", reason="why")], 7)
    assert (result.wins, result.losses, result.ties, result.cases, result.missing) == (2, 1, 1, 4, 3)
    assert result.preference == pytest.approx(0.1875) and result.order_dependent == 0.5
    assert result.p == pytest.approx(binomtest(2, 3, 0.5).pvalue)
