"""What a message tells people to do can be done: its commands, options and keys exist, and the error is gone then.

Run: python -m pytest tests/platform/test_remedies.py
"""

import ast
import contextlib
import re
import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from running import in_process

from domainshuttle.cluster.local import ClusterError, check_port
from domainshuttle.platform.checkpoint.resume import IncompatibleError, choose_start, require_resumable
from domainshuttle.platform.checkpoint.store import CheckpointError, CheckpointStore, TrainingState, write_manifest
from domainshuttle.platform.cli import app
from domainshuttle.platform.commands.data_index import chosen_buckets, described_as
from domainshuttle.platform.config.loading import _known_keys, load_config
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.engine.initialization import build_model
from domainshuttle.platform.evaluation.config import EvaluationConfig, load_evaluation
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.lock import RunLock, RunLockedError
from domainshuttle.platform.run.weights_digest import ChangedError, verified_digest
from domainshuttle.platform.run.weights_origin import WeightsOrigin

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Text:
    """A text of the product that people may read; what is only known when it is said stands in it as <<...>>."""

    where: str
    text: str

    @property
    def of_evaluation(self) -> bool:
        """Whether its overrides are those of an evaluation's configuration."""
        return self.where.startswith("platform/evaluation/")


def texts() -> Iterator[Text]:
    """Every string of the product but docstrings."""
    for path in sorted(
        file for room in ("model", "pipelines", "cluster", "platform") for file in (ROOT / room).rglob("*.py")
    ):
        tree = ast.parse(path.read_text())
        passed_over: set[int] = set()
        for node in ast.walk(tree):
            for statement in getattr(node, "body", None) if isinstance(getattr(node, "body", None), list) else ():
                if isinstance(statement, ast.Expr):
                    passed_over.add(id(statement.value))
            if isinstance(node, ast.JoinedStr):
                passed_over.update(id(part) for part in ast.walk(node) if part is not node)
        for node in ast.walk(tree):
            if id(node) in passed_over:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield Text(f"{path.relative_to(ROOT)}:{node.lineno}", node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [
                    one.value if isinstance(one, ast.Constant) else f"<<{ast.unparse(one.value)}>>"
                    for one in node.values
                ]  # type: ignore[attr-defined]
                yield Text(f"{path.relative_to(ROOT)}:{node.lineno}", "".join(map(str, parts)))


TEXTS = list(texts())
COMMANDS: dict[str, click.Command] = {}


def _collect(group: Any, prefix: str = "") -> None:
    for name, command in group.commands.items():
        COMMANDS[f"{prefix}{name}"] = command
        if hasattr(command, "commands"):
            _collect(command, f"{prefix}{name} ")


_collect(typer.main.get_command(app))


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


_PROGRAMS = (
    "ray (?:start|job|up|get-auth-token)|mlflow (?:ui|server)|hf download|(?:zstd|lz4) -d|kubectl|docker|nvidia-smi|"
    "tar (?=--)"
)
FOREIGN = re.compile(rf"\b(?:{_PROGRAMS}).*")
"""Commands of others that a text names, with their options."""
OF_OTHERS = "cluster/vm.py"
"""Where all options are those of `ray start` and `docker run`."""


def test_every_option_that_a_text_names_is_one() -> None:
    known = set().union(*(options_of(command) for command in COMMANDS.values()))
    found = 0
    for one in TEXTS:
        if one.where.startswith(OF_OTHERS):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", FOREIGN.sub("", one.text if " " in one.text else "")):
            found += 1
            assert option in known, f"{one.where}: {option} is no option: {one.text}"
    assert found > 50


def test_a_place_that_a_command_names_is_quoted_for_the_shell() -> None:
    """Folders have spaces in their names, and experiments too."""
    found = 0
    for one in TEXTS:
        for command in re.findall(r"\bdomainshuttle [a-z]+[^`;]*", one.text):
            for value in re.findall(r"<<(.*?)>>", command.partition(". ")[0]):
                if re.search(r"\b(folder|path|out|where|uri|experiment|place|parent)\b", value):
                    found += 1
                    assert "quote" in value, f"{one.where}: {value} of {command}"
    assert found > 15


def test_every_command_that_a_text_names_is_one_and_has_the_options_beside_it() -> None:
    found = 0
    for one in TEXTS:
        for after in re.findall(r"domainshuttle ([a-z].*?)(?=domainshuttle |$)", one.text.replace("\n", " ")):
            words = after.split()
            name = " ".join(words[:2]) if words[0] == "data" or " ".join(words[:2]) in COMMANDS else words[0]
            name = "evaluate models" if name == "evaluate" else name  # what it is short for
            name = name.rstrip(".,;:`)'")
            if name == "data":  # in prose, such as "domainshuttle data build, data encode"
                continue
            assert name in COMMANDS, f"{one.where}: no command {name!r}: {one.text}"
            found += 1
            beside = re.split(r"[;`(]|, or |, and | with: ", after)[0]
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", beside):
                assert option in options_of(COMMANDS[name]), f"{one.where}: {name} has no {option}: {one.text}"
    assert found > 20


SECTIONS = (
    "model", "encoders", "corpora", "stages", "experts", "loader", "guard", "cluster", "engine", "checkpoint",
    "tracking", "sampling", "generation", "evaluation",
)  # fmt: skip
NAMED = ("corpora", "stages", "experts")
"""Sections of which each entry has a name, which stands in the path of a key."""


def unknown_key(path: str, kind: type = RunConfig) -> str | None:
    """The first part of a dotted path that is no key of the configuration."""
    before: list[str] = []
    for part in path.split("."):
        if part == "X" or (before and before[-1] in NAMED and re.fullmatch(r"stage\d", part)):
            continue
        if part not in _known_keys(tuple(before), kind):
            return part
        before.append(part)
    return None


def plain(text: str) -> str:
    """A text with X for what is only known when it is said."""
    return re.sub(r"<<.*?>>", "X", text, flags=re.DOTALL)


def test_every_key_that_a_text_names_is_one() -> None:
    found = set()
    for one in TEXTS:
        for path in re.findall(rf"(?<![\w./*-])((?:{'|'.join(SECTIONS)})(?:\.[A-Za-z_]\w*)+)", plain(one.text)):
            if re.search(r"\.(py|json|txt|yaml|safetensors|jsonl|html)$", path):
                continue
            kind = EvaluationConfig if one.of_evaluation else RunConfig
            unknown = unknown_key(path, kind)
            assert unknown is None or unknown_key(path) is None, f"{one.where}: {path}: {unknown}: no key: {one.text}"
            found.add(path)
    assert len(found) > 20


VALUES = {
    "budget_gpu_hours": "2.5",
    "engine.activations": "{mode: full}",
    "loader.most_bad": "0.3",
    "learning_rate": "1e-5",
    "micro_batch": "8",
    "name": "other-2",
    "warmup_steps": "2",
    "tracking.uri": "http://host:5000",
}
"""What stands for a figure or a name that is only known when a text is said."""


@pytest.mark.parametrize("one", [one for one in TEXTS if re.search(r"--set '?\w", one.text)], ids=lambda one: one.where)
def test_every_override_that_a_text_names_is_taken(one: Text, tmp_path: Path) -> None:
    """As it is written: with a value, and a key that has such values."""
    overrides = list(SMALL)
    for words in re.findall(r"--set ('[^']*'|\S+)", plain(one.text)):
        text = words.strip("'`").rstrip(").,;`'")
        if "=" not in text or text == "KEY=VALUE":
            assert text in ("KEY=VALUE", "X", "X:"), f"{one.where}: --set {text} has no value"
            continue
        key, value = text.split("=", 1)
        assert "..." not in value, f"{one.where}: --set {text} says no value"
        assert "X" not in value or key in VALUES or key.rpartition(".")[2] in VALUES or "X/" in f"{value}/", text
        value = VALUES.get(key, VALUES.get(key.rpartition(".")[2], value)) if "X" in value else value
        value = value.replace("FOLDER", str(tmp_path)).replace("NAME", "other")
        overrides.append(f"{key.replace('.X.', '.stage1.' if key.startswith('stages') else '.high.')}={value}")
    if one.of_evaluation:
        assert load_evaluation(
            "paper", [text.replace("sources.high.", "sources.mixed.") for text in overrides[len(SMALL) :]]
        )
        return
    if any(text.startswith("experts") for text in overrides):
        overrides.insert(0, "experts=[{name: high, low: 0.5}, {name: low, high: 0.5}]")
    assert load_config("demo", overrides)


# What follows makes an error, takes the remedy out of its message, and does it.


@dataclass(frozen=True)
class Mistake:
    """Overrides of the demo that are refused, what the message advises, and overrides that follow one advice each."""

    given: tuple[str, ...]
    advice: str
    remedies: tuple[tuple[str, ...], ...]
    """Instead of `given`; {1}, {2}, ... are the groups of `advice` in the message."""


STAGE = "stages.stage1."
SMALL = tuple(f"stages.{name}.micro_batch=8" for name in ("base", "stage1", "stage2"))
"""Batches that more workers can share."""
MISTAKES = [
    Mistake((f"{STAGE}global_batch=66",), r"use a multiple of (\d+)", ((f"{STAGE}global_batch={{1}}",),)),
    Mistake(("cluster.workers=3",), r"or workers of which there are ([\d, ]+)", (("cluster.workers={1[0]}",),)),
    Mistake((f"{STAGE}weight_decay=1e6", f"{STAGE}learning_rate=1"), "weight_decay=", ((f"{STAGE}weight_decay=0.1",),)),
    Mistake(
        (f"{STAGE}loss.cross_pair_weight=1", f"{STAGE}references=0"), "raise `references` or set the weight to 0",
        ((f"{STAGE}loss.cross_pair_weight=1", f"{STAGE}references=1"),
         (f"{STAGE}loss.cross_pair_weight=0", f"{STAGE}references=0")),
    ),
    Mistake(
        (f"{STAGE}loss.cross_pair_weight=1", f"{STAGE}reference_dropout=1"), "lower it",
        ((f"{STAGE}loss.cross_pair_weight=1", f"{STAGE}reference_dropout=0.9"),),
    ),
    Mistake(
        ("engine.activations.offload=true",), "set mode to full, every or attention",
        (("engine.activations={mode: full, offload: true}",), ("engine.activations={mode: attention, offload: true}",),
         ("engine.activations={mode: every, every: 2, offload: true}",)),
    ),
    Mistake(
        ("engine.activations.mode=every",), "`every` goes with",
        (("engine.activations={mode: every, every: 2}",),),
    ),
    Mistake(("encoders.text_len=7",), "set both to", (("encoders.text_len=7", "model.size.text_len=7"),)),
    Mistake(("model={}",), "give either `base`", (("model={size: {num_layers: 2, text_len: 48}}",),)),
    Mistake(("cluster.workrs=2",), "did you mean .?workers", (("cluster.workers=2",),)),
    Mistake((f"{STAGE}mixture={{sprites-imges: 1}}",), "did you mean", ((f"{STAGE}mixture={{sprites-images: 1}}",),)),
    Mistake(("seed",), r"for example --set (cluster.workers=\d+)", (("{1}", *SMALL),)),
    Mistake((f"{STAGE}trained=[*_ref*",), r"such as (\['\*_ref\*'\])", ((f"{STAGE}trained={{1}}",),)),
    Mistake((f"{STAGE}trained=*_ref*",), r"list, such as \[a, b\]|such as '\*'", ((f"{STAGE}trained=['*_ref*']",),)),
    Mistake((f"{STAGE}steps=",), "by `steps`, `samples` or", ((f"{STAGE}steps=5",), (f"{STAGE}gpu_hours=0.5",))),
    Mistake(("output=s3://bucket/runs",), "give a folder", (("output=runs",),)),
    Mistake((f"{STAGE}samples=77",), "give one", ((f"{STAGE}steps=2",),)),
    Mistake(("experts=[{name: a}, {name: a}]",), "twice", (("experts=[{name: a, low: 0.5}, {name: b, high: 0.5}]",),)),
    Mistake((f"{STAGE}flow={{low: 0.5, high: 0.2}}",), "must lie below", ((f"{STAGE}flow={{low: 0.2, high: 0.5}}",),)),
    Mistake(("cluster.workers=[4, 2]",), r"should be \[least, most\]", (("cluster.workers=[1, 2]",),)),
    Mistake(
        ("corpora.sprites-images.buckets=[64x64]",), "frames x height|expected",
        (("corpora.sprites-images.buckets=[1x64x64]",),),
    ),
]  # fmt: skip


@pytest.mark.parametrize("one", MISTAKES, ids=lambda one: one.given[0])
def test_what_a_configuration_is_told_mends_it(one: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        load_config("demo", list(one.given))
    advice = re.search(one.advice, str(raised.value))
    assert advice, str(raised.value)
    for remedy in one.remedies:
        groups = ["", *advice.groups()]
        chosen = [text.format(*groups) if re.search(r"\{\d[^}]*\}", text) else text for text in remedy]
        load_config("demo", chosen)


@pytest.fixture
def run(tmp_path: Path, tiny_yaml: Path) -> Run:
    """A run whose one stage is half way, with a checkpoint."""
    run = Run.open(load_config(str(tiny_yaml), [f"output={tmp_path / 'runs'}"]))
    save(run, 2)
    return run


def save(run: Run, step: int) -> str:
    segment = run.segments()[0]
    digest = run.config.digest()
    state = TrainingState(segment.name, step, 1, 1, digest, {}, {}, {}, config=run.config.decisive())
    write_manifest(CheckpointStore.of(run.config).place, state, f"{segment.name}-step{step:08d}", {})
    return f"{segment.name}-step{step:08d}"


def again(run: Run, *overrides: str) -> Run:
    """The run of the same file and of other overrides."""
    return Run(run.config.model_validate(_with(run.config, overrides)))


def _with(config: RunConfig, overrides: tuple[str, ...]) -> dict[str, Any]:
    path = Path(config.output) / "again.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config.to_yaml())
    return load_config(str(path), list(overrides)).model_dump(mode="json", exclude_none=True)


def overrides_in(message: str) -> list[str]:
    return [shlex.split(text)[0] for text in re.findall(r"--set ('[^']*'|[^\s;,)]+)", message)]


def test_another_configuration_gets_a_name_of_its_own_or_the_run_is_begun_anew(run: Run) -> None:
    Run.open(again(run, f"name={run.next_name()}").config)  # the first free name is taken
    other = again(run, "seed=11")
    with pytest.raises(ConfigError, match="--fresh") as raised:
        Run.open(other.config)
    (name,) = overrides_in(str(raised.value))
    assert Run.open(again(run, "seed=11", name).config).folder != run.folder
    assert Run.open(other.config, fresh=True).folder == run.folder


def test_a_checkpoint_of_another_configuration_is_named_or_begun_without(run: Run) -> None:
    store, segment = CheckpointStore.of(run.config), run.segments()[0].name
    with pytest.raises(IncompatibleError, match="--resume none") as raised:
        choose_start(store, segment, "auto", "other")
    named, none = re.findall(r"--resume ([\w-]+)", str(raised.value))
    assert none == "none" and choose_start(store, segment, "none", "other") is None
    chosen = choose_start(store, segment, named, "other")
    assert chosen is not None and chosen.name == named


def test_a_damaged_checkpoint_is_left_by_resume_none(run: Run) -> None:
    store, segment = CheckpointStore.of(run.config), run.segments()[0].name
    manifest = next(path for path in run.checkpoints.rglob("*.json"))
    whole = manifest.read_bytes()
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="Bring one back, or begin the segment anew with --resume none"):
        choose_start(store, segment, "auto", run.config.digest())
    assert choose_start(store, segment, "none", run.config.digest()) is None
    for marked in run.checkpoints.rglob("*amaged*"):
        marked.unlink()
    manifest.write_bytes(whole)
    assert choose_start(CheckpointStore.of(run.config), segment, "auto", run.config.digest()) is not None


def test_a_resume_of_which_nothing_would_come_says_what_would(run: Run) -> None:
    store, segment = CheckpointStore.of(run.config), run.segments()[0]
    finish(run)
    name = save(run, 4)
    for resume in ("none", name):
        with pytest.raises(CheckpointError) as raised:
            require_resumable(run, store, resume, run.segments())
        (override,) = overrides_in(str(raised.value))
        other = Run.open(again(run, override).config)
        where = re.search(r"--resume (/\S+)", str(raised.value))
        if where:
            named = CheckpointStore.of(other.config)
            require_resumable(other, named, where[1], other.segments())
            chosen = choose_start(named, segment.name, where[1], other.config.digest())
            assert chosen is not None and chosen.name == name
    with pytest.raises(CheckpointError, match=f"There are: .*{name}"):
        require_resumable(run, store, "stage1-step00000099", run.segments())


def finish(run: Run) -> None:
    for segment in run.segments():
        build_model(run.config.model, WeightsOrigin(None, 3)).save_pretrained(segment.weights)
        segment.finish(4, run.fingerprints)


def test_a_locked_run_is_looked_at_or_trained_under_another_name(run: Run) -> None:
    with RunLock(run.folder):
        with pytest.raises(RunLockedError) as raised, RunLock(run.folder):
            pass
        look, stop = re.findall(r"`(domainshuttle [^`]+)`", str(raised.value))
        assert "stage1" in in_process(*shlex.split(look)[1:])
        assert stop == look.replace(" status ", " stop ", 1)  # which tests of commands run
        (override,) = overrides_in(str(raised.value))
        with RunLock(again(run, override.replace("NAME", "other")).folder):
            pass


def test_changed_weights_are_brought_back_or_made_again(run: Run) -> None:
    finish(run)
    weights = run.segments()[-1].weights
    file = next(weights.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ChangedError) as raised:
        verified_digest(weights, run.fingerprints)
    (noted,) = re.findall(r"or remove (\S+) and", str(raised.value))
    file.write_bytes(whole)
    before = verified_digest(weights, run.fingerprints)
    file.write_bytes(b"damaged")
    Path(noted).unlink()
    assert not run.segments()[-1].finished, "the run would not make them again"
    finish(run)
    assert verified_digest(weights, run.fingerprints) == before


def test_commands_that_lead_to_an_export_and_its_clips(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = in_process("export", run.folder, "model", expect=2)
    (look,) = re.findall(r"see domainshuttle (status \S+)", printed)
    in_process(*shlex.split(look))
    finish(run)
    size = ["--frames", "5", "--height", "30", "--width", "32", "--steps", "0", "--out", "clips"]
    printed = in_process("generate", "model", *size, "--prompt", "a", expect=2)
    assert "make one with domainshuttle export" in printed
    in_process("export", run.folder, "model")
    printed = in_process("generate", "model", *size, expect=2)
    assert "give either --prompt" in printed
    printed = in_process("generate", "model", *size, "--prompt", "a", expect=2)
    for option, advice in (("--height", r"use (\d+)x\d+"), ("--steps", r"at least (\d+)")):
        value = re.search(advice, printed)
        assert value, printed
        size[size.index(option) + 1] = value[1]
        printed = in_process("generate", "model", *size, "--prompt", "a", expect=0 if option == "--steps" else 2)
    assert [path.name for path in Path("clips").iterdir()] == ["clip.mp4"]


def test_options_of_an_index_that_a_message_asks_for_are_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Give --corpus NAME"):
        described_as(str(tmp_path), None, None, [])
    with pytest.raises(ConfigError, match="which buckets") as raised:
        described_as(str(tmp_path), "mine", None, [])
    (listed,) = re.findall(r"--bucket (\w+)", str(raised.value))
    assert described_as(str(tmp_path), "mine", None, chosen_buckets([listed], None, [])).corpus == "mine"
    with pytest.raises(ConfigError, match="go together") as raised:
        chosen_buckets([], "480p", [])
    (resolution,) = re.findall(r"--resolution (\d+p)", str(raised.value))
    assert chosen_buckets([], resolution, [int(text) for text in re.findall(r"--frames (\d+)", str(raised.value))])


@pytest.mark.parametrize("port", [0, (1 << 16) - 1])
def test_a_busy_port_has_another_that_is_free(port: int) -> None:
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # the last one may be taken already
            taken.bind(("127.0.0.1", port))
            taken.listen()
        port = port or taken.getsockname()[1]
        with pytest.raises(ClusterError) as raised:
            check_port(port)
    first, none = overrides_in(str(raised.value))
    check_port(load_config("demo", [first]).cluster.dashboard_port or 0)
    assert load_config("demo", [none]).cluster.dashboard_port is None


@pytest.mark.parametrize("option", [("data", "build", "demo", "--most-bad"), ("flush", "x", "--timeout")], ids=" ".join)
@pytest.mark.parametrize("value", ["nan", "-1"])
def test_a_number_that_bounds_nothing_is_refused(option: tuple[str, ...], value: str) -> None:
    assert "Invalid value" in in_process(*option, value, expect=2)
