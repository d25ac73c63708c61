"""Raw corpora encoded while they are trained on: what the configuration says of it reaches the data.

Run: python -m pytest tests/platform/config/test_live_config.py
"""

from pathlib import Path
from typing import Any

import pytest

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, EncodingSection
from domainshuttle.platform.driver.preflight import require_encoded
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import Run


def test_live_encoding_trains_on_the_raw_corpora(tiny_yaml: Path, tmp_path: Path) -> None:
    places = [f"data={tmp_path}/data", f"output={tmp_path}/runs"]
    beforehand = load_config(str(tiny_yaml), places)
    live = load_config(str(tiny_yaml), [*places, "encoders.live={actors: 2, cpus: 0.25}"])
    assert (beforehand.trained_form, live.trained_form) == ("encoded", "raw")
    for config, form in ((beforehand, "encoded"), (live, "raw")):
        feed = make_feed(config, Run(config).segments()[0])
        assert [share.index for share in feed.shares] == [str(tmp_path / "data" / "pictures" / form / "index.parquet")]
        assert feed.encoders == (EncoderSources("block-dct", "byte-umt5", 48) if form == "raw" else None)
        folder = tmp_path / "data" / "pictures" / form
        with pytest.raises(DataError, match="are not encoded" if form == "encoded" else "are not built"):
            require_encoded(config)
        folder.mkdir(parents=True)


def test_machines_may_change_on_resume_but_not_the_form(tiny_yaml: Path) -> None:
    digests = [
        load_config(str(tiny_yaml), [override]).digest()
        for override in ("encoders.live={actors: 2}", "encoders.live={actors: 5, gpus: 0.5}", "encoders.live=null")
    ]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(ConfigError, match="did you mean 'actors'"):
        load_config(str(tiny_yaml), ["encoders.live={actor: 2}"])


CPUS, GPUS = {"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([CPUS], {}, (8, 1, 0)),
        ([CPUS, GPUS, GPUS], {}, (8, 1, 1)),
        ([CPUS, GPUS, GPUS], {"gpus": 0}, (40, 1, 0)),
        ([CPUS, GPUS], {"gpus": 0.25, "cpus": 2}, (8, 2, 0.25)),
        ([GPUS, GPUS], {"gpus": 0.75}, (10, 1, 0.75)),
        ([CPUS], {"cpus": 0.1}, (80, 0.1, 0)),
        ([CPUS, GPUS], {"actors": 3}, (3, 1, 1)),
        ([{"CPU": 0.5}], {}, (1, 1, 0)),
        ([CPUS, CPUS], {"cpus": 0}, (2, 0, 0)),
    ],
)
def test_the_pool_fills_the_cluster(nodes: Any, asked: Any, expected: tuple[float, ...]) -> None:
    pool = EncodingSection(**asked).pool(nodes)
    assert (pool.actors, pool.cpus, pool.gpus) == expected
