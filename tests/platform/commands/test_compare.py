"""Comparing runs: .venv/bin/python -m pytest tests/platform/commands/test_compare.py"""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from domainshuttle.platform.commands import compare, compare_page, curves
from domainshuttle.platform.tracking.mlflow import MetricLogger, open_schedule


def train(uri: str, experiment: str, name: str, folder: Path, cross_pair: bool, lr: float, scale: float) -> None:
    """Logs a schedule of two stages as the trainer would; GPU-hours count on over the whole schedule."""
    params = {"stages.1.cross_pair": cross_pair, "optimizer.lr": lr, "model.dim": 96, "note": "[bold]<b>&"}
    tracker = open_schedule(uri, experiment, name, params, {}, folder)
    hours = 0.0
    for segment, steps in (("stage1", 40), ("stage2", 60)):
        logger = MetricLogger(tracker.ids, segment, folder, system_every=0.05)
        for step in range(1, steps + 1):
            hours += 0.01 * scale
            loss = scale * math.exp(-step / 30)
            values = {"loss": loss, "loss/flow": loss / 2, "samples/s": 31.25}
            if segment == "stage2" and cross_pair:
                values["loss/cross_pair"] = loss / 4
            if step % 10 == 0:
                values["gpu_hours/used"] = hours
            logger.log(step, {**values, "loss": float("nan")} if step == 7 else values)
        assert logger.finish()
    assert tracker.finish("FINISHED" if cross_pair else "KILLED")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("compare")
    uri = f"sqlite:///{folder}/mlflow.db"
    train(uri, "paper", "full", folder / "1", cross_pair=True, lr=0.1, scale=1.0)
    train(uri, "paper", "without", folder / "2", cross_pair=False, lr=0.1, scale=2.0)
    train(uri, "other", "full", folder / "3", cross_pair=True, lr=0.2, scale=1.0)
    return uri


