"""The commands that index, verify and show a corpus: what they say and how they end.

Run: python -m pytest tests/platform/commands/test_data_index.py
"""

import contextlib
import gzip
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from encoded_corpora import inline_actors
from typer.testing import CliRunner

from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import Index, write_index
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.platform import cli
from domainshuttle.platform.commands import data_index as data_checks
from domainshuttle.platform.commands.data import build_corpora
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.console import console
from domainshuttle.platform.driver import ray_cluster
from domainshuttle.platform.driver.preflight import require_as_configured

INDEX = ["data", "index", "raw", "--corpus", "mine", "--bucket", "1x32x32", "--bucket", "5x32x32", "--fps", "4"]


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards in `raw` of the working folder, on a cluster that is connected already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "width", 100)
    monkeypatch.setattr(cli, "_ray", lambda address: contextlib.nullcontext())
    for kind in ("image", "video"):
        builder = SpritesBuilder(SpritesConfig(kind=kind, samples=4, identities=72, side=48), "sprites")
        with ShardWriter(tmp_path / "raw", kind, 1 << 20) as writer:
            for sample in builder.build(0, 4):
                writer.write(f"{kind}-{sample.key}", sample.members())
    return tmp_path / "raw"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.usefixtures("ray_cluster")
def test_from_shards_to_a_verified_corpus(shards: Path) -> None:
    code, text = run(*INDEX)
    assert code == 0 and "8 samples, 2 shards: 2 read" in text and "Next: domainshuttle data verify" in text
    assert run("data", "verify", "raw", "--decode", "all")[1].count("8 samples decoded") == 1
    code, text = run("data", "inspect", "raw", "--where", "frames > 1")
    assert code == 0 and "mine (raw): 4 samples" in text and "clips sampled at 4 fps" in text
    assert altered(text).startswith("of 4 samples: ") and "with frames left out" in altered(text)
    assert "5x32x32" in text and "1x32x32" not in text
    tables = [line for line in text.splitlines() if not line.endswith(".")]  # sentences a terminal wraps itself
    assert max(map(len, tables)) <= 100
    # cut, it is found, and what is left can be indexed once that is accepted
    shard = shards / "video-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-40_000])
    code, text = run("data", "verify", "raw", "--no-checksums", "--decode", "0")
    assert code == 1 and "outside shard" in text and "verify.jsonl" in text and "copy the shards" in text
    with pytest.raises(ValueError, match=r"accept them: --most-bad 0\.5"):
        run(*INDEX)
    code, text = run(*INDEX, "--most-bad", "0.5")
    assert code == 0 and "0 read" in text and "2 unchanged" in text and "cut shard" in text  # the one before read it
    assert run("data", "verify", "raw")[0] == 0


