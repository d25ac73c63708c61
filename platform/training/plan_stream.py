"""The step plan, streamed by Ray Data to the ranks of this worker group."""

from collections.abc import Iterable

import pyarrow as pa
import torch.distributed as dist
from ray import cloudpickle

from domainshuttle.pipelines.loading.ray_source import plan_dataset
from domainshuttle.pipelines.plan.feed import Feed
from domainshuttle.platform.config.schema import RunConfig


def shared_blocks(feed: Feed, first: int, last: int, config: RunConfig) -> Iterable[pa.Table]:
    """This rank's share of the steps first..last-1, as tables in their order. All ranks must call.

    Rank 0 starts the stream and owns it, so it ends with the group. Nothing is left where all steps are done and only
    the weights are missing.
    """
    if first >= last:
        return ()
    shares: list[bytes | None] = [None]
    if dist.get_rank() == 0:
        sharing, live = config.engine.sequence_parallel, config.encoders.live
        blocks = plan_dataset(feed, first, last, dist.get_world_size(), live, config.loader.read_ahead, sharing)
        shares = [cloudpickle.dumps(blocks)]
    dist.broadcast_object_list(shares)
    assert shares[0] is not None
    mine: Iterable[pa.Table] = cloudpickle.loads(shares[0])[dist.get_rank()]
    return mine
