"""Records without a caption, of every source alike. Run: python -m pytest tests/pipelines/corpora/test_captions.py"""

from pathlib import Path

import pytest
from built import made
from sources.every import A_CAPTION, EVERY

from domainshuttle.pipelines.corpora.builder import keep_hint


@pytest.mark.parametrize("caption", [None, " "])
@pytest.mark.parametrize("name", EVERY)
def test_a_record_without_a_caption_is_left_out_or_kept_as_asked(
    tmp_path: Path, name: str, caption: str | None
) -> None:
    config = EVERY[name](tmp_path / "root", caption)
    plain = made(config, tmp_path / "plain")
    (reason,) = plain.tally.counts
    assert plain.tally.counts == {reason: 1} and len(plain.samples) == 1 and not plain.bad
    assert "empty_captions: keep" in keep_hint(plain.tally.counts)
    kept = made(config.model_copy(update={"empty_captions": "keep"}), tmp_path / "kept")
    assert not kept.tally.counts and not kept.bad
    texts = {sample.key: sample.info.caption for sample in kept}
    assert len(texts) == 2 and [*texts.values()].count("") == 1
    (before,) = plain
    assert before.members() in [sample.members() for sample in kept]


@pytest.mark.parametrize("name", EVERY)
def test_with_captions_nothing_is_left_out(tmp_path: Path, name: str) -> None:
    result = made(EVERY[name](tmp_path / "root", A_CAPTION), tmp_path / "survey")
    assert len(result.samples) == 2 and not result.tally.counts and not result.bad
    assert not keep_hint(result.tally.counts)