def altered(text: str) -> str:
    """What a command prints of how samples are fitted to their buckets."""
    _, _, said = " ".join(text.split()).partition("Fitted to their buckets, ")
    return said


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_altered_or_not_read_is_counted_by_each_command_and_other_rules_are_encoded_again(
    shards: Path, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "connected", lambda *_, **__: contextlib.nullcontext())
    (tmp_path / "pictures").mkdir()
    folder = shards.rename(tmp_path / "pictures" / "raw")
    (folder / "video-000000.tar").unlink()
    (folder / "more.tar.gz").write_bytes(b"packed")
    (folder / "._image-000000.tar").write_bytes(b"mac")
    index = ["data", "index", str(folder), "--corpus", "pictures"]
    for bucket, expected in (
        ("1x32x32", None),
        ("1x96x64", "of 4 samples: 4 enlarged (up to 2 times), 4 cropped (up to 33% of the area)"),
    ):
        said = run(*index, "--bucket", bucket)[1]
        assert altered(said).startswith(expected) if expected else not altered(said)
        assert "1 packed shard: more.tar.gz" in " ".join(said.split()) or "more.tar.gz" in said
    changes = [f"data={tmp_path}", f"output={tmp_path}/runs", "corpora.pictures={buckets: [1x96x64]}",
               "encoders.text_len=16", "model.size.text_len=16"]  # fmt: skip
    changed = [part for change in changes for part in ("--set", change)]
    encode = ["data", "encode", str(tiny_yaml), "--corpus", "pictures", *changed]
    inline_actors(monkeypatch)
    shown = run("data", "inspect", str(folder))[1], run(*encode)[1]
    for said in shown:
        assert altered(said).startswith("of 4 samples: 4 enlarged (up to 2 times), 4 cropped (up to 33% of the area)")
        assert "more.tar.gz" in said and "1 companion file of other tools was ignored" in " ".join(said.split())
    assert "4 captions are cut" in shown[1] and "captions are cut" not in shown[0]
    assert "4 captions are cut" in run("data", "inspect", str(tmp_path / "pictures" / "encoded"))[1]
    # as if it had been encoded by other rules: what the refusal says to do is done
    config = load_config(
        str(tiny_yaml), [*changes, "stages.stage1.mixture=[pictures]", "stages.stage2.mixture=[pictures]"]
    )
    require_as_configured(config)
    path = tmp_path / "pictures" / "encoded" / "index.parquet"
    before = Index.load(path)
    made_by = {**before.parts[0].encoders, "transform": "target: cover; v1"}
    write_index(path, before.table, before.parts[0].model_copy(update={"encoders": made_by}))
    with pytest.raises(DataError, match=r"other rules for pixels .*`domainshuttle data encode CONFIG --overwrite`"):
        require_as_configured(config)
    run(*encode, "--overwrite")
    require_as_configured(config)
    assert Index.load(path).digest == before.digest


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_not_read_is_named_and_counted(shards: Path) -> None:
    video = (shards / "video-000000.tar").read_bytes()
    (shards / "packed.tar.gz").write_bytes(gzip.compress(video))
    (shards / "UPPER.TAR").write_bytes(video)
    (shards / "more").mkdir()
    (shards / "more" / "nested.tar").write_bytes(video)
    (shards / "s#3.tar").write_bytes(video)
    (shards / "notes [draft].txt").touch()
    (shards / "video-000000.tar.md5").touch()
    with tarfile.open(shards / "image-000000.tar", "a") as archive:
        for name in (".DS_Store", "._k.jpg", "._k.json"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    (shards / "image-000000.tar").rename(shards / "mac.tar")
    with pytest.raises(ValueError, match=r"0 of 8 samples and 1 of 3 shards are bad.*accept them: --most-bad 0\.34"):
        run(*INDEX)
    code, text = run(*INDEX, "--most-bad", "0.34")
    assert code == 0 and "8 samples, 3 shards: 0 read" in text and "2 unchanged, 1 refused for its name" in text
    expected = [
        "Not read, 4 of the folder's files:",
        "1 packed shard: packed.tar.gz (samples are read by offset: unpack them with gunzip)",
        "1 upper-case ending: UPPER.TAR (rename them to NAME.tar)",
        "1 in a subfolder: more/nested.tar (move them",
        "1 other file: notes [draft].txt (",
        "4 companion files of other tools were ignored: *.md5 1, .DS_Store 1, ._* 2",
    ]
    for line in expected:
        assert line in text, text
    assert "unsafe name" in text and "s#3.tar" in (shards / "quarantine.jsonl").read_text()
    inspected = run("data", "inspect", "raw")[1]
    assert all(line in inspected for line in expected) and "1 shard in quarantine" in inspected
    verified = run("data", "verify", "raw", "--decode", "0")[1]
    assert all(line in verified for line in expected[1:-1]) and "1 unsafe name: s#3.tar (rename them" in verified
    # a pattern asks for no others
    assert "Not read" not in run(*INDEX, "--shards", "mac*", "--name", "mac.parquet")[1]
    text = run("data", "index", "raw", "--merge", "mac.parquet")[1]
    assert "1 in none of these indexes: video-000000.tar (index it too)" in text
    assert all(line in text for line in expected[1:])
    # what was put right is no longer named
    subprocess.run(["gunzip", "packed.tar.gz"], cwd=shards, check=True)
    (shards / "s#3.tar").unlink()
    code, text = run(*INDEX, "--most-bad", "0.5")
    assert "4 samples" not in text and "duplicate key" in text and "packed.tar.gz" not in text


@pytest.mark.usefixtures("ray_cluster")
def test_jobs_share_a_folder(shards: Path) -> None:
    for kind in ("image", "video"):
        run(*INDEX, "--shards", f"{kind}*", "--name", f"{kind}.parquet")
    code, text = run("data", "index", "raw", "--merge", "image.parquet", "--merge", "video.parquet")
    assert code == 0 and "8 samples, 2 shards of 2 indexes" in text
    assert len(Index.load(shards / "index.parquet")) == 8
    assert run(*INDEX)[1].count("0 read") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bucket", "1x32x32"], "which corpus is this"),
        (["--corpus", "mine"], "which buckets"),
        (["--corpus", "mine", "--resolution", "480p"], "go together"),
        (["--corpus", "mine", "--frames", "81"], "go together"),
        (["--corpus", "mine", "--bucket", "3x32x32"], "1 \\+ a multiple of 4"),
        (["--corpus", "mine", "--resolution", "481p", "--frames", "81"], "expected one of"),
    ],
)
def test_what_is_missing_is_asked_for(shards: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("data", "index", "raw", *arguments)


def test_a_corpus_without_a_builder_is_the_users_own(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("demo", ["corpora.sprites-images.build=null", "corpora.sprites-images.fps=16"])
    build_corpora(config, ["sprites-images"])
    said = " ".join(capsys.readouterr().out.split())
    assert "sprites-images has no builder: its shards are your own" in said
    assert "--corpus sprites-images --bucket 1x64x64 --fps 16" in said
    with pytest.raises(ConfigError, match="fps"):
        load_config("demo", ["corpora.sprites-images.fps=0"])


def test_decode_takes_a_number_or_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a number of samples, or all"):
        data_checks.verify_corpus(tmp_path, True, "some", None)
