"""Blind pairs for people: which of two clips of a case is better, without knowing who made them.

`make_pages` writes a folder that opens from disk: a page that shows references, prompt and two clips side by side, asks
the questions, and saves a JSONL of the answers. Which clip is whose is in a key beside the folder, never in it, and
files have names that say nothing. `read_answers` takes such JSONL back; `agreement` says how much people agree with one
another, and each metric with them.
"""

import hashlib
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from scipy import stats

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media.decode import opened_clip, shown_frames
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.config.loading import read_text
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.evaluation.choices import title_of
from domainshuttle.platform.evaluation.results import Results
from domainshuttle.platform.evaluation.statistics import Estimate, estimate, krippendorff_alpha
from domainshuttle.platform.evaluation.videos import Clip
from domainshuttle.platform.report import page

PAGE_FOLDER, KEY_NAME, ANSWERS_NAME = "rating", "rating-key.json", "ratings.jsonl"
QUESTIONS = {
    "subject": "In which clip do the subjects look more like those of the pictures?",
    "prompt": "Which clip shows better what the text says, also the style that it asks for?",
    "quality": "Which clip looks better: sharp, natural, moving well?",
}
"""By name; an answer is left, right or same."""
_SIDES = {"left": 1.0, "same": 0.0, "right": -1.0}


@dataclass(frozen=True)
class Pair:
    """Two clips of a case, as they are shown."""

    id: str
    case: str
    left: str
    """The column whose clip is on the left."""
    right: str
    clips: tuple[str, ...] = ()
    """sha256 of the left and of the right clip; of a page of November 2026 or before not known."""


@dataclass(frozen=True)
class Rating:
    """An answer of a person: 1 where the first of the two columns, by name, is better, -1 the second, 0 the same."""

    rater: str
    question: str
    case: str
    first: str
    second: str
    value: float
    clips: tuple[str, ...] = ()
    """sha256 of the clips of the two; not known: none."""


def make_pages(out: Path, results: Results, pairs_per_rater: int | None = None, seed: int = 0) -> Path:
    """Writes the page of an evaluation in `out`, and its key; returns the page.

    Every two models that both have a clip of a case that can be shown are a pair; which clip is left, and the order,
    are drawn. With `pairs_per_rater` only so many. The key keeps the pairs of earlier pages, so that answers to them
    are understood. Raises ConfigError where there are no two models with clips.
    """
    judged = [column.name for column in results.columns if column.judged]
    found = []
    for case in results.cases:
        clips = {name: clip for name in judged if (clip := _first(results, name, case.id)) and _shows(clip)}
        there = {name: clip.sha256 for name, clip in clips.items()}
        for first, second in combinations(sorted(there), 2):
            seen = [seed, case.id, case.digest, first, second, there[first], there[second]]
            name = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
            left, right = (first, second) if int(name, 16) % 2 else (second, first)
            found.append(Pair(name, case.id, left, right, (there[left], there[right])))
    if not found:
        raise ConfigError(f"{out} has no case of which two models have clips: evaluate another model with --out {out}")
    found = sorted(found, key=lambda pair: pair.id)[:pairs_per_rater]  # ids are drawn, and so is their order
    folder = out / PAGE_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "media").mkdir(parents=True)
    cases = {case.id: case for case in results.cases}
    shown = []
    for pair in found:
        videos = []
        for side, column in (("left", pair.left), ("right", pair.right)):
            clip = _first(results, column, pair.case)
            assert clip is not None
            videos.append(_copied(clip.path, folder, f"{pair.id}{side}{seed}"))
        pictures = [_copied(one.path, folder, one.sha256) for one in cases[pair.case].references]
        shown.append(
            {"id": pair.id, "prompt": cases[pair.case].prompt, "pictures": pictures, "left": videos[0],
             "right": videos[1]}
        )  # fmt: skip
    every = {**_read_key(out / KEY_NAME), **{pair.id: pair for pair in found}}
    write_bytes(out / KEY_NAME, json.dumps([asdict(pair) for pair in every.values()], indent=1).encode())
    return page.write_page(
        folder / "index.html", "rating.html", title="Which clip is better?", pairs=shown, questions=QUESTIONS
    )


def _read_key(path: Path) -> dict[str, Pair]:
    """The pairs of a key by their ids; none where there is no key. Raises ConfigError for one that is damaged."""
    if not path.is_file():
        return {}
    try:
        pairs = [Pair(**{**one, "clips": tuple(one.get("clips", ()))}) for one in json.loads(read_text(path))]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): restore it") from error
    return {pair.id: pair for pair in pairs}


def _first(results: Results, column: str, case: str) -> Clip | None:
    """The first clip of a case that a column has."""
    return next((clip for clip in results.clips.get((column, case), ()) if clip.sha256), None)


def _shows(clip: Clip) -> bool:
    """Whether there is something to see: nobody is asked about a damaged clip."""
    try:
        with opened_clip(clip.path.read_bytes(), str(clip.path)) as opened:
            return next(shown_frames(opened), None) is not None
    except DataError:
        return False


def _copied(source: Path, folder: Path, secret: str) -> str:
    """Copies a file under a name that says nothing of where it comes from; returns the link to it."""
    name = f"media/{hashlib.sha256(secret.encode()).hexdigest()[:20]}{source.suffix}"
    if not (folder / name).exists():
        shutil.copyfile(source, folder / name)  # not its times, which tell models apart
    return quote(name)