def text(rows: list[compare.Row], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    compare.print_table(rows, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_are_a_tree_with_figures_and_only_the_differences(uri: str) -> None:
    rows = compare.compare(uri, ["paper"])
    assert [(row.depth, row.label) for row in rows] == [
        (0, "full"),
        (1, "stage1"),
        (1, "stage2"),
        (0, "without"),
        (1, "stage1"),
        (1, "stage2"),
    ]
    assert [row.differences for row in rows if row.depth == 0] == [
        {"stages.1.cross_pair": "True"},
        {"stages.1.cross_pair": "False"},
    ]
    full, _, stage2, without, *_ = (row.values for row in rows)
    assert (full["status"], full["steps"], full["GPU-hours"]) == ("finished", "100", "1")
    assert (without["status"], without["GPU-hours"]) == ("killed", "2")
    last = math.exp(-2)
    assert (stage2["steps"], stage2["loss"], stage2["min"]) == ("60", f"{last:.4g}", f"{last:.4g}")
    assert (stage2["flow"], stage2["cross pair"]) == (f"{last / 2:.4g}", f"{last / 4:.4g}")
    assert (stage2["samples/s"], stage2["GPU-hours"]) == ("31.25", "0.6")  # its own, without those of stage 1
    assert re.fullmatch(r"0m \d\ds", stage2["duration"])


def test_runs_of_several_experiments_and_chosen_ones(uri: str) -> None:
    rows = compare.compare(uri, ["paper", "other"], runs=["full"])
    assert [row.label for row in rows if row.depth == 0] == ["paper: full", "other: full"]
    assert [row.differences for row in rows if row.depth == 0] == [{"optimizer.lr": "0.1"}, {"optimizer.lr": "0.2"}]
    chosen = compare.compare(uri, ["paper"], runs=[rows[0].run.id[:8]])
    assert [row.run.id for row in chosen] == [row.run.id for row in rows[:3]]
    assert chosen[0].differences == {}
    with pytest.raises(LookupError, match=r"no run 'ful' in paper; there are: full, without"):
        compare.compare(uri, ["paper"], runs=["ful"])


def test_runs_of_one_name_are_told_apart(uri: str, tmp_path: Path) -> None:
    for number in (1, 2):
        open_schedule(uri, "twins", "twin", {}, {}, tmp_path / str(number)).finish()
    labels = [row.label for row in compare.compare(uri, ["twins"])]
    assert len(set(labels)) == 2 and all(re.fullmatch(r"twin \([0-9a-f]{6}\)", label) for label in labels)


def test_a_param_that_was_changed_on_a_resume_counts_as_changed(uri: str, tmp_path: Path) -> None:
    for name, lr in (("kept", 0.1), ("raised", 0.3)):
        tracker = open_schedule(uri, "changed", name, {"lr": 0.1}, {}, tmp_path / name)
        open_schedule(uri, "changed", name, {"lr": lr}, {}, tmp_path / name, ids=tracker.ids)
    assert [row.differences for row in compare.compare(uri, ["changed"])] == [{"lr": "0.1"}, {"lr": "0.3"}]


@pytest.mark.parametrize("width", [200, 110, 80])
def test_the_table_fits_the_console_and_says_everything_that_matters(uri: str, width: int) -> None:
    shown = text(compare.compare(uri, ["paper"]), width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "…" not in shown
    for needed in ("full", "without", "└ stage2", "finished", "killed", "GPU-hours", "cross_pair", "False"):
        assert needed in shown
    assert (" flow " in shown) == (width > 80)
    assert text([], width).strip() == "There are no runs yet."


def test_short_names_are_the_ends_that_tell_keys_apart() -> None:
    assert compare.short_names(["a.b.lr", "a.c.lr", "seed", "a.steps"]) == ["b.lr", "c.lr", "seed", "steps"]
    assert compare.short_names(["lr", "a.lr"]) == ["lr", "a.lr"]


def test_segments_follow_each_other_and_gpu_hours_are_read_between_the_logged_ones(uri: str) -> None:
    first, second = curves.pieces(uri, compare.compare(uri, ["paper"])[:3], "loss")
    assert (first.schedule, first.segment, second.segment) == ("full", "stage1", "stage2")
    assert (first.first_step, second.first_step) == (0, 40)
    assert 7 not in first.steps and len(first.steps) == 39  # a NaN is not drawn
    assert list(second.steps[:3]) == [41, 42, 43]
    assert math.isnan(first.hours[0]) and first.hours[-1] == pytest.approx(0.4)
    assert dict(zip(second.steps, second.hours, strict=True))[65] == pytest.approx(0.65)
    assert not curves.pieces(uri, compare.compare(uri, ["paper"])[3:], "loss/cross_pair")


def test_the_picture_shows_every_run_and_the_page_needs_nothing_else(uri: str, tmp_path: Path) -> None:
    rows = compare.compare(uri, ["paper", "other"])
    picture = curves.plot(uri, rows, tmp_path / "new" / "losses.png")
    image = Image.open(picture).convert("RGB")
    assert image.width == 1440 and image.height > 1000
    colours = {colour for _, colour in image.getcolors(maxcolors=1 << 24) or []}
    for colour in curves.COLOURS[:3]:  # one for each schedule
        assert tuple(bytes.fromhex(colour[1:])) in colours
    assert tuple(bytes.fromhex(curves.COLOURS[3][1:])) not in colours

    page = compare_page.write_page(uri, rows, picture, tmp_path / "page" / "runs.html", "Ablation <1>").read_text()
    assert base64.b64encode(picture.read_bytes()).decode() in page
    assert "Ablation &lt;1&gt;" in page and "http" not in re.sub(r"base64,[^\"]+", "", page)

    class Cells(HTMLParser):
        texts: list[str]

        def handle_data(self, data: str) -> None:
            self.texts.append(data)

    cells = Cells()
    cells.texts = []
    cells.feed(page)
    for needed in ("paper: full", "stage2", "optimizer.lr", "0.2", "killed", "GPU-hours"):
        assert needed in cells.texts


def test_runs_without_any_metric_can_be_shown(uri: str, tmp_path: Path) -> None:
    tracker = open_schedule(uri, "young", "just started", {"note": "[bold]<b>&"}, {}, tmp_path / "spool")
    open_schedule(uri, "young", "other", {"note": "[/]"}, {}, tmp_path / "spool2")
    tracker.open_segment("stage1")
    rows = compare.compare(uri, ["young"])
    assert [row.values["status"] for row in rows] == ["running"] * 3
    shown = text(rows, 200)
    assert "[bold]<b>&" in shown and "[/]" in shown
    assert compare_page.write_page(uri, rows, curves.plot(uri, rows, tmp_path / "x.png"), tmp_path / "x.html").exists()


def test_what_differs_in_stages_is_a_table_of_its_own_and_failures_say_why(uri: str, tmp_path: Path) -> None:
    for name, steps, data in (("first", 100, "a: 1"), ("second", 200, "b: 1")):
        tracker = open_schedule(uri, "stages", name, {"stages.s1.steps": steps, "seed": 1}, {}, tmp_path / name)
        tracker.open_segment("s1", {"steps": steps, "mixture": data, "stage": "s1"})
        if name == "second":
            tracker.open_segment("s2", {"steps": 7})
            tracker.fail(RuntimeError("no [space] left"), segment="s2")
    rows = compare.compare(uri, ["stages"])
    labels, lines = compare.differences(rows)
    assert labels == ["first", "second"]
    # the steps are told once, by the configuration; what only one run has does not differ from anything
    assert lines == [("steps", ["100", "200"]), ("s1: mixture", ["a: 1", "b: 1"])]
    for width in (160, 40):
        shown = text(rows, width)
        assert "s1: mixture" in shown.replace("\n", " ") and "b: 1" in shown
        assert "second, s2 failed: RuntimeError: no [space] left" in shown.replace("\n", " ").replace("  ", " ")
    page = compare_page.write_page(uri, rows, curves.plot(uri, rows, tmp_path / "x.png"), tmp_path / "x.html")
    assert "<td>s1: mixture</td><td>a: 1</td><td>b: 1</td>" in page.read_text()
    assert "no [space] left" in page.read_text()


def test_the_page_has_the_newest_samples_of_every_run(uri: str, tmp_path: Path) -> None:
    pictures = {}
    for name in ("one", "two"):
        tracker = open_schedule(uri, "sampled", name, {"lr": name}, {}, tmp_path / name)
        for number, (segment, to) in enumerate(
            [("s1", "samples/step-000900"), ("s2", "samples/step-000020"), ("s2", "samples/step-000100"),
             ("s2", "evaluation")]
        ):  # fmt: skip
            picture = tmp_path / name / str(number) / "grid.png"
            picture.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8), (number * 60, len(name), ord(name[0]))).save(picture)
            pictures[name, number] = base64.b64encode(picture.read_bytes()).decode()
            tracker.open_segment(segment)
            assert tracker.artifact(picture, to, segment)
            assert tracker.log({"evaluation/identity_own": 0.75}, 100, segment)
    open_schedule(uri, "sampled", "without", {}, {}, tmp_path / "without")
    rows = compare.compare(uri, ["sampled"])
    assert [row.values["identity"] for row in rows] == ["", "75.0%", "75.0%", "", "75.0%", "75.0%", ""]
    page = compare_page.write_page(
        uri, rows, curves.plot(uri, rows, tmp_path / "c.png"), tmp_path / "c.html"
    ).read_text()
    shown = [key for key, data in pictures.items() if data in page]
    assert shown == [("one", 2), ("one", 3), ("two", 2), ("two", 3)]
    assert page.count("s2, step 100</span>") == 2


def test_hours_between_two_looks_at_the_ledger_are_drawn_as_a_line() -> None:
    """The ledger is written each some seconds; metrics more often, with what it said last."""
    logged = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 4.0), (5, 4.0), (6, 4.0)]
    assert list(curves._hours([1, 2, 3, 4, 5, 6], logged)) == pytest.approx([1, 1.6, 2.2, 2.8, 3.4, 4])
    assert [math.isnan(hour) for hour in curves._hours([1, 2], [])] == [True, True]


def test_a_stage_that_only_some_runs_have_is_one_difference() -> None:
    with_base = {"seed": "1", "stages.base.steps": "20", "stages.base.lr": "1", "stages.s1.steps": "5"}
    with_base["corpora.a.fps"] = "2"
    without = {"seed": "1", "stages.s1.steps": "6"}
    folded = compare.fold_absent([with_base, without])
    assert compare.differing(folded) == ["corpora.a", "stages.base", "stages.s1.steps"]
    assert (folded[0]["stages.base"], folded[0]["corpora.a"]) == ("20 steps", "there")
    assert folded[1] == without
