"""What is checked of the corpora before a run begins.

Run: python -m pytest tests/platform/driver/test_preflight.py
"""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainshuttle.pipelines.buckets import Bucket, nearest_shareable
from domainshuttle.pipelines.encoding.corpus import encode
from domainshuttle.pipelines.encoding.target import EncodingJob
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.selection import uncaptioned
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import sample_id
from domainshuttle.pipelines.shards.tar import Member
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError
from domainshuttle.platform.driver.preflight import (
    _require_captions,
    require_as_configured,
    require_schedule,
    require_shareable,
)
from domainshuttle.platform.run.folder import Run


def test_an_index_of_another_corpus_is_refused_by_name(tiny_yaml: Path, tmp_path: Path) -> None:
    """A folder that was renamed: the weights of the mixture and the losses of each corpus go by the name."""
    config = load_config(str(tiny_yaml), [f"data={tmp_path}", "encoders.live={actors: 1}"])
    for name in ("pictures", "clips"):
        spec = config.corpus(name)
        bucket = spec.buckets[0]
        row = IndexRow(
            source="s", shard="s-0.tar", key="k", sample_id=sample_id(name, "k"), members=(Member("json", 0, 1),),
            kind="image", frames=1, height=bucket.height, width=bucket.width, fps=None, bucket=str(bucket),
            subjects=(), domains=(), reference_subjects=(), reference_origins=(), caption_length=1, scores={},
            checksum=1, text_tokens=1,
        )  # fmt: skip
        Path(spec.folder).mkdir(parents=True)
        write_index(Path(spec.index), [row], IndexMetadata(corpus=name, stage="raw", fps=spec.fps))
    require_as_configured(config)
    write_index(Path(spec.index), [row], IndexMetadata(corpus="films", stage="raw", fps=spec.fps))
    with pytest.raises(DataError, match="corpus 'clips': the index in its folder is of corpus 'films'"):
        require_as_configured(config)


