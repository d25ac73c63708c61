"""What is checked of the corpora before a run begins.

Run: python -m pytest tests/platform/driver/test_preflight.py
"""

from pathlib import Path

import pytest

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import sample_id
from domainshuttle.pipelines.shards.tar import Member
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.driver.preflight import require_as_configured


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
