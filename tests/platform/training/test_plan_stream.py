"""What a configuration says of reading reaches the data of the ranks.

Run: python -m pytest tests/platform/training/test_plan_stream.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.run.data import make_feed
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.training import plan_stream


@pytest.mark.parametrize("live", [True, False])
def test_read_ahead_and_the_actors_reach_live_encoding(
    live: bool, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["loader.read_ahead=12345", *(["encoders.live={actors: 3, cpus: 0.25, gpus: 0.5}"] if live else [])]
    config = load_config(str(tiny_yaml), [f"output={tmp_path}", *overrides])
    feed = make_feed(config, Run(config).segments()[0])
    given: list[tuple[Any, ...]] = []

    def plan_dataset(*arguments: Any) -> list[list[str]]:
        given.append(arguments)
        return [["mine"]]

    monkeypatch.setattr(plan_stream, "plan_dataset", plan_dataset)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert plan_stream.shared_blocks(feed, 2, 4, config) == ["mine"]
    finally:
        dist.destroy_process_group()
    ((planned, first, last, world_size, pool, read_ahead, sharing),) = given
    assert (planned, first, last, world_size, read_ahead, sharing) == (feed, 2, 4, 1, 12345, 1)
    assert (pool and (pool.actors, pool.cpus, pool.gpus)) == ((3, 0.25, 0.5) if live else None)