def read_answers(out: Path, files: Sequence[Path] = ()) -> list[Rating]:
    """The answers that are kept in `out`, after those of `files` were added; of one that was given twice the last.

    Raises ConfigError for a line that is no answer, or of a pair that the key does not have.
    """
    key_path, kept = out / KEY_NAME, out / ANSWERS_NAME
    if not files and not kept.is_file():
        return []
    key = _read_key(key_path)
    if not key:
        raise ConfigError(
            f"there is no {key_path}, which says whose clips were rated: restore it, or make the page again with "
            f"domainshuttle evaluate rate {shlex.quote(str(out))}"
        )
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in (*([kept] if kept.is_file() else []), *files):
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                one = json.loads(line)
                rater, pair, question, answer = (one[name].strip() for name in ("rater", "pair", "question", "answer"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: expected rater, pair, question and answer ({type(error).__name__}: "
                    f"{error}): give the file that the page saved"
                ) from error
            if pair not in key or question not in QUESTIONS or answer not in _SIDES:
                raise ConfigError(
                    f"{path}, line {number}: pair {pair}, question {question}, answer {answer}: they are of no "
                    f"page that was made of {out} ({key_path}): "
                    + ("remove the line" if path == kept else "give them to the evaluation that they are of")
                )
            lines[rater, pair, question] = {"rater": rater, "pair": pair, "question": question, "answer": answer}
    if files:
        write_bytes(kept, "".join(json.dumps(one) + "\n" for one in lines.values()).encode())
    ratings = []
    for one in lines.values():
        shown = key[one["pair"]]
        first, second = sorted((shown.left, shown.right))
        turn = 1 if shown.left == first else -1
        value = _SIDES[one["answer"]] * turn
        ratings.append(Rating(one["rater"], one["question"], shown.case, first, second, value, shown.clips[::turn]))
    return ratings


def of_now(ratings: Sequence[Rating], results: Results) -> list[Rating]:
    """Those of clips that are still the models' first of their case: an answer to another clip says nothing of it."""

    def same(one: Rating) -> bool:
        clips = [_first(results, column, one.case) for column in (one.first, one.second)]
        return all(clips) and one.clips in ((), tuple(clip.sha256 for clip in clips if clip))

    return [one for one in ratings if same(one)]


@dataclass(frozen=True)
class Agreement:
    """How the people of a rating agree with one another, and with a metric."""

    question: str
    metric: str
    """Empty: with one another."""
    pairs: int
    alpha: float
    """Krippendorff's: of the people among themselves, or of their mean and the metric's order; ordinal."""
    agree: float
    """Share of the pairs on which people have a majority, and which the metric orders in the same way."""
    tau: float
    """Kendall's tau-b of the mean answer and the metric's difference."""


def agreement(ratings: Sequence[Rating], results: Results) -> list[Agreement]:
    """People among themselves, then each metric with their mean answer, by question."""
    found = []
    for question in QUESTIONS:
        mine = [one for one in ratings if one.question == question]
        if not mine:
            continue
        raters = sorted({one.rater for one in mine})
        items = sorted({(one.case, one.first, one.second) for one in mine})
        table = np.full((len(raters), len(items)), np.nan)
        for one in mine:
            table[raters.index(one.rater), items.index((one.case, one.first, one.second))] = one.value
        nan = float("nan")
        among = krippendorff_alpha(table) if len(raters) > 1 else nan
        found.append(Agreement(question, "", len(items), among, nan, nan))
        people = np.nanmean(table, axis=0)
        for metric in results.metrics:
            differences = np.array([_difference(results, metric.label, *item) for item in items])
            known = ~np.isnan(differences)
            if known.sum() < 2:
                continue
            ours, theirs = differences[known], people[known]
            decided = theirs != 0
            agree = np.sign(ours[decided]) == np.sign(theirs[decided])
            orders = np.stack([np.sign(ours), np.sign(theirs)])
            found.append(
                Agreement(
                    question, title_of(metric), int(known.sum()), krippendorff_alpha(orders),
                    float(agree.mean()) if decided.any() else nan, float(stats.kendalltau(ours, theirs).statistic),
                )
            )  # fmt: skip
    return found


def _difference(results: Results, metric: str, case: str, first: str, second: str) -> float:
    cells = [results.cell(column, metric, case) for column in (first, second)]
    if any(cell is None for cell in cells):
        return float("nan")
    return cells[0].value - cells[1].value  # type: ignore[union-attr]


def preferences(ratings: Sequence[Rating], results: Results) -> list[tuple[str, str, str, Estimate]]:
    """By question and pair of models: the mean answer over cases, from -1 (the second) to 1 (the first)."""
    found, settings = [], results.config.statistics
    for question in QUESTIONS:
        mine = [one for one in ratings if one.question == question]
        for first, second in sorted({(one.first, one.second) for one in mine}):
            by_case: dict[str, list[float]] = {}
            for one in mine:
                if (one.first, one.second) == (first, second):
                    by_case.setdefault(one.case, []).append(one.value)
            values = np.array([np.mean(values) for values in by_case.values()])
            interval = estimate(values, settings.confidence, settings.resamples, settings.seed, -1.0, 1.0)
            found.append((question, first, second, interval))
    return found
