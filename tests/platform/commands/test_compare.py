"""Comparing runs: .venv/bin/python -m pytest tests/platform/commands/test_compare.py"""

from __future__ import annotations

import base64
import io
import math
import re
import sqlite3
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from domainshuttle.platform.commands import compare, compare_page, curves
from domainshuttle.platform.report.text import visible
from domainshuttle.platform.tracking.mlflow import PARENT_TAG, MetricLogger, connect, open_schedule
from domainshuttle.platform.tracking.training_steps import HOURS_TAG, OWN_HOURS


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


@pytest.mark.parametrize("width", [200, 110, 80, 40])
def test_all_fields_of_all_runs_are_there_at_any_width(uri: str, width: int) -> None:
    rows = compare.compare(uri, ["paper"])
    shown = text(rows, width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "…" not in shown
    for needed in ("full", "without", "└ stage2", "finished", "killed", "GPU-hours", "cross_pair", "False"):
        assert needed in shown
    for row in rows:
        for field, value in row.values.items():
            assert field in shown and value in shown
    assert "stages.1.cross_pair" in shown  # as `--set` takes it
    assert text([], width).strip() == "There are no runs yet."


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


def test_a_stage_of_one_logged_point_is_seen(uri: str, tmp_path: Path) -> None:
    tracker = open_schedule(uri, "short", "one", {}, {}, tmp_path / "spool")
    tracker.open_segment("stage1")
    assert tracker.log({"loss": 0.5}, 3, "stage1")
    picture = curves.plot(uri, compare.compare(uri, ["short"]), tmp_path / "losses.png")
    image = Image.open(picture).convert("RGB").crop((0, 100, 1440, 10_000))  # below the legend
    colour = tuple(bytes.fromhex(curves.COLOURS[0][1:]))
    assert any(found == colour for _, found in image.getcolors(maxcolors=1 << 24) or [])


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
    assert lines == [("stages.s1.steps", ["100", "200"]), ("s1: mixture", ["a: 1", "b: 1"])]
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


def test_pictures_that_can_not_be_read_leave_the_rest_of_the_page(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a client without access to where a server keeps them."""
    open_schedule(uri, "away", "one", {"lr": "1"}, {}, tmp_path / "one")
    (store,) = [row.run for row in compare.compare(uri, ["away"])]
    database = sqlite3.connect(uri.removeprefix("sqlite:///"))
    with database:
        database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", ("foo://away/artifacts", store.id))
    rows = compare.compare(uri, ["away"])
    page = compare_page.write_page(uri, rows, curves.plot(uri, rows, tmp_path / "x.png"), tmp_path / "x.html")
    assert "The pictures of <b>one</b> are left out:" in page.read_text()
    assert "The pictures of one are left out of the page:" in " ".join(capsys.readouterr().out.split())


def test_hours_between_two_looks_at_the_ledger_are_drawn_as_a_line() -> None:
    """The ledger is written each some seconds; metrics more often, with what it said last."""
    logged = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 4.0), (5, 4.0), (6, 4.0)]
    assert list(curves._hours([1, 2, 3, 4, 5, 6], logged)) == pytest.approx([1, 1.6, 2.2, 2.8, 3.4, 4])
    assert [math.isnan(hour) for hour in curves._hours([1, 2], [])] == [True, True]


def test_what_is_logged_beside_the_training_is_no_step(uri: str, tmp_path: Path) -> None:
    """The driver's hours, evaluations and system metrics, each on steps of their own, in a run that was restarted."""
    folder = tmp_path / "spool"
    tracker = open_schedule(uri, "beside", "run", {}, {}, folder)
    hours = 0.0
    for attempt, (segment, first, last) in enumerate([("s1", 1, 4), ("s2", 1, 57), ("s2", 41, 120)], 1):
        logger = MetricLogger(tracker.ids, segment, folder, start_step=first - 1, system_every=0.02)
        for step in range(first, last + 1):
            hours += 1.0
            losses = {} if step == 120 else {"loss": 0.5, "loss/flow": 0.5}  # the last step was dropped
            logger.log(step, {**losses, "learning_rate": 0.1, "gpu_hours/used": hours})
        assert logger.finish()
        hours += 10.0
        tracker.log({"gpu_hours/used": hours}, None, segment)  # as the driver does when the workers have ended
        tracker.log({"gpu_hours/used": hours}, attempt)
    tracker.log({"evaluation/identity_own": 0.5}, 999, "s2")
    assert tracker.finish()
    rows = compare.compare(uri, ["beside"])
    assert {row.label: row.values["steps"] for row in rows} == {"run": "124", "s1": "4", "s2": "120"}
    assert not any(name.startswith("resumed.") for name in rows[1].run.tags)
    assert [name for name in rows[2].run.tags if name.startswith("resumed.")] == ["resumed.40"]
    assert "steps 41 to 57" in rows[2].run.tags["resumed.40"]
    first, second = curves.pieces(uri, rows, "loss")
    assert (list(first.steps), second.first_step, second.steps[0]) == ([1, 2, 3, 4], 4, 5)
    assert list(first.hours) == pytest.approx([1, 2, 3, 4])  # not the 14 that the driver logged after the last step
    assert second.hours[-1] == pytest.approx(4 + 10 + 57 + 10 + 79)


def test_a_run_that_is_no_training_has_no_steps(uri: str, tmp_path: Path) -> None:
    tracker = open_schedule(uri, "none", "judged", {}, {}, tmp_path / "spool")
    tracker.log({"gpu_hours/used": 3.0}, 7)
    tracker.log({"evaluation/identity_own": 0.5}, 999)
    (row,) = compare.compare(uri, ["none"])
    assert (row.values["steps"], row.values["GPU-hours"], row.values["identity"]) == ("", "3", "50.0%")


HOSTILE = (
    "[bold]not bold[/] [/] [link=x]",
    "<script>alert(1)</script> {{ 7 * 7 }} {% raw %}",
    "$x^{$ _{ \\frac",
    "_hidden",
    "\x1b[31mred\x1b[0m\u202eturned\nnext",
    "名前" * 30,
    "n" * 240,
)


def test_names_of_any_kind_and_length_are_shown_and_do_nothing(uri: str, tmp_path: Path) -> None:
    client = connect(uri)
    experiment = client.create_experiment("hostile", artifact_location=(tmp_path / "artifacts").as_uri())
    for name in HOSTILE:
        parent = client.create_run(experiment, run_name=name).info.run_id
        client.log_param(parent, "stages.a.note", name)
        child = client.create_run(experiment, run_name=name, tags={PARENT_TAG: parent}).info.run_id
        for step in range(1, 4):
            client.log_metric(child, "loss", 1.0 / step, step=step)
        client.set_tag(child, "error", f"{name}\n  of a traceback\n{name}")
        client.set_terminated(child, "FAILED")
    rows = compare.compare(uri, ["hostile"])
    assert [row.label for row in rows if row.depth == 0] == list(HOSTILE)
    for width in (40, 80, 400):
        shown = text(rows, width)
        assert "\x1b" not in shown and "\u202e" not in shown and "…" not in shown
        for name in HOSTILE:
            assert visible(name) in shown
    picture = curves.plot(uri, rows, tmp_path / "losses.png")
    colours = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(maxcolors=1 << 24) or []}
    assert all(tuple(bytes.fromhex(colour[1:])) in colours for colour in curves.COLOURS)

    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: set[str] = set()
            self.texts: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)

        def handle_data(self, data: str) -> None:
            self.texts.add(data)

    page = Page()
    page.feed(compare_page.write_page(uri, rows, picture, tmp_path / "page.html", HOSTILE[1]).read_text())
    assert not page.tags & {"script", "i", "link"}
    for name in HOSTILE:
        assert visible(name, but="\n") in page.texts


