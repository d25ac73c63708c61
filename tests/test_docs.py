"""The examples in docs/extending.md do what the page says of them. Run: python -m pytest tests/test_docs.py"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.model.objective import LossOutput
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.corpora.source import Notes
from domainshuttle.pipelines.corpora.survey import Survey
from domainshuttle.pipelines.encoding.sample_encoder import decode_sample
from domainshuttle.platform.cli import app
from domainshuttle.platform.training.loss_metrics import LossMetrics

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's examples define, run one after the other."""
    names: dict[str, Any] = {"__name__": "extending"}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/extending.md", "exec", dont_inherit=True), names)
    return names


def test_the_builder_makes_samples_that_training_can_use(page: dict[str, Any], tmp_path: Path) -> None:
    source = page["DiscsSource"](page["DiscsConfig"](discs=5), "discs")
    survey = Survey(tmp_path, tuple(source.pieces()))
    assert survey.take(0, source) == 5
    rows = survey.select(source.wanted)[0]
    samples = list(source.make([*survey.records(rows[1:4])], survey, Notes()))
    assert [sample.key for sample in samples] == ["disc-0000001", "disc-0000002", "disc-0000003"]
    (again,) = source.make([*survey.records(rows[2:3])], survey, Notes())
    assert again.members() == samples[1].members()
    target, (reference,) = decode_sample(samples[0], parse_bucket("1x64x64"))
    assert target.shape == (1, 64, 64, 3)
    assert np.abs(target[0, 32, 32].astype(int) - reference[32, 32]).max() < 12  # the disc has its reference's colour


def test_the_encoder_keeps_the_shapes_of_the_protocol(page: dict[str, Any]) -> None:
    codec, pixels = page["MeanCodec"](), torch.rand(2, 3, 9, 32, 48) * 2 - 1
    latents = codec.encode(pixels)
    assert latents.shape == (2, 16, 3, 4, 6)
    blocks = pixels[:, :, 0].unflatten(3, (6, 8)).unflatten(2, (4, 8))
    torch.testing.assert_close(latents[:, :3, 0], blocks.mean((3, 5)))
    assert codec.decode(latents).shape == pixels.shape
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents)


def test_the_loss_and_the_metric_are_what_they_say(page: dict[str, Any]) -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    expected = [min(s, 5.0) / (s + 1) for s in (81.0, 1.0, 1 / 81)]
    torch.testing.assert_close(page["min_snr_weights"](t), torch.tensor(expected))
    batch = TrainingBatch.fake(2, frames=3, height=4, width=4, references=2, text_tokens=5, text_dim=8)
    torch.testing.assert_close(page["reference_share"](batch), torch.tensor([2 / 5, 2 / 5]))
    masked = replace(batch, reference_mask=torch.tensor([[True, False], [False, False]]))
    torch.testing.assert_close(page["reference_share"](masked), torch.tensor([1 / 4, 0.0]))


def test_the_metric_is_added_by_the_line_that_the_page_gives(page: dict[str, Any]) -> None:
    """To the last name, which is here that of a source without samples."""
    metrics = LossMetrics(["fake", "last"], 0.0, torch.device("cpu"))
    batch = TrainingBatch.fake(2, frames=3, height=4, width=4, references=2, text_tokens=5, text_dim=8)
    losses = LossOutput(torch.tensor(1.0), torch.tensor([1.0, 3.0]), None, torch.tensor([0.1, 0.9]))
    metrics.add(batch, losses, {})
    before = metrics._step.clone()
    (line,) = re.findall(r"`(self\._add\(.*\))`", (DOCS / "extending.md").read_text())
    exec(line, page | {"self": metrics, "batch": batch, "bucket": torch.tensor([0, 3])})
    added = metrics._step - before
    assert before[:, 0].tolist() == [4.0, 2.0] and not added[:, :-1].any()
    torch.testing.assert_close(added[:, -1], torch.tensor([0.8, 2.0], dtype=torch.float64))


def test_every_file_and_verb_that_the_docs_name_is_there() -> None:
    root = DOCS.parent
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    verbs |= {group.name for group in app.registered_groups if group.name}
    for path in [root / "README.md", *DOCS.glob("*.md")]:
        text = path.read_text()
        for name in re.findall(r"`((?:platform|pipelines|model|cluster|tests|benchmarks|configs)/[\w/.-]+\.\w+)", text):
            assert (root / name).exists(), f"{path.name} names {name}"
        for name in re.findall(r"\]\(([\w/.-]+\.(?:md|png))\)", text):
            assert (path.parent / name).exists(), f"{path.name} links to {name}"
        for verb in re.findall(r"domainshuttle ([a-z]+)(?= )", text):
            assert verb in verbs, f"{path.name} names `domainshuttle {verb}`"


def test_modules_that_texts_name_exist() -> None:
    """Docstrings, comments and pages cite modules by their file's name, which moves leave behind."""
    root = DOCS.parent
    rooms = ("benchmarks", "cluster", "configs", "docs", "model", "pipelines", "platform", "tests")
    files = [path for room in rooms for path in (root / room).rglob("*") if path.suffix in (".py", ".md")]
    have = {path.name for path in files if path.suffix == ".py"}
    cited = re.compile(r"[\w/]*?(\w{3,}\.py)\b(?!\")")
    for path in (*files, root / "README.md"):
        for line in path.read_text().splitlines():
            if not line.lstrip().startswith(("import", "from", "@")):
                missing = {name for name in cited.findall(line) if name not in have and not _of_others(name, line)}
                assert not missing, f"{path.relative_to(root)}: {missing} in: {line.strip()}"


def _of_others(name: str, line: str) -> bool:
    in_a_stack = re.search(r"^ +at +\w+, \w+\.py:\d+\b", line) is not None  # as `domainshuttle stacks` prints it
    return name in ("sitecustomize.py", "__init__.py") or "torchvision" in line or in_a_stack