def test_samples_without_a_caption_are_refused_with_a_filter_that_leaves_them_out(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    """By training on raw shards and by encoding alike; a run that began before goes on."""
    settings = [f"data={tmp_path}", f"output={tmp_path}", "encoders.live={actors: 1}"]
    config = load_config(str(tiny_yaml), settings)
    for name in ("pictures", "clips"):
        spec = config.corpus(name)
        bucket = spec.buckets[0]
        rows = [
            IndexRow(
                source="s", shard="s-0.tar", key=key, sample_id=sample_id(name, key), members=(Member("json", 0, 1),),
                kind="image", frames=1, height=bucket.height, width=bucket.width, fps=None, bucket=str(bucket),
                subjects=(), domains=(), reference_subjects=(), reference_origins=(), scores={}, checksum=1,
                caption_length=length,
            )
            for key, length in (("k", 9), ("mute", 0), ("late", 5))
        ]  # fmt: skip
        Path(spec.folder).mkdir(parents=True)
        write_index(Path(spec.index), rows if name == "clips" else rows[:1], IndexMetadata(corpus=name, stage="raw"))
    place = config.corpus("clips").index
    assert (uncaptioned(place, None), uncaptioned(place, "key == 'k'"), uncaptioned(place, "key != 'k'")) == (1, 0, 1)
    raw = CorpusSpec("clips", "raw", config.corpus("clips").folder)
    with pytest.raises(DataError, match=r"1 of its samples has no caption.* --where '\(frames > 0\) and caption_len"):
        encode([EncodingJob(raw, raw, "frames > 0")], config.encoders.sources(), lambda *told: None)
    for text in ("kind == 'vidoe'", "kind != 'vidoe'"):  # before encoders are loaded
        with pytest.raises(DataError, match=r"no sample has 'vidoe' in kind; there are \['image'\]"):
            encode([EncodingJob(raw, raw, text)], config.encoders.sources(), lambda *told: None)
    with pytest.raises(DataError, match="1 of the samples that stage") as refused:
        _require_captions(config, [])
    match = re.search(r"stages\.(\w+)\.where: (\{.*\})", str(refused.value))
    assert match is not None
    stages = [stage.name for stage in config.stages]
    filters = [f"stages.{number}.where={match[2]}" for number, name in enumerate(stages)
               if "clips" in config.stages[number].mixture]  # fmt: skip
    _require_captions(load_config(str(tiny_yaml), [*settings, *filters]), [])
    Run.open(config)
    _require_captions(config, [])


def test_a_warm_up_that_is_longer_than_its_stage_is_refused(tiny_yaml: Path, tmp_path: Path) -> None:
    """By `plan` and `train`; with what the message says it is accepted, and a run that has begun so goes on."""
    settings = [f"output={tmp_path}", "stages.stage2.warmup_steps=25"]
    config = load_config(str(tiny_yaml), settings)
    with pytest.raises(ConfigError, match=r"stages.stage2.warmup_steps is 25, and the stage ends after 24") as caught:
        require_schedule(config)
    remedy = re.search(r"--set (\S+)", str(caught.value).rstrip(","))
    assert remedy is not None
    require_schedule(load_config(str(tiny_yaml), [*settings, remedy[1].rstrip(",")]))
    require_schedule(load_config(str(tiny_yaml), [*settings, "stages.stage2.warmup_steps=24"]))
    require_schedule(load_config(str(tiny_yaml), [*settings, "stages.stage2.steps=null", "stages.stage2.gpu_hours=1"]))
    samples = ["stages.stage2.steps=null", "stages.stage2.samples=64"]
    with pytest.raises(ConfigError, match="ends after 8 steps"):
        require_schedule(load_config(str(tiny_yaml), [*settings, *samples]))
    Run.open(config)
    require_schedule(config)
    with pytest.raises(ConfigError, match="warmup_steps is 30"):  # it is another run
        require_schedule(load_config(str(tiny_yaml), [*settings, "stages.stage2.warmup_steps=30"]))


def test_buckets_and_heads_that_can_not_be_shared_are_refused_with_what_can() -> None:
    """480p's square bucket has 1,521 tokens a frame; with what the message names, the run is accepted."""
    config = load_config("wan2.1-t2v-14b", ["engine.sequence_parallel=4"])
    with pytest.raises(ConfigError, match=r"624x624 has 1,521 tokens a frame; nearest is (\d+x\d+x\d+)") as caught:
        require_shareable(config, {40})
    named = dict(re.findall(r"(\d+x\d+x\d+) has [\d,]+ tokens a frame; nearest is (\d+x\d+x\d+)", str(caught.value)))
    changed = []
    for name in sorted({name for stage in config.stages for name in stage.mixture}):
        buckets = {named.get(str(bucket), str(bucket)) for bucket in config.corpus(name).buckets}
        changed.append(f"corpora.{name}.buckets=[{', '.join(sorted(buckets))}]")
    require_shareable(load_config("wan2.1-t2v-14b", ["engine.sequence_parallel=4", *changed]), {40})
    with pytest.raises(ConfigError, match=r"attention heads: use 1 or 2 or 3"):
        require_shareable(config, {6})


@given(height=st.integers(1, 100), width=st.integers(1, 100), frames=st.sampled_from([1, 81]), ranks=st.integers(1, 8))
def test_the_nearest_bucket_is_the_nearest_that_can_be_shared(height: int, width: int, frames: int, ranks: int) -> None:
    found = nearest_shareable(Bucket(frames, 16 * height, 16 * width), ranks)
    assert found.frames == frames and found.reference_tokens % ranks == 0
    away = abs(found.height // 16 - height) + abs(found.width // 16 - width)
    for more in range(-away + 1, away):
        for wider in range(-away + 1 + abs(more), away - abs(more)):
            h, w = height + more, width + wider
            assert h < 1 or w < 1 or h * w % ranks
