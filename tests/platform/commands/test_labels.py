"""`data label` as it is typed, on Ray. Run: python -m pytest tests/platform/commands/test_labels.py"""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from label_corpora import raw_sample, rows_of, says, write_corpus
from openai_server import Reply, openai_server
from running import CLI, cli, environment, in_process

from domainshuttle.pipelines.index.samples import read_info


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "labels.labeler=words"], "labels.labeler: unknown key; did you mean 'labeller'?"),
        (["--set", "labels.labeller=endpoint"], "labels.endpoint.url=http"),
        (["--set", "labels.labeller=transformers"], "--set labels.model=FOLDER"),
        (
            ["--set", "labels.endpoint.url=http://a:secret@b/v1", "--set", "labels.endpoint.model=m"],
            "has a secret in it",
        ),
        (["--corpus", "mine"], "--corpus chooses among those of a configuration"),
    ],
)
def test_mistakes_are_answered_before_a_cluster_starts(arguments: list[str], message: str, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "raw", [raw_sample(0)])
    said = in_process("data", "label", folder, *arguments, expect=2)
    assert message in " ".join(said.split()), said
    assert "secret@" not in said


def test_the_help_teaches() -> None:
    said = " ".join(in_process("data", "label", "--help").split())
    for part in ("labels.labeller=endpoint", "labels.labeller=transformers", "--ask-again", "failed.jsonl"):
        assert part in said.replace("- ", "-"), said


@pytest.mark.nightly
def test_a_command_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        paths = [path for path in folder.rglob("*") if path.is_file() and "answers" not in path.parts]
        named = {str(path.relative_to(folder)): path.read_bytes() for path in paths if ".parts" not in path.parts}
        return {name: data for name, data in named.items() if name != "labels/report.json"}

    def slow(body: dict[str, Any], number: int) -> Reply:
        reply: Reply = says()(body, number)
        reply.after = 0.1
        return reply

    folders = [write_corpus(tmp_path / name, map(raw_sample, range(150))) for name in ("whole", "killed")]
    with openai_server(slow) as server:
        endpoint = {"url": server.url, "model": "made", "at_once": 4}
        options = [part for name, value in endpoint.items() for part in ("--set", f"labels.endpoint.{name}={value}")]
        options += ["--set", "labels.labeller=endpoint"]
        cli("data", "label", folders[0], *options)
        asked = len(server.requests)
        assert asked == 150
        command = [*CLI, "data", "label", str(folders[1]), *options]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
        while len(server.requests) < asked + 70 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(3)  # Ray's processes end when their driver is gone
        said = cli("data", "label", folders[1], *options)
        assert "150 of 150 samples have labels" in said and "Next: domainshuttle data" in said
        assert len(server.requests) <= 2 * asked + 4  # what was on its way is asked again, and nothing else
    assert contents(folders[0]) == contents(folders[1])
    report = json.loads((folders[1] / "labels" / "report.json").read_text())
    assert report["values"]["caption: labelled, by endpoint"] == 150
    assert all(read_info(row).caption.startswith("A plain picture") for row in rows_of(folders[1]))