def test_runs_of_another_layout_are_all_there(uri: str, tmp_path: Path) -> None:
    """Of other programs: runs below runs below runs, of one name, whose parent is gone, or in a ring."""
    client = connect(uri)
    experiment = client.create_experiment("foreign", artifact_location=(tmp_path / "artifacts").as_uri())
    made: dict[str, str] = {}

    def make(key: str, name: str, parent: str | None = None) -> None:
        tags = {PARENT_TAG: made.get(parent, parent)} if parent else {}
        made[key] = client.create_run(experiment, tags=tags, run_name=name).info.run_id

    make("root", "root")
    make("child", "child", "root")
    make("grandchild", "grandchild", "child")
    make("twin", "child", "root")
    make("orphan", "orphan", "0" * 32)
    make("ring", "ring")
    make("ring2", "ring2", "ring")
    client.set_tag(made["ring"], PARENT_TAG, made["ring2"])
    client.log_param(made["child"], "depth", "1")
    client.log_param(made["twin"], "depth", "2")
    client.log_metric(made["grandchild"], "train_loss", 0.5, step=300)
    client.log_metric(made["grandchild"], "loss", 0.25, step=200)
    rows = compare.compare(uri, ["foreign"])
    assert sorted(row.run.id for row in rows) == sorted(made.values())
    depths = {row.run.id: row.depth for row in rows}
    assert [depths[made[key]] for key in ("root", "child", "grandchild", "orphan")] == [0, 1, 2, 0]
    steps = {row.run.id: row.values["steps"] for row in rows}
    assert (steps[made["root"]], steps[made["grandchild"]], steps[made["orphan"]]) == ("200", "200", "")
    labels = [row.label for row in rows if row.run.name == "child"]
    assert labels == [f"child ({made[key][:6]})" for key in ("child", "twin")]
    shown = text(rows, 80)
    assert "    └ grandchild" in shown and all(label in shown for label in labels)
    page = compare_page.write_page(uri, rows, curves.plot(uri, rows, tmp_path / "x.png"), tmp_path / "x.html")
    assert "grandchild" in page.read_text()


