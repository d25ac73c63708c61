"""The report and the rating page as a browser shows them, and what people's answers say.

Run: pytest tests/platform/evaluation/test_report.py
"""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image
from running import in_process

from domainshuttle.pipelines.media.decode import encode_mp4
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import console
from domainshuttle.platform.evaluation.choices import choices_of
from domainshuttle.platform.evaluation.config import EvaluationConfig
from domainshuttle.platform.evaluation.evaluate import read_results, run_evaluation
from domainshuttle.platform.evaluation.evidence import edited_pictures, found_subjects
from domainshuttle.platform.evaluation.identity import IdentityResult
from domainshuttle.platform.evaluation.metrics.metric import Score
from domainshuttle.platform.evaluation.metrics.subjects import outline_of
from domainshuttle.platform.evaluation.published import published
from domainshuttle.platform.evaluation.rating import agreement, make_pages, of_now, read_answers
from domainshuttle.platform.evaluation.report import open_points
from domainshuttle.platform.evaluation.tracking import log_results, logged_values
from domainshuttle.platform.evaluation.videos import Clip

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def out(cases_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two systems: one shows the colour of the reference, the other noise."""
    top = tmp_path_factory.mktemp("report")
    colours, noise = top / "colours", top / "noise"
    for folder in (colours, noise):
        folder.mkdir()
    for number in range(6):
        picture = np.asarray(Image.open(cases_file.parent / f"{number}.png"))
        plain = np.repeat(np.resize(picture, (32, 32, 3))[None], 6, axis=0)
        (colours / f"case-{number}.mp4").write_bytes(encode_mp4(plain, 8))
        if number != 5:
            other = np.random.default_rng(number).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
            (noise / f"case-{number}.mp4").write_bytes(encode_mp4(other, 8))
    config = EvaluationConfig.model_validate(
        {
            "name": "two", "sources": {"own": {"kind": "cases", "path": str(cases_file)}},
            "metrics": {"hue_identity": {}, "steadiness": {}, "variants": {"one": {"hue_identity": {"frames": 1}}}},
            "statistics": {"resamples": 300},
        }
    )  # fmt: skip
    run_evaluation([str(colours), str(noise)], config, top / "out")
    return top / "out"


def browsed(page: Path, *arguments: str) -> str:
    """What chromium makes of a page from disk, after its scripts ran."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", *arguments]
    run = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return run.stdout


class Media(HTMLParser):
    """The files that a page names, and how its videos are loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.files: list[str] = []
        self.details: list[str] = []
        self.preload: set[str | None] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.files += [str(given[name]) for name in ("src", "data-poster") if given.get(name)]
        self.details += [str(given["data-details"])] if given.get("data-details") else []
        if tag == "video":
            self.preload.add(given.get("preload"))


def test_how_clips_were_made_is_said_where_they_were_made_here(out: Path) -> None:
    results = read_results(out)
    brought = dict(open_points(results))
    assert "Guidance by expert" not in brought and "Rate and compression" not in brought
    of_ours: Any = SimpleNamespace(config=results.config, columns=[replace(results.columns[0], generated=True)])
    made = dict(open_points(of_ours))
    assert made.items() > brought.items()
    assert made["Guidance by expert"].startswith("one value for both experts")
    assert made["Seeds and clips a case"].startswith("run seed 0, 1 clip a case")


def test_the_report_needs_only_what_lies_beside_it(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "report", tmp_path / "moved")
    text = (tmp_path / "moved/index.html").read_text()
    media = Media(text)
    assert len(media.files) == 6 + 2 * 11 and media.preload == {"none"}
    assert len(media.details) == 6
    for name in [*media.files, *media.details]:
        assert not re.match(r"[a-z]+:|/", name)
        assert (tmp_path / "moved" / name).stat().st_size > 0
    assert not re.search(r"""(?:src|href)=["']?https?:""", text)
    assert "no difference shown" in text and "there is no video" in text  # five pairs can show none at 95%
    assert "cases without a value as the least" in text


