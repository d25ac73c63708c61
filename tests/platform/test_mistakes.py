"""A mistake of the user's, or a fault of the environment, is one message and code 2; a fault of ours is a traceback.

Run: python -m pytest tests/platform/test_mistakes.py
"""

import errno
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from running import in_process
from safetensors.torch import load_file

from domainshuttle.cluster.local import ClusterError, Connection
from domainshuttle.model.file_mode import save_tensors
from domainshuttle.pipelines.errors import DataError, StorageError
from domainshuttle.platform.checkpoint.async_writer import SavesFailedError
from domainshuttle.platform.checkpoint.resume import IncompatibleError
from domainshuttle.platform.commands import status
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.driver.schedule_loop import DivergedError, WorkersFailedError
from domainshuttle.platform.engine.initialization import build_model
from domainshuttle.platform.generation import generate as generate_module
from domainshuttle.platform.generation.export import export_run
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.lock import RunLockedError
from domainshuttle.platform.run.weights_origin import WeightsOrigin
from domainshuttle.platform.tracking.queries import ServerAwayError, TrackingError, UnknownRecordError


class OfATask(Exception):
    """As Ray's error of a task: the error in it is its cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback of many lines")
        self.cause = cause


OURS = [
    ConfigError, DataError, StorageError, ClusterError, IncompatibleError, SavesFailedError, RunLockedError,
    DivergedError, WorkersFailedError, TrackingError, UnknownRecordError, ServerAwayError,
]  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        *(kind("what is wrong [with] this") for kind in OURS),
        OSError(errno.ENOSPC, "what is wrong [with] this", "/a/disk"),
        PermissionError(errno.EACCES, "what is wrong [with] this", "/a/place"),
        OfATask(DataError("what is wrong [with] this")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_person_can_mend_is_one_message(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> None:
        raise error

    monkeypatch.setattr(status, "print_status", failing)
    printed = in_process("status", "x", expect=2)
    assert "what is wrong [with] this" in printed
    assert printed.startswith("Error: ")
    assert "Traceback" not in printed and len(printed.splitlines()) == 1
    assert all(place in printed for place in [getattr(error, "filename", None)] if place)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"), IndexError("x"), LookupError("x"), ValueError("x"), TypeError("x"), RuntimeError("x"),
        AssertionError("x"), OSError("of a library, without a number"), OfATask(KeyError("x")),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_fault_of_ours_is_a_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> None:
        raise error

    monkeypatch.setattr(status, "print_status", failing)
    with pytest.raises(type(error)):
        in_process("status", "x")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_yaml: Path) -> Path:
    """A folder with a run of one finished stage, its export, and inputs that are none."""
    folder = tmp_path_factory.mktemp("mistakes")
    run = Run.open(load_config(str(tiny_yaml), [f"output={folder / 'runs'}"]))
    segment = run.segment("stage1")
    build_model(run.config.model, WeightsOrigin(None, 3)).save_pretrained(segment.weights)
    segment.finish(4)
    export_run(run, folder / "model")
    (folder / "plain").write_text("a file")
    (folder / "no.jpg").write_text("no picture")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "png")
    (folder / "cut.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    for name, content in (
        ("none.jsonl", b""),
        ("latin.jsonl", b'{"prompt": "\xeen"}'),
        ("list.jsonl", b"[1, 2]"),
        ("odd.jsonl", b'{"prompt": "a", "seg_meta": 3}'),
        ("cut.jsonl", b'{"prompt": "a"'),
    ):
        (folder / name).write_bytes(content)
    (folder / "empty").mkdir()
    (folder / "described").mkdir()
    (folder / "described" / "config.json").write_text('{"_class_name": "DomainShuttleTransformer3DModel"}')
    for name in ("cut-model", "odd-model", "diverged-model"):
        shutil.copytree(folder / "model", folder / name)
    (diverged,) = (folder / "diverged-model" / "transformer").glob("*.safetensors")
    tensors = load_file(diverged)
    save_tensors(tensors | {"proj_out.bias": torch.full_like(tensors["proj_out.bias"], torch.nan)}, diverged,
                 {"format": "pt"})  # fmt: skip
    weights = next((folder / "cut-model" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "odd-model" / "model_index.json").write_text("{")
    (folder / "damaged.db").write_bytes(b"this is no database" * 100)
    (folder / "index.parquet").write_bytes(b"no parquet")
    broken = Run.open(load_config(str(tiny_yaml), [f"output={folder / 'broken'}"]))
    shutil.copytree(segment.weights, broken.segment("stage1").weights, dirs_exist_ok=True)
    for path in broken.segment("stage1").weights.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    (broken.folder / "mlflow.json").write_text("{")
    return folder


GENERATE: dict[str, Any] = {"frames": 5, "height": 32, "width": 32, "steps": 1}


def generate(model: str = "model", *more: str, **options: Any) -> list[str]:
    given = {"prompt": "a", "out": "made", **GENERATE, **options}
    arguments = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    return ["generate", model, *arguments, *more]


MISTAKES = [
    (generate(frames=10), "num_frames 10 must be 4 n + 1"),
    (generate(frames=0), "num_frames 0"),
    (generate(height=30), "30x32 must be multiples of 16"),
    (generate(width=-16), "32x-16 must be"),
    (generate(steps=0), "num_inference_steps 0 must be at least 1"),
    (generate(seed=99999999999999999999), "seed 99999999999999999999"),
    (generate(guidance="nan"), "guidance scale nan"),
    (generate(guidance="inf"), "guidance scale inf"),
    (generate(fps=0), "--fps 0"),
    (generate(reference="no.jpg"), "a reference picture can't be used"),
    (generate(reference="cut.png"), "a reference picture can't be used"),
    (generate(reference="absent.png"), "no picture absent.png"),
    (generate(reference="good.png:9"), "subject 9"),
    (generate(reference="good.png:-1"), "subject -1"),
    (generate(reference="good.png:0:martian"), "unknown domain 'martian'"),
    (generate("model", *["--reference", "good.png"] * 6), "6 reference images"),
    (generate(out="plain/made"), "plain"),
    (generate(out="plain"), "plain"),
    (generate(prompt=None), "give either --prompt"),
    (generate(cases="none.jsonl", prompt=None), "none.jsonl has no cases"),
    (generate(cases="absent.jsonl", prompt=None), "no file absent.jsonl"),
    (generate(cases="latin.jsonl", prompt=None), "latin.jsonl"),
    (generate(cases="list.jsonl", prompt=None), "list.jsonl, line 1"),
    (generate(cases="odd.jsonl", prompt=None), "odd.jsonl, line 1"),
    (generate(cases="cut.jsonl", prompt=None), "cut.jsonl, line 1"),
    (generate("absent"), "no exported model in absent"),
    (generate("empty"), "no exported model in empty"),
    (generate("cut-model"), "no exported model in cut-model"),
    (generate("described"), "it contains one network, not a pipeline"),
    (generate("owner/no-such-model"), "hf download owner/no-such-model"),
    (["plan", "demo", "--set", "model={base: owner/no-such-model}"], "hf download owner/no-such-model"),
    (generate("odd-model"), "no exported model in odd-model"),
    (generate("diverged-model"), "values that are not finite"),
    (["export", "runs/tiny", "plain/exported"], "plain"),
    (["export", "runs/tiny", "runs/tiny"], "not empty"),
    (["export", "runs/tiny", "s3://bucket/model"], "s3://bucket/model is an address"),
    (generate(out="gs://bucket/clips"), "gs://bucket/clips is an address"),
    (["evaluate", "model", "--cases", "demo", "--out", "s3://bucket/e"], "s3://bucket/e is an address"),
    (["compare", "x", "--uri", "sqlite:///absent.db", "--page", "s3://bucket/a.html"], "is an address"),
    (["data", "inspect", "absent", "--sheet", "s3://bucket/a.png"], "is an address"),
    (["cluster", "render", "vm", "demo", "--cluster", "h100-1", "--out", "s3://bucket/m"], "is an address"),
    (["status", "s3://bucket/runs/tiny"], "s3://bucket/runs/tiny is an address"),
    (["flush", "file:///runs/tiny"], "file:///runs/tiny is an address"),
    (["export", "runs/tiny", "new", "--stage", "stage9"], "has no stage 'stage9'"),
    (["submit", "demo", "--stage", "stage9", "--dashboard", "http://127.0.0.1:1"], "has no stage 'stage9'"),
    (["export", "broken/tiny", "new"], "weights"),
    (["export", "empty", "new"], "no run in"),
    (["flush", "broken/tiny"], "mlflow.json is damaged"),
    (["status", "plain"], "no run in"),
    (["status", "runs"], "runs in it: tiny"),
    (["status", "runs/tiny/checkpoints"], "it lies in that of a run: "),
    (["status", "runs/tinny"], "runs beside it: "),
    (["status", "odd\udcff"], "is no name in UTF-8"),
    (["compare", "x", "--uri", "damaged.db"], "expected http://HOST:5000 or sqlite:///FOLDER/mlflow.db"),
    (["compare", "x", "--uri", "sqlite:///damaged.db"], "damaged.db can't be read"),
    (["compare", "x", "--uri", "sqlite:///absent.db"], "there is no store"),
    (["compare", "x", "--uri", "sqlite:///empty"], "that is a folder"),
    (["plan", "demo", "--set", "tracking.uri=sqlite:///plain/m.db"], "plain, which is a file and no folder"),
    (["plan", "demo", "--set", "tracking.uri=sqlite:///empty"], "name the file of the store, such as sqlite:///"),
    (["compare", "x", "--uri", "foo://bar"], "foo://bar can't be read"),
    (["compare", "x", "--uri", "sqlite:///absent.db", "--plot", "curves.foo"], "ends with .png"),
    (["data", "index", "plain", "--corpus", "x", "--bucket", "1x32x32"], "plain is no folder"),
    (["data", "index", "empty", "--corpus", "a/b", "--bucket", "1x32x32"], "no configuration can name it so"),
    (["data", "verify", "plain"], "plain is no index: give an index.parquet"),
    (["data", "verify", "absent", "--decode", "some"], "expected a number of samples"),
    (["data", "build", "demo", "--corpus", "x"], "no corpus ['x']"),
    (["data", "encode", "demo", "--corpus", "x"], "no corpus ['x']"),
    (["data", "encode", "demo", "--where", "frames >"], "can't be evaluated"),
    (["data", "label", "demo", "--corpus", "x"], "no corpus ['x']"),
    (["data", "inspect", "index.parquet"], "index.parquet"),
    (["data", "inspect", "absent"], "absent"),
    (["data", "inspect", "absent", "--sheet", "sheet.foo"], "ends with .png"),
    (["plan", "demo", "--set", "model={base: empty}"], "base"),
    (["plan", "demo", "--set", "model={base: cut-model}"], "cut-model"),
    (["plan", "plain.yaml"], "no configuration"),
    (["cluster", "check", "none.jsonl", "plain"], "nothing was checked"),
    (["plan", "empty"], "no configuration"),
    (["plan", "demo", "--cluster-set", "trainers.nodes=4"], "the cluster that --cluster names"),
    (
        [
            "cluster",
            "render",
            "kuberay",
            "demo",
            "--cluster",
            "h100-1",
            "--out",
            "m",
            "--set",
            "output=/shared/runs",
            "--set",
            "data=s3://a/b",
        ],
        "cluster.gpus_per_worker=1",
    ),
    (["cluster", "render", "kuberay", "demo", "--cluster", "h100-1", "--out", "m"], "--set output=/shared/output"),
    (["cluster", "render", "vm", "demo", "--cluster", "h100-1", "--out", "m"], "--set data=/shared/data"),
    (["submit", "demo", "--address", "http://127.0.0.1:1"], "not taken by http://127.0.0.1:1"),
    (["submit", "demo", "--address", "foo://bar"], "foo://bar is not the address of a dashboard"),
    (["jobs", "--address", "http://127.0.0.1:1"], "no list of jobs came from http://127.0.0.1:1"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_is_answered_with_one_message(
    place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(Connection, "__enter__", lambda _: pytest.fail("a cluster was asked for"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {path.name for path in place.iterdir()}
    printed = in_process(*arguments, expect=2)
    assert message in printed
    assert "Error: " in printed and "Traceback" not in printed
    assert {path.name for path in place.iterdir()} - before <= {"made"}, "something was begun"


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_clip_that_memory_is_not_enough_for_is_a_mistake(kind: type[Exception]) -> None:
    sampling = generate_module.Sampling.of("absent", seed=0)
    message = "81 frames.*the memory is not enough .*: give fewer --frames"
    with pytest.raises(ConfigError, match=message), generate_module._memory_explained(sampling):
        raise kind("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nmore")
    with pytest.raises(RuntimeError, match="another"), generate_module._memory_explained(sampling):
        raise RuntimeError("another")


def test_what_is_no_mistake_is_done(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    in_process(*generate(reference="good.png:0:human", seed=2**40, out="done"))
    assert [path.name for path in (place / "done").iterdir()] == ["clip.mp4"]
    printed = in_process(*generate(prompt="many words " * 200, out="done"))
    assert re.search(
        r"1 of 1 prompts are cut to the \d+ tokens that the model reads: that of clip has 2\d\d\d", printed
    )
    (place / "one.jsonl").write_text(json.dumps({"prompt": "a", "image_path": "good.png"}))
    in_process(*generate(cases="one.jsonl", prompt=None, out="done"))
    assert (place / "done" / "one-0001.mp4").stat().st_size > 0
    shutil.rmtree(place / "done")


def test_the_ray_train_of_before_is_refused(tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "0")
    assert "unset it" in in_process("train", tiny_yaml, expect=2)
