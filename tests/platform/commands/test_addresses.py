"""Commands on folders and keys with awkward names: the corpus that was named, and never the one beside it.

Run: python -m pytest tests/platform/commands/test_addresses.py
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from encoded_corpora import inline_actors
from faulty_s3 import Proxy, serve_s3
from running import cli
from typer.testing import CliRunner

from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.storage.files import list_files, read_bytes, write_file
from domainshuttle.pipelines.storage.uri import Location, join
from domainshuttle.platform import cli as command_line
from domainshuttle.platform.commands.data import build_corpora, encode_corpora
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, absolute_uri
from domainshuttle.platform.console import console

BESIDE = ["raw", "raw 2", "raw#2", "raw?2", "raw%232", "raw%202", "räw+2"]
"""Folders that a careless reader of addresses takes for each other; each holds another corpus."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A shard of pictures for each folder, whose keys say of which it is."""
    root = tmp_path_factory.mktemp("shards")
    for number in range(len(BESIDE)):
        builder = SpritesBuilder(SpritesConfig(kind="image", samples=2, identities=72, side=48), "sprites")
        with ShardWriter(root / str(number), "s", 1 << 20) as writer:
            for sample in builder.build(0, 2):
                writer.write(f"of{number}-{sample.key}", sample.members())
    return {name: root / str(number) / "s-000000.tar" for number, name in enumerate(BESIDE)}


@pytest.fixture(scope="module")
def s3() -> Iterator[Proxy]:
    with serve_s3() as proxy:
        yield proxy


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command_line.app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return "".join(result.output.split())


def keys_of(folder: Location) -> set[str]:
    return {str(key)[:3] for key in Index.load(join(folder, "index.parquet")).column("key")}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("where", ["disk", "store"])
def test_each_command_takes_the_folder_that_is_named(
    where: str, shards: dict[str, Path], s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 400)
    monkeypatch.setattr(command_line, "_ray", lambda address: contextlib.nullcontext())
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # with keys, so that Ray's workers, which were started without them, have them too
    base: Location = s3.uri("cats", keys="key:secret@") if where == "store" else str(tmp_path / "c#a t?s%20")
    folders = {name: join(base, name) for name in BESIDE}
    for name, folder in folders.items():
        write_file(shards[name], join(folder, "s-000000.tar"))
    for number, folder in enumerate(folders.values()):
        corpus = ["--corpus", f"corpus{number}", "--bucket", "1x32x32"]
        run("data", "index", folder, *corpus)
        for name in ("a#1.parquet", "b%20.parquet"):
            copied = tmp_path / "copied"
            copied.write_bytes(read_bytes(join(folder, "index.parquet")))
            write_file(copied, join(folder, name))
    for number, folder in enumerate(folders.values()):
        assert keys_of(folder) == {f"of{number}"}
        merged = ["--merge", "a#1.parquet", "--merge", join(folder, "b%20.parquet")]
        assert f"corpus{number}(raw):2samples" in run("data", "index", folder, *merged, "--name", "all.parquet")
        for index in (folder, join(folder, "all.parquet")):
            assert "Nofaults" in run("data", "verify", index, "--decode", "all")
            assert f"corpus{number}(raw):2samples" in run("data", "inspect", index)
        held = {name for name, _ in list_files(folder) if not name.startswith(".")}
        own = [
            "all.skipped.jsonl",
            "skipped.jsonl",
            "all.parquet",
            "a#1.parquet",
            "b%20.parquet",
            "index.parquet",
            "s-000000.tar",
            "verify.jsonl",
        ]
        assert held == {*own, "all.quarantine.jsonl", "all.verify.jsonl", "quarantine.jsonl"}
    for other in ("raw", "raw 2"):
        with pytest.raises(DataError, match="expected some of the folder"):
            elsewhere = join(folders[other], "all.parquet")
            run("data", "index", folders["raw#2"], "--merge", elsewhere, "--name", "all.parquet")


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_typed_as_a_uri_is_that_folder_or_refused(
    shards: dict[str, Path], s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "_ray", lambda address: contextlib.nullcontext())
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    for name in BESIDE:
        write_file(shards[name], join("s3://bucket/typed", f"{name}/s-000000.tar"))
    before = list_files("s3://bucket/typed")
    for name in ("raw#2", "raw?2", "raw%ZZ"):
        uri = f"s3://bucket/typed/{name}"
        for command in (["index", uri, "--corpus", "x", "--bucket", "1x32x32"], ["verify", uri], ["inspect", uri]):
            with pytest.raises(DataError, match=r"%23|%3F|%25"):
                run("data", *command)
    assert list_files("s3://bucket/typed") == before
    with pytest.raises(ValueError, match="expected a name in the folder"):
        run("data", "index", "s3://bucket/typed/raw", "--corpus", "x", "--bucket", "1x32x32", "--name", "a/b.parquet")
    assert read_bytes(f"s3://bucket/typed/{quote('raw?2')}/s-000000.tar") == shards["raw?2"].read_bytes()


AWKWARD = ["data=da#ta ?%20ü+", "output=runs # ü+", "checkpoint.store=kept#%3F?", "stages.stage1.steps=3"]
AWKWARD += ["stages.stage2.mixture={pictures: 1}"]


def test_mlflows_file_is_the_one_that_is_named_or_refused(tmp_path: Path) -> None:
    named = load_config("demo", [f"output={tmp_path}/a#b c+ü"])
    assert absolute_uri(named.tracking_uri) == f"sqlite:///{tmp_path}/a#b c+ü/mlflow.db"
    for name in ("a?b", "a%20b", "50%"):
        with pytest.raises(ConfigError, match="would open another file"):
            load_config("demo", [f"output={tmp_path}/{name}"]).tracking_uri  # noqa: B018
    with pytest.raises(ConfigError, match="would open another file"):
        absolute_uri("sqlite:////out/a%20b/mlflow.db")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_building_and_encoding_in_folders_with_awkward_names(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(str(tiny_yaml), AWKWARD)
    build_corpora(config, ["pictures"])
    inline_actors(monkeypatch)  # by a cluster's actors: below, where a run is trained in such folders
    encode_corpora(config, ["pictures"])
    for stage in ("raw", "encoded"):
        assert "40samples" in run("data", "inspect", f"da#ta ?%20ü+/pictures/{stage}")
    assert [one.name for one in tmp_path.iterdir()] == ["da#ta ?%20ü+"]


@pytest.mark.nightly
def test_a_run_in_folders_with_awkward_names(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [part for one in AWKWARD for part in ("--set", one)]
    cli("data", "build", tiny_yaml, *options, "--corpus", "pictures")
    cli("data", "encode", tiny_yaml, *options, "--corpus", "pictures")
    cli("train", tiny_yaml, *options, "--stage", "stage1")
    saved = "kept#%3F?/tiny/stage1-step00000003"
    assert (tmp_path / saved / "manifest.json").exists()
    named = [*options, "--set", "name=other", "--stage", "stage1", "--set", "stages.stage1.steps=4"]
    assert "stage1-step00000003" in cli("train", tiny_yaml, *named, "--resume", saved)
    assert (tmp_path / "kept#%3F?/other/stage1-step00000004/manifest.json").exists()
    output = tmp_path / "runs # ü+"
    assert (output / "mlflow.db").exists() and any(output.glob("mlartifacts/*/*/artifacts/*"))
    assert {one.name for one in tmp_path.iterdir()} == {"da#ta ?%20ü+", "runs # ü+", "kept#%3F?"}