def test_a_stage_that_only_some_runs_have_is_one_difference() -> None:
    with_base = {"seed": "1", "stages.base.steps": "20", "stages.base.lr": "1", "stages.s1.steps": "5"}
    with_base["corpora.a.fps"] = "2"
    without = {"seed": "1", "stages.s1.steps": "6"}
    folded = compare.fold_absent([with_base, without])
    assert compare.differing(folded) == ["corpora.a", "stages.base", "stages.s1.steps"]
    assert (folded[0]["stages.base"], folded[0]["corpora.a"]) == ("20 steps", "there")
    assert folded[1] == without


def test_a_schedule_with_a_curve_of_its_own_counts_nothing_twice(uri: str, tmp_path: Path) -> None:
    """Hours of a stage are its own, and those of workers without a GPU are no GPU-hours."""
    params = {"cluster.gpus_per_worker": 0}
    tracker = open_schedule(uri, "curve", "run", params, {}, tmp_path / "spool")
    for segment, offset, steps in (("s1", 0, 4), ("s2", 4, 6)):
        tracker.open_segment(segment, tags={HOURS_TAG: OWN_HOURS})
        logger = MetricLogger(tracker.ids, segment, tmp_path / "spool")
        for step in range(1, steps + 1):
            values = {"loss": float(step), "learning_rate": 0.1}
            point = (offset + step, {**values, "gpu_hours/used": float(offset + step)})
            logger.log(step, {**values, "gpu_hours/used": float(step)}, point)
        assert logger.finish()
    assert tracker.finish()
    rows = compare.compare(uri, ["curve"])
    assert [(row.values["steps"], row.values["device-hours"]) for row in rows] == [("10", "10"), ("4", "4"), ("6", "6")]
    first, second = curves.pieces(uri, rows, "loss")
    assert (list(first.steps), list(second.steps)) == ([1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert (list(first.hours), list(second.hours)) == ([1, 2, 3, 4], [5, 6, 7, 8, 9, 10])


def test_the_means_of_an_evaluation_stand_with_their_bounds(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = open_schedule(uri, "judged", "one", {}, {}, tmp_path / "spool")
    MetricLogger(tracker.ids, "s1", tmp_path / "spool").finish()
    values = {"dino_i": 0.4, "dino_i_low": 0.35, "dino_i_high": 0.45, "mixed/dino_i": 0.3, "mixed/dino_i_low": 0.2}
    assert tracker.log({f"evaluation/{name}": value for name, value in values.items()}, 5, "s1")
    assert tracker.finish()
    rows = compare.compare(uri, ["judged"])
    assert [row.values["dino i"] for row in rows] == ["", "0.400 [0.350, 0.450]"]
    assert not any("mixed" in name for name in rows[0].values)