def test_numbers_beside_a_value_are_of_the_cases_of_their_table(out: Path) -> None:
    results, text = read_results(out), (out / "report/index.html").read_text()
    found = {}
    for stratum in results.strata:
        cells = [results.cell("noise", "steadiness", case.id) for case in results.cases_of("steadiness", stratum)]
        steps = [score.beside["first_to_last"] for cell in cells if cell for score in cell.scores if score.beside]
        found[stratum] = results.beside("noise", "steadiness", stratum)["first_to_last"]
        assert found[stratum] == pytest.approx(np.mean(steps))
        assert f"first to last {found[stratum]:.3f}" in text
    assert len({*found.values()}) == len(found) > 1


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_sorts_and_has_no_errors(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "report", tmp_path / "report")
    page = tmp_path / "report/index.html"
    probe = """
<script>
window.addEventListener("error", event => document.title = "ERROR " + event.message);
window.addEventListener("load", () => {
  const choose = (id, value) => { const one = document.getElementById(id); one.value = value; one.dispatchEvent(new Event("change")); };
  choose("sort", "Hue identity"); choose("left", "colours"); choose("right", "noise");
  const order = [...document.querySelectorAll(".case")].map(one => one.id).join(" ");
  choose("split", "in domain");
  document.querySelector("#case-case-0 [data-details]").open = true;
  const shown = [...document.querySelectorAll(".case")].filter(one => !one.hidden).length;
  document.body.dataset.probe = JSON.stringify({ order, shown, marks: document.querySelectorAll("svg circle").length });
});
</script>"""  # noqa: E501
    page.write_text(page.read_text().replace("<body>", f"<body>{probe}"))
    dom = browsed(page, "--dump-dom", "--window-size=1400,5000")
    assert "<title>ERROR" not in dom
    found = json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace("&quot;", '"'))  # type: ignore[index]
    results = read_results(out)
    values = [results.values(name, "hue_identity") for name in ("colours", "noise")]
    order = sorted(range(5), key=lambda n: values[0][n] - values[1][n])
    assert found["order"].split() == [f"case-case-{n}" for n in [*order, 5]]  # a case without a difference is last
    assert found["shown"] == 3 and 'poster="posters/colours/' in dom  # those that are looked at
    assert found["marks"] == 3 * 3 * 2  # strata, metrics, columns
    shown = re.findall(r"<pre>Hue identity, (?:colours|noise): (.*?)</pre>", dom)
    rows = [results.cell(name, "hue_identity", "case-0").scores[0] for name in ("colours", "noise")]  # type: ignore[union-attr]
    assert [json.loads(one) for one in shown] == [row.details for row in rows]  # loaded from beside the page
    browsed(page, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1400,3000")
    picture = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    colours = picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    assert colours.shape == (3000, 1400) and len(np.unique(colours)) > 50


def test_figures_of_several_models_have_their_names_in_mlflow(out: Path) -> None:
    """Else those of a baseline would stand as the run's."""
    results = read_results(out)
    identities = {name: IdentityResult(4, 2, own, 0.5, float("nan"), 0.5, {})
                  for name, own in (("colours", 1.0), ("noise", 0.25))}  # fmt: skip
    values = logged_values(results, identities)
    assert values["evaluation/identity_own/colours"] == 1.0 and values["evaluation/identity_own/noise"] == 0.25
    assert values["evaluation/steadiness/colours"] == results.estimates["all", "steadiness", "colours"].mean
    assert not [name for name in values if name.startswith("evaluation/identity_target")]
    new = SimpleNamespace(read_ids=lambda: None, config=SimpleNamespace(name="new"))
    with console.capture() as printed:
        log_results(new, out, results, {}, [])  # type: ignore[arg-type]
    assert "Nothing is logged: the run new has not begun" in printed.get()
    results.columns = results.columns[:1]
    assert logged_values(results, {"colours": identities["colours"]})["evaluation/identity_own"] == 1.0


def test_which_choice_changes_the_winner_is_said(out: Path) -> None:
    choices = {(one.metric, one.choice.split(":")[0]): one for one in choices_of(read_results(out))}
    assert choices["Hue identity", "as in the table"].winner == "colours"
    assert not choices["Hue identity", "one"].changes and choices["Hue identity", "one"].tau == 1
    assert "frames 1" in next(one.choice for one in choices_of(read_results(out)) if one.choice.startswith("one"))
    assert ("Steadiness", "cases without a value as the least") in choices


def test_the_rating_page_is_blind_and_its_answers_come_back(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    page = make_pages(tmp_path / "out", read_results(tmp_path / "out"))
    everything = page.read_text() + " ".join(str(path) for path in page.parent.rglob("*"))
    assert "colours" not in everything.replace("colours,", "") and "noise" not in everything
    key = json.loads((tmp_path / "out/rating-key.json").read_text())
    assert len(key) == 5 and {one["left"] for one in key} == {"colours", "noise"}  # not always on one side
    lines = []
    for rater, wrong in (("ann", set()), ("bob", {0}), ("cy", {0, 1})):
        for number, one in enumerate(key):
            side = "left" if (one["left"] == "colours") != (number in wrong) else "right"
            lines.append(json.dumps({"rater": rater, "pair": one["id"], "question": "subject", "answer": side}))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    printed = in_process("evaluate", "rate", tmp_path / "out", "--answers", tmp_path / "answers.jsonl")
    assert "Agreement of 3 people" in printed
    ratings = read_answers(tmp_path / "out")
    assert len(ratings) == 15 and np.mean([one.value for one in ratings]) == pytest.approx((12 - 3) / 15)
    found = {one.metric: one for one in agreement(ratings, read_results(tmp_path / "out"))}
    # two of three people say of one pair what the metric does not
    assert found["Hue identity"].agree == pytest.approx(4 / 5) and found["Hue identity"].pairs == 5
    assert 0 < found[""].alpha < 1
    assert "People: 3" in (tmp_path / "out/report/index.html").read_text()
    (tmp_path / "bad.jsonl").write_text('{"rater": "x", "pair": "none", "question": "subject", "answer": "left"}')
    with pytest.raises(ConfigError, match="they are of no page"):
        read_answers(tmp_path / "out", [tmp_path / "bad.jsonl"])


def test_answers_hold_for_the_clips_that_were_seen(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    make_pages(folder, read_results(folder))
    key = json.loads((folder / "rating-key.json").read_text())
    lines = [{"rater": "ann", "pair": one["id"], "question": "subject", "answer": "left"} for one in key]
    (tmp_path / "ann.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [lines[0], *lines]))
    ratings = read_answers(folder, [tmp_path / "ann.jsonl"])
    assert len(ratings) == 5 == len(of_now(ratings, read_results(folder)))
    # a page of fewer pairs, or of others, does not make the answers to the one before worthless
    make_pages(folder, read_results(folder), pairs_per_rater=1, seed=3)
    assert len(read_answers(folder, [tmp_path / "ann.jsonl"])) == 5
    assert "Report:" in in_process("evaluate", "report", folder)
    # a clip that was made anew: what was said of the one before says nothing of it
    columns = json.loads((folder / "columns.json").read_text())
    columns[0]["path"] = str(shutil.copytree(columns[0]["path"], tmp_path / "colours"))
    (folder / "columns.json").write_text(json.dumps(columns))
    (tmp_path / "colours/case-0.mp4").write_bytes(encode_mp4(np.zeros((6, 32, 32, 3), np.uint8), 8))
    assert [one.case for one in ratings if one not in of_now(ratings, read_results(folder))] == ["case-0"]
    printed = in_process("evaluate", "rate", folder, "--answers", tmp_path / "ann.jsonl")
    assert "Left out: 1 answer to clips that were replaced since" in printed and "Agreement of 1 person" in printed
    assert "the clips that they saw were replaced: 1" in (folder / "report/index.html").read_text()
    (tmp_path / "half.jsonl").write_text(json.dumps(lines[0])[:-9])
    with pytest.raises(ConfigError, match=r"half\.jsonl, line 1: expected rater"):
        read_answers(folder, [tmp_path / "half.jsonl"])
    (folder / "rating-key.json").unlink()
    with pytest.raises(ConfigError, match="make the page again"):
        read_answers(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_rating_page_writes_the_lines_that_are_read(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    page = make_pages(tmp_path / "out", read_results(tmp_path / "out"), pairs_per_rater=2)
    probe = """<script>window.addEventListener("load", () => {
  document.getElementById("rater").value = "ann";
  for (const name of ["subject", "prompt", "quality"]) document.querySelector(`[data-question=${name}] [data-answer=left]`).click();
  document.getElementById("next").click();
  document.querySelector("[data-question=quality] [data-answer=same]").click();
  window.confirm = () => true;  // another person at the same browser
  document.getElementById("rater").value = "bob";
  document.getElementById("rater").dispatchEvent(new Event("change"));
  document.body.dataset.others = `${document.querySelectorAll(".chosen").length} ${lines().length}`;
  document.getElementById("rater").value = "ann";
  document.body.dataset.lines = lines();
});</script>"""  # noqa: E501
    page.write_text(page.read_text().replace("<body>", f"<body>{probe}"))
    dom = browsed(page, "--dump-dom")
    assert 'data-others="0 0"' in dom
    text = re.search(r'data-lines="([^"]*)"', dom)[1].replace("&quot;", '"')  # type: ignore[index]
    (tmp_path / "answers.jsonl").write_text(text)
    ratings = read_answers(tmp_path / "out", [tmp_path / "answers.jsonl"])
    assert len(ratings) == 4 and {one.rater for one in ratings} == {"ann"}
    assert sorted(one.value for one in ratings if one.question != "quality") != [0, 0]


def test_edits_and_boxes_are_shown_as_the_metrics_saw_them(tmp_path: Path) -> None:
    clip = np.zeros((9, 40, 60, 3), np.uint8)
    path = tmp_path / "case.mp4"
    path.write_bytes(encode_mp4(clip, 8))
    one = Clip("model", "case", 0, path, hashlib.sha256(path.read_bytes()).hexdigest(), "", {})
    boxes = [[10.0, 5.0, 30.0, 25.0], None, [10.0, 5.0, 30.0, 25.0]]
    score = Score("measured", 0.5, details={"subjects": [{"subject": 0, "word": "dog", "boxes": boxes}]})
    picture = np.asarray(Image.open(tmp_path / "report" / found_subjects(tmp_path / "report", one, score)))
    assert picture.shape == (40, 3 * 60, 3)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 100)
    assert red[:, :60].any() and not red[:, 60:120].any() and red[:, 120:].any()  # the second frame has no box
    rows, columns = np.nonzero(red[:, :60])
    assert abs(columns.max() - 30) <= 3 and abs(rows.max() - 25) <= 3
    assert found_subjects(tmp_path / "report", one, Score("measured", 0.5)) == ""
    # with masks their outlines are drawn: a disc's edge, and neither its inside nor its box
    rows, columns = np.mgrid[:40, :60]
    disc = (rows - 15) ** 2 + (columns - 20) ** 2 <= 10**2
    subject = {"subject": 0, "word": "dog", "boxes": boxes, "outlines": {"0": outline_of(disc)}}
    score = Score("measured", 0.5, details={"subjects": [subject]})
    picture = np.asarray(Image.open(tmp_path / "report" / found_subjects(tmp_path / "report", one, score)))
    red = (picture[:, :60, 0] > 150) & (picture[:, :60, 1] < 100)
    distance = np.hypot(*np.nonzero(red) - np.array([[15], [20]]))
    assert red.sum() > 40 and distance.min() > 6 and distance.max() < 12.5
    (tmp_path / "edits/abc").mkdir(parents=True)
    Image.fromarray(clip[0]).save(tmp_path / "edits/abc/picture.png")
    edits = [{"digest": "abc", "state": "edited"}, {"digest": "def", "state": "refused"}, None]
    scores = [Score("measured", 0.5, details={"edits": edits})] * 2
    assert edited_pictures(tmp_path, tmp_path / "report", scores) == ["edits/abc.png"]
    assert (tmp_path / "report/edits/abc.png").is_file()


def test_the_papers_table_is_that_of_the_paper() -> None:
    table = published()
    assert table["DomainShuttle, Wan2.2"]["cd_score"] == 0.861 and table["Kling 1.6"]["dino_i"] == 0.401
    assert table["FFGO-Wan2.2"]["aes"] == 0.410 and table["VACE-Wan2.2"]["ms"] == 0.974 and len(table) == 11
    assert table["VACE-Wan2.1"]["qwen_score"] == 0.769 and table["SkyReels-V3"]["qwen_clip"] == 0.616


def test_a_text_of_others_is_text(make_model: Callable[..., Path], cases_file: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in cases_file.read_text().splitlines()[:2]]
    lines[0]["prompts"] = "</p><script>document.title='ERROR'</script>"
    for one in lines:
        name = f"{one['id']} é.png?x=%20#1"
        shutil.copy(cases_file.parent / one["seg_meta"][0]["seg_file"][0], tmp_path / name)
        one |= {"seg_meta": [{"seg_file": [name]}], "edit_prompts": ["turn it into clay, " * 30]}
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    videos = tmp_path / "theirs"
    videos.mkdir()
    for number in range(2):
        (videos / f"case-{number}.mp4").write_bytes(encode_mp4(np.zeros((3, 16, 16, 3), np.uint8), 8))
    source = {"own": {"kind": "cases", "path": str(tmp_path / "cases.jsonl")}}
    config = EvaluationConfig.model_validate({"name": "x", "sources": source, "metrics": {"steadiness": {}}})
    run_evaluation([str(videos)], config, tmp_path / "out")
    page = tmp_path / "out/report/index.html"
    assert "<script>document.title" not in page.read_text()
    for name in Media(page.read_text()).files:
        assert (page.parent / unquote(urlsplit(name).path)).is_file()
    shutil.copytree(videos, tmp_path / "others")
    (tmp_path / "others/case-1.mp4").write_bytes(b"damaged")
    results = run_evaluation([str(tmp_path / "others")], config, tmp_path / "out")
    rating = make_pages(tmp_path / "out", results)  # nobody is asked about a clip that can't be shown
    (pair,) = json.loads(re.search(r"const pairs = (\[.*?\]), questions", rating.read_text())[1])  # type: ignore[index]
    for name in (*pair["pictures"], pair["left"], pair["right"]):
        assert (rating.parent / unquote(urlsplit(name).path)).is_file()
    if CHROMIUM is None:
        return
    probe = """<script>window.addEventListener("load", () => {
  const figures = [...document.querySelectorAll(".strip figure")];
  document.body.dataset.widest = Math.max(...figures.map(one => one.offsetWidth));
});</script>"""
    page.write_text(page.read_text().replace("<body>", f"<body>{probe}"))
    assert int(re.search(r'data-widest="(\d+)"', browsed(page, "--dump-dom"))[1]) <= 300  # type: ignore[index]
