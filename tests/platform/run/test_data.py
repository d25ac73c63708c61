"""A segment's data is refused where its encoders are not those that made it.

Run: python -m pytest tests/platform/run/test_data.py
"""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from domainshuttle.model.encoder_sources import encoder_files, files_digest
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.media.decode import RULES, TRANSFORM
from domainshuttle.pipelines.sample import SampleInfo
from domainshuttle.pipelines.shards.tar import Member, ShardEntry
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, RunConfig
from domainshuttle.platform.driver.preflight import require_as_configured
from domainshuttle.platform.run.data import make_feed, require_same_encoders
from domainshuttle.platform.run.folder import Run


def save_vae(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder / "vae")


def corpora(config: RunConfig, form: str, **encoders: str) -> None:
    """An index of one sample for each corpus of the configuration."""
    for name, section in config.corpora.items():
        bucket = section.parsed_buckets[0]
        info = SampleInfo(
            caption="A dog.", source=name, kind="image" if bucket.frames == 1 else "video", frames=bucket.frames,
            size=(40, 64), fps=None if bucket.frames == 1 else 24.0, subjects=[], references=[],
        )  # fmt: skip
        row = IndexRow.of(ShardEntry("a.tar", "k", (Member("json", 512, 2),), 1), info, bucket)
        folder = Path(config.corpus(name, form).folder)
        folder.mkdir(parents=True, exist_ok=True)
        made_by = dict(encoders) if form == "encoded" else {}
        metadata = IndexMetadata(corpus=name, stage=form, fps=section.fps, encoders=made_by)  # type: ignore[arg-type]
        write_index(folder / "index.parquet", [row], metadata)


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    save_vae(tmp_path / "wan", 0)
    return [f"data={tmp_path}/data", f"output={tmp_path}/runs", f"encoders.video={tmp_path}/wan"]


def test_an_encoded_corpus_of_other_files_is_refused(tiny_yaml: Path, tmp_path: Path, places: list[str]) -> None:
    config = load_config(str(tiny_yaml), places)
    digest = files_digest(encoder_files(config.encoders.video, "video"))
    encoders = {"video": f"{tmp_path}/wan:1-2", "text": "byte-umt5:3:48", "transform": TRANSFORM}
    corpora(config, "encoded", **encoders, video_files=digest)
    run = Run.open(config)
    feed = make_feed(config, run.segments()[0])
    require_same_encoders(config, feed, run)
    require_same_encoders(config, feed, run)  # as it is remembered
    save_vae(tmp_path / "wan", 1)
    with pytest.raises(
        DataError, match=r"encoded by other files than those of encoders\.video=.*data encode CONFIG --ov"
    ):
        require_same_encoders(config, feed, run)
    (tmp_path / "wan").rename(tmp_path / "away")  # not on this machine: nothing to compare
    require_same_encoders(config, feed, run)
    # the same files under another name are the same encoder
    save_vae(tmp_path / "moved", 0)
    moved = load_config(str(tiny_yaml), [*places[:2], f"encoders.video={tmp_path}/moved"])
    require_same_encoders(moved, feed, run)


def test_live_encoders_stay_those_that_the_run_began_with(tiny_yaml: Path, tmp_path: Path, places: list[str]) -> None:
    config = load_config(str(tiny_yaml), [*places, "encoders.live={actors: 1}"])
    corpora(config, "raw")
    run = Run.open(config)
    feed = make_feed(config, run.segments()[0])
    require_same_encoders(config, feed, run)
    require_same_encoders(config, feed, run)
    save_vae(tmp_path / "wan", 1)
    with pytest.raises(DataError, match=r"encoders\.video has other files than the run tiny.* began with"):
        require_same_encoders(config, feed, run)
    save_vae(tmp_path / "wan", 0)
    require_same_encoders(config, feed, run)
    # on a machine that does not have them they are not compared, and what was noted stays
    (tmp_path / "wan").rename(tmp_path / "away")
    require_same_encoders(config, feed, run)
    save_vae(tmp_path / "wan", 1)
    with pytest.raises(DataError, match=r"encoders\.video has other files than the run tiny.* began with"):
        require_same_encoders(config, feed, run)
    run.encoders_path.write_text("{")
    with pytest.raises(ConfigError, match=r"encoders\.json is damaged"):
        require_same_encoders(config, feed, run)


def test_other_rules_are_refused_and_other_versions_are_told(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(str(tiny_yaml), [f"data={tmp_path}/data", f"output={tmp_path}/runs"])
    encoders = {"video": "block-dct:1", "text": "byte-umt5:3:48"}
    for transform in ("", "target: cover; v3", RULES.replace("v6", "v5") + "; av 18.1.0"):
        corpora(config, "encoded", **encoders, transform=transform)
        with pytest.raises(DataError, match=r"other rules for pixels .*`domainshuttle data encode CONFIG --overwrite`"):
            require_as_configured(config)
    corpora(config, "encoded", **encoders, transform=TRANSFORM.replace("av ", "av 1"))
    require_as_configured(config)
    assert "was decoded by av 1" in capsys.readouterr().out
    corpora(config, "encoded", **encoders, transform=TRANSFORM)
    require_as_configured(config)
    assert "decoded by" not in capsys.readouterr().out


def test_live_encoding_says_what_it_changes(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"data={tmp_path}/data", f"output={tmp_path}/runs", "encoders.live={actors: 1}"]
    config = load_config(str(tiny_yaml), places)
    corpora(config, "raw")
    require_as_configured(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "Corpus pictures, fitted to its buckets: of 1 sample 1 cropped (up to" in said
