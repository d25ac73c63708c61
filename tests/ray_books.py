"""What a Ray cluster's books say: bytes in the object store, and what actors reserve."""

from collections import Counter

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray._private.state import state
from ray.core.generated.gcs_pb2 import ActorTableData


def plasma_bytes() -> int:
    """Bytes of all objects that were ever made in the cluster's object stores."""
    address = ray.get_runtime_context().gcs_address
    return int(get_memory_info_reply(get_state_from_address(address)).store_stats.cumulative_created_bytes)


def reserved(name: str) -> Counter[float]:
    """How many actors, whose class's name has `name` in it, reserve so many CPUs, or did while they lived."""
    actors = [ActorTableData.FromString(one) for one in state._connect_and_get_accessor().get_actor_table(None, None)]
    return Counter(one.required_resources.get("CPU", 0.0) for one in actors if name in one.class_name)
